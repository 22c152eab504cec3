"""One linear layer, as one operation if it is plain or LoRA, as a module call otherwise."""

from __future__ import annotations

from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.linear.lora import Updates, unwrap_lora
from qwen_batched.runtime.fast_path import plain_linear

Linear = tuple[nn.Parameter, nn.Parameter | None, Updates]


def resolve_linear(layer: nn.Module) -> Linear | None:
    """Weight, bias and low-rank updates of a layer that computes these and nothing else; None if it must be called."""
    plain = plain_linear(layer)
    if plain is not None:
        return *plain, ()
    base, updates = unwrap_lora(layer)
    plain = None if base is layer else plain_linear(base)
    return None if plain is None else (*plain, updates)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, as one operation if the layer is unmodified `nn.Linear`, optionally LoRA-wrapped, without hooks."""
    linear = resolve_linear(layer)
    return layer(x) if linear is None else ops.linear(x, *linear)


def apply_gelu_linear(layer: nn.Module, x: Tensor, form: str) -> Tensor:
    """`gelu(layer(x), form)`, likewise; see `ops.reference.gelu`."""
    linear = resolve_linear(layer)
    return ops.gelu(layer(x), form) if linear is None else ops.gelu_linear(x, *linear, form)

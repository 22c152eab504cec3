"""peft's LoRA layers, unwrapped: the linear layer inside, and what the adapters add to it.

A wrapped layer's own `forward` runs some ten small operations, and twenty backward. Unwrapped, it runs as few large
ones (`ops.linear`), together with the layers beside it.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.runtime.fast_path import plain_linear, runs_own_code

Updates = tuple[LowRankUpdate, ...]


def unwrap_lora(layer: nn.Module) -> tuple[nn.Module, Updates]:
    """The layer inside and the updates of its active adapters; the layer itself and none if it is more than these.

    It is more if an adapter is not plain LoRA (DoRA, a bias, dropout in training), if adapters are merged, if anything
    is hooked or replaced, and while compiling.
    """
    peft = sys.modules.get("peft.tuners.lora.layer")  # not imported for this: there are no such layers without it
    if (
        peft is None
        or type(layer) is not getattr(peft, "Linear", None)  # another thread may be importing it
        or layer.merged_adapters
        or not runs_own_code(layer)
        or torch.compiler.is_compiling()
    ):
        return layer, ()
    base = layer.base_layer
    if layer.disable_adapters:
        return base, ()
    if plain_linear(base) is None:
        return layer, ()
    updates = []
    matrices_a = layer.lora_A
    for adapter in layer.active_adapters:
        if adapter in matrices_a:
            update = _update(base, matrices_a[adapter], layer.lora_B[adapter], layer.scaling[adapter])
            if update is None or not _is_plain_lora(layer, adapter):
                return layer, ()
            updates.append(update)
    return base, tuple(updates)


def _update(base: nn.Linear, a: nn.Module, b: nn.Module, scaling: object) -> LowRankUpdate | None:
    """What two linear layers add to `base`; None unless they are matrices that fit it, and the scale a number."""
    of_a, of_b = plain_linear(a), plain_linear(b)
    if of_a is None or of_b is None:
        return None
    (first, bias_of_a), (second, bias_of_b) = of_a, of_b
    (rank, inner), (outer, inner_of_b) = first.shape, second.shape
    fits = base._parameters["weight"].shape == (outer, inner) and rank == inner_of_b
    if not fits or first.dtype != second.dtype or bias_of_a is not None or bias_of_b is not None:
        return None
    return LowRankUpdate(first, second, float(scaling)) if type(scaling) in (int, float) else None


def _is_plain_lora(layer: nn.Module, adapter: str) -> bool:
    dropout = layer.lora_dropout[adapter]
    return (
        (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and runs_own_code(dropout)
        and not layer.use_dora.get(adapter)
        and adapter not in getattr(layer, "lora_variant", ())
        and getattr(layer, "cast_input_dtype_enabled", True)
    )

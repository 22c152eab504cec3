"""One linear layer, as one operation if it is plain or LoRA, as a module call otherwise."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from qwen_batched import ops
from qwen_batched.linear.lora import take_apart
from qwen_batched.runtime.fast_path import is_plain_linear


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, as one operation where the layer is what it seems to be."""
    linear, updates = take_apart(layer)
    if is_plain_linear(linear) and not _has_any_global_hook():
        return ops.linear(x, linear.weight, linear.bias, updates)
    return layer(x)

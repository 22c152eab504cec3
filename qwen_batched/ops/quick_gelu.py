"""quick_gelu and its derivative: an activation in one pass where PyTorch makes three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator, like
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route


def quick_gelu(x: Tensor) -> Tensor:
    """See `reference.quick_gelu`."""
    way = route((x,), has_backward=True)
    if way == REFERENCE:
        return reference.quick_gelu(x)
    if way == KERNEL:
        return _forward.kernel(x)
    if way == OPERATOR:
        return _forward.traced(x)
    return _apply(x, True) if way == KERNEL_WITH_GRADIENT else QuickGELU.apply(x, False)


_forward = Operator("quick_gelu(Tensor x) -> Tensor", fake=like)
_backward = Operator(
    "quick_gelu_backward(Tensor grad, Tensor x) -> Tensor", fake=lambda grad, x: like(x), file="quick_gelu"
)


class QuickGELU(Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_direct: bool) -> Tensor:
        ctx.save_for_backward(x)
        return (_forward.kernel if is_direct else _forward.traced)(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (reference.quick_gelu_backward if torch.is_grad_enabled() else _backward)(grad, *ctx.saved_tensors), None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, QuickGELU).apply

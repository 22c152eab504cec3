"""swiglu and its derivative: a gated product's activation in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator, like
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route


def swiglu(
    gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Tensor:
    """See `reference.swiglu`."""
    way = route((gate, up), (gate_bias, up_bias), has_backward=gate_bias is None)
    if way == REFERENCE:
        return reference.swiglu(gate, up, gate_bias, up_bias)
    if way == KERNEL:
        return _forward.kernel(gate, up, gate_bias, up_bias)
    if way == OPERATOR:
        return _forward.traced(gate, up, gate_bias, up_bias)
    if way == KERNEL_WITH_GRADIENT:
        return _apply(gate, up, True)
    return SwiGLU.apply(gate, up, False)


_forward = Operator(
    "swiglu(Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda gate, up, gate_bias, up_bias: (
        like(gate) if up is not None else gate.new_empty(*gate.shape[:-1], gate.shape[-1] // 2)
    ),
)
# Without a derivative of its own.
swiglu_backward = Operator(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> Tensor",
    fake=lambda grad, gate, up: gate.new_empty(*grad.shape[:-1], 2 * grad.shape[-1]),
    file="swiglu",
)


class SwiGLU(Function):
    """`reference.swiglu` without biases."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, is_direct: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        return (_forward.kernel if is_direct else _forward.traced)(gate, up, None, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = (reference.swiglu_backward if torch.is_grad_enabled() else swiglu_backward)(grad, gate, up)
        return (grads, None, None) if up is None else (*grads.chunk(2, dim=-1), None)


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, SwiGLU).apply

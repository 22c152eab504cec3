"""Derivatives of the fused operations, for autograd. Each backward pass is a fused operation too.

They keep what the next layers keep anyway: the residual stream, the products before the gate, no float32 copies. Where
the backward pass is to be differentiated itself (`create_graph`), it is the reference's, which autograd sees through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from qwen_batched.ops import operators, reference


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to see an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode autograd is to see an operation on this."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


class FusedFunction(Function):
    """A function that is called with all its arguments."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Leaves out what PyTorch does to fill in defaults: reading the signature takes longer than a launch."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(Function, cls).apply(*arguments)


class AddRMSNorm(FusedFunction):
    """`reference.add_rms_norm` with a residual."""

    @staticmethod
    def forward(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return operators.add_rms_norm(update, residual, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, weight, ctx.eps = inputs
        ctx.save_for_backward(output[1], weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_normed is None:
            return grad_stream, grad_stream, None, None
        for_weight = ctx.needs_input_grad[2]
        grad, of_weight = _backward_passes().add_rms_norm_backward(
            grad_normed, grad_stream, *ctx.saved_tensors, ctx.eps, for_weight
        )
        return grad, grad, of_weight if for_weight else None, None


class RMSNorm(FusedFunction):
    """`reference.add_rms_norm` without a residual: the normalised stream alone."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return operators.rms_norm(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.eps = inputs
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_weight = ctx.needs_input_grad[1]
        grad, of_weight = _backward_passes().add_rms_norm_backward(grad, None, *ctx.saved_tensors, ctx.eps, for_weight)
        return grad, of_weight if for_weight else None, None


class SwiGLU(FusedFunction):
    """`reference.swiglu` without biases; where `up` is None, of the halves of `gate`."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None) -> Tensor:
        return operators.swiglu(*_halves(gate, up), None, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grads = _backward_passes().swiglu_backward(grad, *_halves(gate, up))
        return (grads, None) if up is None else grads.chunk(2, dim=-1)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


class MRope(FusedFunction):
    """`reference.mrope`. A rotation's transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None, rows: int) -> Tensor:
        return operators.mrope(qkv, cos, sin, num_kv_heads, slots, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, cos, sin, ctx.num_kv_heads, slots, _ = inputs
        ctx.tokens = len(qkv)
        ctx.save_for_backward(cos, sin, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, slots = ctx.saved_tensors
        grad = grad if slots is None else grad.index_select(0, slots)
        return MRope.apply(grad, cos, -sin, ctx.num_kv_heads, None, ctx.tokens), *(None,) * 5


def _backward_passes() -> Any:
    return reference if torch.is_grad_enabled() else operators

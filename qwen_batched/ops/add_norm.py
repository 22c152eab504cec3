"""add_norm and its derivative: the residual addition and the norm after it in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator, like
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route, wants_gradient


def add_norm(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.add_norm`."""
    way = route((update, residual), (weight, bias), has_backward=True)
    if way == REFERENCE:
        return reference.add_norm(update, residual, weight, bias, eps)
    if way == KERNEL:
        return _forward.kernel(update, residual, weight, bias, eps)
    if way == OPERATOR:
        normed, stream = _forward.traced(update, residual, weight, bias, eps)
        return normed, update if residual is None else stream
    if residual is not None and not wants_gradient(update, residual):
        update, residual = residual + update, None  # neither requires grad, so the stream is a constant
    apply = _apply if way == KERNEL_WITH_GRADIENT else AddNorm.apply
    out = apply(update, residual, weight, bias, eps, way == KERNEL_WITH_GRADIENT)
    return (out, update) if residual is None else out


def _without_alias(
    compute: Any, update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """An operator's result must not be its input, as the stream is without a residual: then it is empty."""
    normed, stream = compute(update, residual, weight, bias, eps)
    return normed, update.new_empty(0) if residual is None else stream


_forward = Operator(
    "add_norm(Tensor update, Tensor? residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    fake=lambda update, residual, weight, bias, eps: (
        like(update),
        update.new_empty(0) if residual is None else like(update),
    ),
    adapt=_without_alias,
)
_backward = Operator(
    "add_norm_backward(Tensor grad_normed, Tensor? grad_stream, Tensor stream, Tensor weight, Tensor? bias, float eps, "
    "bool for_weight) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad_normed, grad_stream, stream, weight, bias, eps, for_weight: (
        like(stream),
        like(weight) if for_weight else weight.new_empty(0),
        like(bias) if for_weight and bias is not None else weight.new_empty(0),
    ),
    file="add_norm",
)


class AddNorm(Function):
    """The normalised stream, and with a residual the stream. Keeps the stream, which the next layers keep anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        is_direct: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        run = _forward.kernel if is_direct else _forward.traced
        normed, stream = run(update, residual, weight, bias, eps)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(update if residual is None else stream, weight, bias)
        return normed if residual is None else (normed, stream)

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None = None) -> tuple[Tensor | None, ...]:
        grad, of_weight, of_bias = grad_stream, None, None
        if grad_normed is not None:
            run = reference.add_norm_backward if torch.is_grad_enabled() else _backward
            for_weight = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            grad, of_weight, of_bias = run(grad_normed, grad_stream, *ctx.saved_tensors, ctx.eps, for_weight)
            of_weight = of_weight if ctx.needs_input_grad[2] else None
            of_bias = of_bias if ctx.needs_input_grad[3] else None
        return grad, grad if ctx.has_residual else None, of_weight, of_bias, None, None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, AddNorm).apply

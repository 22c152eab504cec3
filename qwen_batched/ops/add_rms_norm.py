"""add_rms_norm and its derivative: the residual addition and the norm after it in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator, like
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route, wants_gradient


def add_rms_norm(update: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    way = route((update, residual), (weight,), has_backward=True)
    if way == REFERENCE:
        return reference.add_rms_norm(update, residual, weight, eps)
    if way == KERNEL:
        return _forward.kernel(update, residual, weight, eps)
    if way == OPERATOR:
        normed, stream = _forward.traced(update, residual, weight, eps)
        return normed, update if residual is None else stream
    if residual is not None and not wants_gradient(update, residual):
        update, residual = residual + update, None  # neither requires grad, so the stream is a constant
    apply = _apply if way == KERNEL_WITH_GRADIENT else AddRMSNorm.apply
    out = apply(update, residual, weight, eps, way == KERNEL_WITH_GRADIENT)
    return (out, update) if residual is None else out


def _without_alias(
    compute: Any, update: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """An operator's result must not be its input, as the stream is without a residual: then it is empty."""
    normed, stream = compute(update, residual, weight, eps)
    return normed, update.new_empty(0) if residual is None else stream


_forward = Operator(
    "add_rms_norm(Tensor update, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda update, residual, weight, eps: (
        like(update),
        update.new_empty(0) if residual is None else like(update),
    ),
    adapt=_without_alias,
)
_backward = Operator(
    "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_stream, Tensor stream, Tensor weight, float eps, "
    "bool for_weight) -> (Tensor, Tensor)",
    fake=lambda grad_normed, grad_stream, stream, weight, eps, for_weight: (
        like(stream),
        like(weight) if for_weight else weight.new_empty(0),
    ),
    file="add_rms_norm",
)


class AddRMSNorm(Function):
    """The normalised stream, and with a residual the stream. Keeps the stream, which the next layers keep anyway."""

    @staticmethod
    def forward(
        ctx: Any, update: Tensor, residual: Tensor | None, weight: Tensor, eps: float, is_direct: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        run = _forward.kernel if is_direct else _forward.traced
        normed, stream = run(update, residual, weight, eps)
        ctx.eps, ctx.has_residual = eps, residual is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(update if residual is None else stream, weight)
        return normed if residual is None else (normed, stream)

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_stream: Tensor | None = None) -> tuple[Tensor | None, ...]:
        grad, of_weight = grad_stream, None
        if grad_normed is not None:
            run = reference.add_rms_norm_backward if torch.is_grad_enabled() else _backward
            for_weight = ctx.needs_input_grad[2]
            grad, of_weight = run(grad_normed, grad_stream, *ctx.saved_tensors, ctx.eps, for_weight)
            of_weight = of_weight if for_weight else None
        return grad, grad if ctx.has_residual else None, of_weight, None, None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, AddRMSNorm).apply

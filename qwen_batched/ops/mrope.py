"""mrope and its derivative: packed projections, normalised and rotated, placed in the rows that attention works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route


def mrope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    rows: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """See `reference.mrope`."""
    way = route((qkv,), (q_norm, k_norm), has_backward=True)
    arguments = (qkv, cos, sin, num_kv_heads, slots, rows, q_norm, k_norm, eps)
    if way == REFERENCE:
        return reference.mrope(*arguments)
    if way == KERNEL:
        return _forward.kernel(*arguments)
    if way == OPERATOR:
        return _forward.traced(*arguments)
    if way == KERNEL_WITH_GRADIENT:
        return _apply(*arguments, True)
    return MRope.apply(*arguments, False)


_forward = Operator(
    "mrope(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, SymInt? rows, Tensor? q_norm, "
    "Tensor? k_norm, float eps) -> Tensor",
    fake=lambda qkv, cos, sin, num_kv_heads, slots, rows, q_norm, k_norm, eps: qkv.new_empty(
        qkv.shape[0] if slots is None else rows, qkv.shape[1]
    ),
)
_backward = Operator(
    "mrope_backward(Tensor grad, Tensor? qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, Tensor? q_norm, "
    "Tensor? k_norm, float eps, bool for_weight) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, qkv, cos, sin, num_kv_heads, slots, q_norm, k_norm, eps, for_weight: (
        grad.new_empty(grad.shape[0] if slots is None else slots.shape[0], grad.shape[1]),
        torch.empty_like(q_norm) if for_weight else grad.new_empty(0),
        torch.empty_like(k_norm) if for_weight else grad.new_empty(0),
    ),
    file="mrope",
)


class MRope(Function):
    """Keeps the projections only where they are normalised: a rotation's transpose is its inverse."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_kv_heads: int,
        slots: Tensor | None,
        rows: int | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        is_direct: bool,
    ) -> Tensor:
        ctx.num_kv_heads, ctx.eps = num_kv_heads, eps
        ctx.save_for_backward(None if q_norm is None else qkv, cos, sin, slots, q_norm, k_norm)
        run = _forward.kernel if is_direct else _forward.traced
        return run(qkv, cos, sin, num_kv_heads, slots, rows, q_norm, k_norm, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, slots, *norms = ctx.saved_tensors
        run = reference.mrope_backward if torch.is_grad_enabled() else _backward
        wanted = ctx.needs_input_grad[6:8]
        grad, *of_norms = run(grad, qkv, cos, sin, ctx.num_kv_heads, slots, *norms, ctx.eps, any(wanted))
        of_q_norm, of_k_norm = (found if wants else None for found, wants in zip(of_norms, wanted, strict=True))
        return grad, None, None, None, None, None, of_q_norm, of_k_norm, None, None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, MRope).apply

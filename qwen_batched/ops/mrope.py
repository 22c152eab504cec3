"""mrope and its derivative: rotary embedding of packed projections, placed in the rows that attention works on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, KERNEL_WITH_GRADIENT, OPERATOR, REFERENCE, route


def mrope(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, slots: Tensor | None = None, rows: int | None = None
) -> Tensor:
    """See `reference.mrope`."""
    way = route((qkv,), has_backward=True)
    if way == REFERENCE:
        return reference.mrope(qkv, cos, sin, num_kv_heads, slots, rows)
    if way == KERNEL:
        return _forward.kernel(qkv, cos, sin, num_kv_heads, slots, rows)
    if way == OPERATOR:
        return _forward.traced(qkv, cos, sin, num_kv_heads, slots, rows)
    if way == KERNEL_WITH_GRADIENT:
        return _apply(qkv, cos, sin, num_kv_heads, slots, rows, True)
    return MRope.apply(qkv, cos, sin, num_kv_heads, slots, rows, False)


_forward = Operator(
    "mrope(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, SymInt? rows) -> Tensor",
    fake=lambda qkv, cos, sin, num_kv_heads, slots, rows: qkv.new_empty(
        qkv.shape[0] if slots is None else rows, qkv.shape[1]
    ),
)


class MRope(Function):
    """A rotation's transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_kv_heads: int,
        slots: Tensor | None,
        rows: int | None,
        is_direct: bool,
    ) -> Tensor:
        ctx.num_kv_heads = num_kv_heads
        ctx.save_for_backward(cos, sin, slots)
        return (_forward.kernel if is_direct else _forward.traced)(qkv, cos, sin, num_kv_heads, slots, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, slots = ctx.saved_tensors
        grad = grad if slots is None else grad.index_select(0, slots)
        return mrope(grad, cos, -sin, ctx.num_kv_heads), None, None, None, None, None, None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, MRope).apply

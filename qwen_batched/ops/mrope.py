"""mrope and its derivative: rotary embedding of packed projections, placed in the rows that attention works on."""

from __future__ import annotations

from typing import Any

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
    inverse: bool = False,
) -> Tensor:
    """See `reference.mrope`."""
    way = route((qkv,), has_backward=True)
    if way == REFERENCE:
        return reference.mrope(qkv, cos, sin, num_kv_heads, slots, rows, inverse)
    if way == KERNEL:
        return _forward.kernel(qkv, cos, sin, num_kv_heads, slots, rows, inverse)
    if way == OPERATOR:
        return _forward.traced(qkv, cos, sin, num_kv_heads, slots, rows, inverse)
    if way == KERNEL_WITH_GRADIENT:
        return _apply(qkv, cos, sin, num_kv_heads, slots, rows, inverse, True)
    return MRope.apply(qkv, cos, sin, num_kv_heads, slots, rows, inverse, False)


_forward = Operator(
    "mrope(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? slots, SymInt? rows, bool inverse) -> Tensor",
    fake=lambda qkv, cos, sin, num_kv_heads, slots, rows, inverse: qkv.new_empty(
        qkv.shape[0] if slots is None else rows, qkv.shape[1]
    ),
)


class MRope(Function):
    """A rotation's transpose is its inverse."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_kv_heads: int,
        slots: Tensor | None,
        rows: int | None,
        inverse: bool,
        is_direct: bool,
    ) -> Tensor:
        ctx.num_kv_heads, ctx.inverse = num_kv_heads, inverse
        ctx.save_for_backward(cos, sin, slots)
        run = _forward.kernel if is_direct else _forward.traced
        return run(qkv, cos, sin, num_kv_heads, slots, rows, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, slots = ctx.saved_tensors
        grad = grad if slots is None else grad.index_select(0, slots)
        grad = mrope(grad, cos, sin, ctx.num_kv_heads, inverse=not ctx.inverse)
        return grad, None, None, None, None, None, None, None


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, MRope).apply

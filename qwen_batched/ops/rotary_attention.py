"""rotary_attention: rotary embedding and attention within windows or whole images."""

from __future__ import annotations

from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.mrope import mrope
from qwen_batched.ops.operator import Operator
from qwen_batched.ops.segments import Segments
from qwen_batched.runtime.fast_path import KERNEL, OPERATOR, REFERENCE, route


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`."""
    way = route((qkv,), has_backward=True)
    if way == REFERENCE:
        return reference.rotary_attention(qkv, cos, sin, segments, num_heads)
    if way == KERNEL:
        return _forward.kernel(qkv, cos, sin, segments, num_heads)
    if way == OPERATOR:
        return _forward.traced(qkv, cos, sin, segments.sizes, segments.table, num_heads)
    images, patches, _ = qkv.shape
    turned = mrope(qkv.flatten(0, 1), cos, sin, num_heads).view(images, patches, 3, num_heads, -1)
    return reference.segment_attention(*turned.unbind(2), segments)


_forward = Operator(
    "rotary_attention(Tensor qkv, Tensor cos, Tensor sin, SymInt[] runs, Tensor table, int num_heads) -> Tensor",
    fake=lambda qkv, cos, sin, runs, table, num_heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    adapt=lambda compute, qkv, cos, sin, runs, table, num_heads: compute(
        qkv, cos, sin, Segments.of_sizes(runs, table), num_heads
    ),
)

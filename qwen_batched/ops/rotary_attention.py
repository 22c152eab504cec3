"""rotary_attention: rotary embedding and attention within windows or whole images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.mrope import mrope
from qwen_batched.ops.operator import Operator
from qwen_batched.ops.segments import Run, Segments
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
    images, patches, width = qkv.shape
    turned = mrope(qkv.flatten(0, 1), cos, sin, num_heads).view(images, patches, width)
    # One run needs no slice, whose gradient is filled up with zeros; several are split at once.
    lengths = [run.count * run.length for run in segments.runs]
    parts = [turned] if len(lengths) == 1 else turned.split(lengths, dim=1)
    outs = [_attend(part, run, num_heads) for part, run in zip(parts, segments.runs, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend(qkv: Tensor, run: Run, num_heads: int) -> Tensor:
    """Attention within the equal segments of one run, as one dense batch: (I, tokens, 3 * D) to (I, tokens, D)."""
    heads = qkv.reshape(qkv.shape[0] * run.count, run.length, 3, num_heads, -1)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads.unbind(2)))
    return out.transpose(1, 2).reshape(qkv.shape[0], run.count * run.length, -1)


_forward = Operator(
    "rotary_attention(Tensor qkv, Tensor cos, Tensor sin, SymInt[] runs, Tensor table, int num_heads) -> Tensor",
    fake=lambda qkv, cos, sin, runs, table, num_heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    adapt=lambda compute, qkv, cos, sin, runs, table, num_heads: compute(
        qkv, cos, sin, Segments.of_sizes(runs, table), num_heads
    ),
)

"""inlined_rotary_attention: rotary_attention for ahead-of-time compilation, whose programs run without this package."""

from __future__ import annotations

import importlib

from torch import Tensor

from qwen_batched.ops.segments import Segments


def inlined_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`; attention within windows is a Triton kernel that AOTInductor inlines.

    AOTInductor fuses norms, activations and rotary embeddings by itself. For devices that have kernels, which who
    traces asks `runtime.backend.has_kernels` before, since tracing is under the reference. Without a gradient.
    """
    kernels = importlib.import_module("qwen_batched.ops.triton.inlined_rotary_attention")
    return kernels.inlined_rotary_attention(qkv, cos, sin, segments, num_heads)

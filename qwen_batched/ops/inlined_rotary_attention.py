"""inlined_rotary_attention: rotary_attention for ahead-of-time compilation, whose programs run without this package."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.segments import Segments


def inlined_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`; attention within windows is a Triton kernel that AOTInductor inlines.

    AOTInductor fuses norms, activations and rotary embeddings by itself. For CUDA devices, without a gradient; the
    reference where Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        return reference.rotary_attention(qkv, cos, sin, segments, num_heads)
    kernels = importlib.import_module("qwen_batched.ops.triton.inlined_rotary_attention")
    return kernels.inlined_rotary_attention(qkv, cos, sin, segments, num_heads)

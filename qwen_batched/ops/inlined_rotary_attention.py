"""inlined_rotary_attention: rotary_attention for programs that run without this package."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.segments import Segments


def inlined_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`. PyTorch's compiler takes the kernel for windows into what it compiles.

    Norms, activations and rotary embeddings it fuses by itself. For a GPU only, where there is Triton; has no gradient.
    """
    if importlib.util.find_spec("triton") is None:
        return reference.rotary_attention(qkv, cos, sin, segments, num_heads)
    kernels = importlib.import_module("qwen_batched.ops.triton.inlined_rotary_attention")
    return kernels.inlined_rotary_attention(qkv, cos, sin, segments, num_heads)

"""Every fused operation in plain PyTorch: the specification, and what runs where there is no kernel.

Arithmetic is in float32 (float64 for float64 inputs) and rounds to the input's dtype once, at the end.
"""

from qwen_batched.ops.reference.activations import gelu, quick_gelu, quick_gelu_backward, swiglu, swiglu_backward
from qwen_batched.ops.reference.attention import causal_attention, decode_attention, extend_attention, rotary_attention
from qwen_batched.ops.reference.choice import likeliest_token
from qwen_batched.ops.reference.frames import frames_to_patches, patchify
from qwen_batched.ops.reference.norms import add_norm, add_norm_backward
from qwen_batched.ops.reference.products import (
    add_low_rank,
    gelu_linear,
    linear,
    mixed_product,
    norm_linear,
    swiglu_linear,
)
from qwen_batched.ops.reference.prompts import NO_TOKEN, expand_prompts
from qwen_batched.ops.reference.rotation import mrope, mrope_backward, mrope_tables, rotate

__all__ = [
    "NO_TOKEN",
    "add_low_rank",
    "add_norm",
    "add_norm_backward",
    "causal_attention",
    "decode_attention",
    "expand_prompts",
    "extend_attention",
    "frames_to_patches",
    "gelu",
    "gelu_linear",
    "likeliest_token",
    "linear",
    "mixed_product",
    "mrope",
    "mrope_backward",
    "mrope_tables",
    "norm_linear",
    "patchify",
    "quick_gelu",
    "quick_gelu_backward",
    "rotary_attention",
    "rotate",
    "swiglu",
    "swiglu_backward",
    "swiglu_linear",
]

"""The one door to the fused operations.

What an operation computes, its arguments and their order are those of `reference`, the specification. On a GPU it runs
a Triton kernel, elsewhere the reference; under compilers and tracers it is a PyTorch operator `qwen_batched::<name>`.
Where a gradient is wanted, a kernel runs that has one for its backward too; else, for forward-mode derivatives and in
float64, it is the reference itself, which autograd sees through.
"""

from qwen_batched.ops.add_norm import add_norm
from qwen_batched.ops.causal_attention import causal_attention
from qwen_batched.ops.decode_attention import decode_attention
from qwen_batched.ops.expand_prompts import expand_prompts
from qwen_batched.ops.extend_attention import extend_attention
from qwen_batched.ops.frames_to_patches import frames_to_patches
from qwen_batched.ops.gelu_linear import gelu, gelu_linear
from qwen_batched.ops.inlined_rotary_attention import inlined_rotary_attention
from qwen_batched.ops.likeliest_token import likeliest_token
from qwen_batched.ops.linear import linear
from qwen_batched.ops.mrope import mrope
from qwen_batched.ops.norm_linear import norm_linear
from qwen_batched.ops.packed_linear import join_parameters, packed_linear
from qwen_batched.ops.quick_gelu import quick_gelu
from qwen_batched.ops.reference import NO_TOKEN, mrope_tables, patchify
from qwen_batched.ops.resize import PILLOW, TORCHVISION, check_resample_backend, pillow_matrices, round_pillow
from qwen_batched.ops.rotary_attention import rotary_attention
from qwen_batched.ops.swiglu import swiglu
from qwen_batched.ops.swiglu_linear import swiglu_linear
from qwen_batched.runtime.backend import backend, reading_ahead, use_backend

__all__ = [
    "NO_TOKEN",
    "PILLOW",
    "TORCHVISION",
    "add_norm",
    "backend",
    "causal_attention",
    "check_resample_backend",
    "decode_attention",
    "expand_prompts",
    "extend_attention",
    "frames_to_patches",
    "gelu",
    "gelu_linear",
    "inlined_rotary_attention",
    "join_parameters",
    "likeliest_token",
    "linear",
    "mrope",
    "mrope_tables",
    "norm_linear",
    "packed_linear",
    "patchify",
    "pillow_matrices",
    "quick_gelu",
    "reading_ahead",
    "rotary_attention",
    "round_pillow",
    "swiglu",
    "swiglu_linear",
    "use_backend",
]

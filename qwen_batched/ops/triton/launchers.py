"""Every Triton launcher under its operation's name."""

from qwen_batched.ops.triton.add_low_rank import add_low_rank
from qwen_batched.ops.triton.add_rms_norm import add_rms_norm, add_rms_norm_backward
from qwen_batched.ops.triton.decode_attention import decode_attention
from qwen_batched.ops.triton.expand_prompts import expand_prompts
from qwen_batched.ops.triton.frames_to_patches import frames_to_patches
from qwen_batched.ops.triton.mixed_product import mixed_product
from qwen_batched.ops.triton.mrope import mrope
from qwen_batched.ops.triton.one_row_linear import linear, swiglu_linear
from qwen_batched.ops.triton.rotary_attention import rotary_attention
from qwen_batched.ops.triton.swiglu import swiglu, swiglu_backward

__all__ = [
    "add_low_rank",
    "add_rms_norm",
    "add_rms_norm_backward",
    "decode_attention",
    "expand_prompts",
    "frames_to_patches",
    "linear",
    "mixed_product",
    "mrope",
    "rotary_attention",
    "swiglu",
    "swiglu_backward",
    "swiglu_linear",
]

"""Every Triton launcher under its operation's name."""

from qwen_batched.kernels.triton.add_rms_norm import add_rms_norm
from qwen_batched.kernels.triton.frames_to_patches import frames_to_patches
from qwen_batched.kernels.triton.rotary_attention import rotary_attention
from qwen_batched.kernels.triton.swiglu import swiglu

__all__ = ["add_rms_norm", "frames_to_patches", "rotary_attention", "swiglu"]

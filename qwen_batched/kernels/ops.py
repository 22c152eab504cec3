"""The one door to the fused operations. Each has its specification, and today its implementation, in `reference`."""

from qwen_batched.kernels.reference import (
    add_rms_norm,
    causal_attention,
    mrope,
    mrope_tables,
    patchify,
    resize,
    rotary_attention,
    swiglu,
)

__all__ = [
    "add_rms_norm",
    "causal_attention",
    "mrope",
    "mrope_tables",
    "patchify",
    "resize",
    "rotary_attention",
    "swiglu",
]

"""The window kernel as an operator that PyTorch's compiler looks into, and compiles with the rest of a program."""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op, wrap_triton

from qwen_batched.ops import reference
from qwen_batched.ops.segments import Segments
from qwen_batched.ops.triton.rotary_attention import MAX_HEAD, MAX_WINDOW, window_attention_kernel, window_launch


def inlined_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """(I, P, 3D) to (I, P, D): windows by the kernel, longer segments by PyTorch's operations."""
    longest = max([run.length for run in segments.runs])
    if longest > MAX_WINDOW or qkv.shape[-1] // 3 // num_heads > MAX_HEAD:
        return reference.rotary_attention(qkv, cos, sin, segments, num_heads)
    return window_attention(qkv, cos, sin, segments.table, longest, num_heads)


@triton_op("qwen_batched::window_attention", mutates_args=())
def window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, table: Tensor, longest: int, num_heads: int) -> Tensor:
    """Attention within the segments of `table`, of at most `longest` tokens."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    grid, numbers, constants = window_launch(qkv, table, longest, num_heads)
    # What is compiled ahead of time has no programmatic dependent launch.
    wrap_triton(window_attention_kernel)[grid](qkv, cos, sin, table, out, *numbers, **constants, USE_PDL=False)
    return out

"""Triton kernels inside a GPU's package: operators that PyTorch's compiler looks into, and compiles with the rest.

Norms, activations and rotary embeddings it fuses by itself; what it cannot is the attention within windows.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from qwen_batched.model.vision import VisionAttention
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Segments
from qwen_batched.ops.triton.rotary_attention import MAX_HEAD, MAX_WINDOW, window_attention_kernel, window_launch


@triton_op("qwen_batched::window_attention", mutates_args=())
def window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, table: Tensor, longest: int, num_heads: int) -> Tensor:
    """`reference.rotary_attention` within the segments of `table`, of at most `longest` tokens, by one kernel."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)
    grid, numbers, constants = window_launch(qkv, table, longest, num_heads)
    # A package has no programmatic dependent launch.
    wrap_triton(window_attention_kernel)[grid](qkv, cos, sin, table, out, *numbers, **constants, USE_PDL=False)
    return out


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """See `reference.rotary_attention`: windows by the kernel, longer segments by PyTorch's operations."""
    longest = max(run.length for run in segments.runs)
    if longest > MAX_WINDOW or qkv.shape[-1] // 3 // num_heads > MAX_HEAD:
        return reference.rotary_attention(qkv, cos, sin, segments, num_heads)
    return window_attention(qkv, cos, sin, segments.table, longest, num_heads)


def put_kernels_into(program: nn.Module) -> None:
    """Has the attention of a program's vision transformers run by `rotary_attention` from here on."""
    for module in program.modules():
        if isinstance(module, VisionAttention):
            module.attend = rotary_attention

"""Rotary embedding and attention within segments, from the packed qkv product. See `reference.rotary_attention`.

Windows: one program per window and head. A window of up to 64 tokens fits into one tile, so its softmax needs no loop.
A head of 80 is split into 64 + 16, where rounding up to 128 would waste 3/8 of the work. Longer segments go through
PyTorch's attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.causal_attention import fastest_attention
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.ops.triton.launch import launch, next_power_of_2, pdl_wait
from qwen_batched.ops.triton.rotary import rotary
from qwen_batched.ops.triton.rotation import angles, rotated

# A tile of 128 tokens in float32 takes minutes to compile with 2 warps; no published config has such windows.
MAX_WINDOW, MAX_HEAD = 64, 128
LOG2_E = math.log2(math.e)
# H200, bf16, 16 heads of 80, windows of 64: 16384 tokens with 2 warps 76 us, 8 warps 91 us, 1 warp 198 us (bytes alone
# 40 us). Several heads a program share the rotary tables and are slower (108 us and more). 4 or 8 warps make Triton 3.6
# use Hopper's wgmma, which faults or gives wrong results here (4: head 80; 8: head 96); 2 keep to the matrix
# instructions of every GPU.
WARPS = 2
# Float32 has no matrix instruction of its own precision; with 2 warps its unrolled products compile for 8 s.
WARPS_OF_FLOAT32 = 8


@triton.jit
def window_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    out_ptr,
    tokens_per_image,
    windows,
    SCALE: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    E_HIGH: tl.constexpr,
    E_LOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """A window and head, see above; `table` holds start and length of each window."""
    head = tl.program_id(0) % N
    window = (tl.program_id(0) // N) % windows
    image = (tl.program_id(0) // N // windows).to(tl.int64)
    start = tl.load(table_ptr + 2 * window)
    length = tl.load(table_ptr + 2 * window + 1)
    s = tl.arange(0, BLOCK_S)
    seen = s < length
    token = start + s
    D: tl.constexpr = N * E
    row = (image * tokens_per_image + token) * (3 * D) + head * E
    high = tl.arange(0, E_HIGH)
    cos, sin = angles(cos_ptr, sin_ptr, token, seen, high, E)
    if E_LOW > 0:
        low = E_HIGH + tl.arange(0, E_LOW)
        cos_low, sin_low = angles(cos_ptr, sin_ptr, token, seen, low, E)
    pdl_wait(USE_PDL)

    k = rotated(qkv_ptr + D, row, seen, high, cos, sin, E)
    q = rotated(qkv_ptr, row, seen, high, cos, sin, E)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if E_LOW > 0:
        k = rotated(qkv_ptr + D, row, seen, low, cos_low, sin_low, E)
        q = rotated(qkv_ptr, row, seen, low, cos_low, sin_low, E)
        scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(seen[None, :], scores * SCALE, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    total = tl.sum(weights, axis=1)[:, None]
    out_row = (image * tokens_per_image + token) * D + head * E
    for part in tl.static_range(2):
        if part == 0 or E_LOW > 0:
            e = tl.arange(0, E_HIGH) if part == 0 else E_HIGH + tl.arange(0, E_LOW)
            mask = seen[:, None] & (e < E)[None, :]
            v = tl.load(qkv_ptr + 2 * D + row[:, None] + e[None, :], mask=mask, other=0.0)
            out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / total
            tl.store(out_ptr + out_row[:, None] + e[None, :], out.to(v.dtype), mask=mask)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """(I, P, 3D) to (I, P, D): windows in one launch, longer segments through PyTorch's attention."""
    if qkv.numel() == 0:
        return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    qkv = qkv.contiguous()
    head_dim = qkv.shape[-1] // 3 // num_heads
    longest = max([run.length for run in segments.runs])
    if longest <= MAX_WINDOW and head_dim <= MAX_HEAD:
        return _window_attention(qkv, cos, sin, segments.table, longest, num_heads)
    qk = rotary(qkv, cos, sin, num_heads)
    q, k = qk.chunk(2, dim=-1)
    outs = [_attend_run(q, k, qkv[..., -qkv.shape[-1] // 3 :], run, num_heads) for run in segments.runs]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, table: Tensor, longest: int, num_heads: int) -> Tensor:
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    grid, numbers, constants = window_launch(qkv, table, longest, num_heads)
    launch(window_attention_kernel, grid, (qkv, cos, sin, table, out), numbers, **constants)
    return out


def window_launch(
    qkv: Tensor, table: Tensor, longest: int, num_heads: int
) -> tuple[tuple[int], tuple[int, int], dict[str, object]]:
    """Grid, numbers and constants of a launch of `window_attention_kernel`."""
    images, tokens, width = qkv.shape
    head_dim, windows, is_float32 = width // 3 // num_heads, table.shape[0], qkv.dtype == torch.float32
    high, low = _split(head_dim)
    constants = {
        "SCALE": head_dim**-0.5 * LOG2_E,  # exp2 is what the hardware has
        "N": num_heads,
        "E": head_dim,
        "E_HIGH": high,
        "E_LOW": low,
        "BLOCK_S": max(16, next_power_of_2(longest)),
        "PRECISION": "ieee" if is_float32 else "tf32",
        "num_warps": WARPS_OF_FLOAT32 if is_float32 else WARPS,
    }
    return (num_heads * windows * images,), (tokens, windows), constants


def _attend_run(q: Tensor, k: Tensor, v: Tensor, run: Run, num_heads: int) -> Tensor:
    """Attention within the equal segments of a run, as one dense batch."""
    images, _, dim = q.shape
    segmented = images, run.count, run.length, num_heads, dim // num_heads
    q, k, v = [
        x[:, run.start : run.stop].reshape(segmented).transpose(2, 3).flatten(0, 1) for x in (q, k, v)
    ]  # (I * run.count, N, S, E)
    out = fastest_attention(q, k, v).view(images, run.count, num_heads, run.length, -1).transpose(2, 3)
    return out.reshape(images, run.count * run.length, dim)


def _split(head_dim: int) -> tuple[int, int]:
    """The head as two powers of two of at least 16 (tensor cores' least), the second 0 where the first suffices."""
    padded = max(16, next_power_of_2(head_dim))
    high = padded if padded == head_dim or padded == 16 else padded // 2
    rest = head_dim - high
    return high, 0 if rest <= 0 else max(16, next_power_of_2(rest))

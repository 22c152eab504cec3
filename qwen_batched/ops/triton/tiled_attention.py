"""Rotary embedding and attention within segments of any length, in one launch, for few and short images.

A program serves one tile of a segment's queries in one head, and rotates the segment's keys anew. That is work done
twice, and less than the three launches of `rotary` and cuDNN's attention as long as there are few programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.segments import Segments
from qwen_batched.ops.triton.launch import cdiv, launch, pdl_launch_dependents, pdl_wait

BLOCK_Q, BLOCK_K, WARPS = 32, 64, 2
MAX_PROGRAMS, MAX_LENGTH = 528, 512
HEADS = (32, 64, 128)  # halves of a head are a matrix instruction's inner dimension
LOG2_E = math.log2(math.e)


@triton.jit
def _tiled_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    table_ptr,
    out_ptr,
    tokens_per_image,
    segments,
    tiles,
    scale,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % N
    segment = tl.program_id(0) // tiles // N % segments
    image = (tl.program_id(0) // tiles // N // segments).to(tl.int64)
    start = tl.load(table_ptr + 2 * segment)
    length = tl.load(table_ptr + 2 * segment + 1)
    D: tl.constexpr = N * E
    half: tl.constexpr = E // 2
    e = tl.arange(0, half)
    whole = tl.arange(0, E)
    base = image * tokens_per_image * (3 * D) + head * E
    place = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    asks = place < length
    pdl_wait(USE_PDL)
    first_q, second_q = _rotated(qkv_ptr, base, cos_ptr, sin_ptr, start + place, asks, e, half, 3 * D)
    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, E), tl.float32)
    for at in range(0, length, BLOCK_K):
        key = at + tl.arange(0, BLOCK_K)
        seen = key < length
        first_k, second_k = _rotated(qkv_ptr, base + D, cos_ptr, sin_ptr, start + key, seen, e, half, 3 * D)
        v_at = base + 2 * D + (start + key)[:, None] * (3 * D) + whole[None, :]
        v = tl.load(qkv_ptr + v_at, mask=seen[:, None], other=0.0)
        scores = tl.dot(first_q, tl.trans(first_k))
        scores = tl.dot(second_q, tl.trans(second_k), scores)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        maximum = higher
    out_at = (image * tokens_per_image + start + place)[:, None] * D + head * E + whole[None, :]
    out = out / total[:, None]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=asks[:, None])


@triton.jit
def _rotated(qkv_ptr, base, cos_ptr, sin_ptr, token, seen, e, half, stride):
    """The two halves of the queries or keys of `token`, rotated and rounded as the reference does."""
    mask = seen[:, None]
    angle = token[:, None] * half + e[None, :]
    at = base + token[:, None] * stride + e[None, :]
    x = tl.load(qkv_ptr + at, mask=mask, other=0.0)
    y = tl.load(qkv_ptr + at + half, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    first = x.to(tl.float32) * cos - y.to(tl.float32) * sin
    second = y.to(tl.float32) * cos + x.to(tl.float32) * sin
    return first.to(x.dtype), second.to(x.dtype)


def serves(qkv: Tensor, segments: Segments, num_heads: int) -> bool:
    """Whether this is faster than `rotary` and cuDNN's attention, and possible."""
    longest = max([run.length for run in segments.runs])
    programs = qkv.shape[0] * segments.table.shape[0] * num_heads * cdiv(longest, BLOCK_Q)
    return (
        programs <= MAX_PROGRAMS
        and longest <= MAX_LENGTH
        and qkv.shape[-1] // 3 // num_heads in HEADS
        and qkv.dtype in (torch.bfloat16, torch.float16)
    )


def tiled_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """(I, P, 3D), contiguous, to (I, P, D)."""
    images, tokens, width = qkv.shape
    dim, count = width // 3, segments.table.shape[0]
    tiles = cdiv(max([run.length for run in segments.runs]), BLOCK_Q)
    out = qkv.new_empty(images, tokens, dim)
    launch(
        _tiled_attention_kernel,
        (tiles * num_heads * count * images,),
        (qkv, cos, sin, segments.table, out),
        (tokens, count, tiles, (dim // num_heads) ** -0.5 * LOG2_E),  # exp2 is what the hardware has
        N=num_heads,
        E=dim // num_heads,
        BLOCK_Q=BLOCK_Q,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )
    return out

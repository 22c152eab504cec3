"""Rotary embedding of the queries and keys in the packed qkv product, for attention kernels that take them rotated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_wait

BLOCK, WARPS = 1024, 4


@triton.jit
def _rotary_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens_per_image,
    N: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    D: tl.constexpr = N * E
    half: tl.constexpr = E // 2
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # over the first halves of all queries, then of all keys
    mask = column < D
    first = (column // half) * E + column % half
    angle = (row % tokens_per_image) * half + column % half
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
    pdl_wait(USE_PDL)
    x = tl.load(qkv_ptr + row * 3 * D + first, mask=mask, other=0.0)
    y = tl.load(qkv_ptr + row * 3 * D + first + half, mask=mask, other=0.0)
    rotated_x = x.to(tl.float32) * cos - y.to(tl.float32) * sin
    rotated_y = y.to(tl.float32) * cos + x.to(tl.float32) * sin
    tl.store(out_ptr + row * 2 * D + first, rotated_x.to(x.dtype), mask=mask)
    tl.store(out_ptr + row * 2 * D + first + half, rotated_y.to(x.dtype), mask=mask)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """(I, P, 3D), contiguous, to the rotated queries and keys (I, P, 2D)."""
    images, tokens, width = qkv.shape
    dim = width // 3
    out = torch.empty(images, tokens, 2 * dim, dtype=qkv.dtype, device=qkv.device)
    block = min(BLOCK, next_power_of_2(dim))
    launch(
        _rotary_kernel,
        (images * tokens, cdiv(dim, block)),
        (qkv, cos, sin, out),
        (tokens,),
        N=num_heads,
        E=dim // num_heads,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out

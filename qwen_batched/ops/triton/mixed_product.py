"""A matrix of a half type times a thin one in float32, without a copy of the wide one. See `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_wait

# H200, bf16, 2784 tokens: of 11008 columns to rank 16 or back 35 us (bytes alone 13 us), of 2048 to rank 48 19 us; a
# copy in float32 and its product take 160 us and 43 us.
BLOCK_I, BLOCK_K, WARPS = 64, 64, 4
LEAST_RANK, MOST_RANK = 16, 64  # of a tile: the least that tensor cores take, and what fits beside the others
# There are few rows of tiles, so their sums are cut into parts until a GPU has enough to do; no part is shorter than
# this many blocks. Adding the parts is another launch: 512 programs are 5 us faster where it comes anyway.
PROGRAMS, LEAST_BLOCKS = 256, 4


@triton.jit
def _mixed_product_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    x_row_stride,
    x_column_stride,
    y_row_stride,
    y_column_stride,
    out_part_stride,
    out_row_stride,
    out_column_stride,
    I,
    K,
    chunk,
    scaling,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]
    part = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    pdl_wait(USE_PDL)
    total = tl.zeros((BLOCK_I, BLOCK_R), tl.float32)
    end = tl.minimum((part + 1) * chunk, K)
    for start in range(part * chunk, end, BLOCK_K):
        across = start + tl.arange(0, BLOCK_K)[None, :]
        down = start + tl.arange(0, BLOCK_K)[:, None]
        places = x_ptr + row * x_row_stride + across * x_column_stride
        x = tl.load(places, mask=(row < I) & (across < end), other=0.0)
        y = tl.load(y_ptr + down * y_row_stride + column * y_column_stride, mask=(down < end) & (column < R), other=0.0)
        # Three products of rounded parts, as near as one in float32.
        total += tl.dot(x.to(tl.float32), y, input_precision="tf32x3")
    places = out_ptr + part * out_part_stride + row * out_row_stride + column * out_column_stride
    tl.store(places, scaling * total, mask=(row < I) & (column < R))


def mixed_product(x: Tensor, y: Tensor, scaling: float, turned: bool) -> Tensor:
    """Launches the kernel, and adds the sums of its parts."""
    (rows, inner), rank = x.shape, y.shape[1]
    if rows * inner * rank == 0:
        return y.new_zeros((rank, rows) if turned else (rows, rank))
    tiles = cdiv(rows, BLOCK_I)
    parts = max(1, min(PROGRAMS // tiles, cdiv(inner, LEAST_BLOCKS * BLOCK_K)))
    chunk = cdiv(cdiv(inner, parts), BLOCK_K) * BLOCK_K
    parts = cdiv(inner, chunk)
    out = torch.empty((parts, rank, rows) if turned else (parts, rows, rank), dtype=torch.float32, device=x.device)
    part_stride, *strides = out.stride()
    block_r = min(max(LEAST_RANK, next_power_of_2(rank)), MOST_RANK)
    launch(
        _mixed_product_kernel,
        (tiles, parts, cdiv(rank, block_r)),
        (x, y, out),
        (
            *x.stride(),
            *y.stride(),
            part_stride,
            *(reversed(strides) if turned else strides),
            rows,
            inner,
            chunk,
            scaling,
        ),
        R=rank,
        BLOCK_R=block_r,
        BLOCK_I=BLOCK_I,
        BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )
    return out[0] if parts == 1 else out.sum(0)

"""A low-rank product added in place to a tensor of another dtype, without a copy of either. See `reference`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_wait

# H200, bf16, 2784 tokens: 11008 columns of rank 16 take 49 us (bytes alone 26 us), 2048 of rank 48 take 20 us; in tiles
# of 64 rows 68 us and 40 us.
BLOCK_T, BLOCK_F, WARPS = 32, 128, 4
LEAST_RANK, MOST_RANK = 16, 64  # of a tile: the least that tensor cores take, and what fits beside the others


@triton.jit
def _add_low_rank_kernel(
    out_ptr,
    low_ptr,
    factor_ptr,
    out_stride,
    low_stride,
    factor_row_stride,
    factor_column_stride,
    T,
    F,
    scaling,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    rank = tl.arange(0, BLOCK_R)
    pdl_wait(USE_PDL)
    product = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for start in range(0, R, BLOCK_R):
        across, down = start + rank[None, :], start + rank[:, None]
        low = tl.load(low_ptr + row * low_stride + across, mask=(row < T) & (across < R), other=0.0)
        places = factor_ptr + down * factor_row_stride + column * factor_column_stride
        factor = tl.load(places, mask=(down < R) & (column < F), other=0.0)
        # Three products of rounded parts, as near as one in float32.
        product += tl.dot(low.to(tl.float32), factor.to(tl.float32), input_precision="tf32x3")
    inside = (row < T) & (column < F)
    out = tl.load(out_ptr + row * out_stride + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + column, (out.to(tl.float32) + scaling * product).to(out.dtype), mask=inside)


def add_low_rank(out: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """Launches the kernel. Rows of `out` lie at one stride."""
    (T, F), rank = out.shape, low.shape[1]
    if out.numel() == 0:
        return
    low = low if low.stride(1) == 1 else low.contiguous()
    launch(
        _add_low_rank_kernel,
        (cdiv(T, BLOCK_T), cdiv(F, BLOCK_F)),
        (out, low, factor),
        (out.stride(0), low.stride(0), *factor.stride(), T, F, scaling),
        R=rank,
        BLOCK_R=min(max(LEAST_RANK, next_power_of_2(rank)), MOST_RANK),
        BLOCK_T=BLOCK_T,
        BLOCK_F=BLOCK_F,
        num_warps=WARPS,
    )

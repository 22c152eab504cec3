"""A low-rank product added in place to a tensor of another dtype, without a copy of either. See `reference`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.kernels.triton.launch import launch_options, wait_for_inputs

BLOCK_T, BLOCK_F, WARPS = 64, 128, 4
LEAST_RANK, MOST_RANK = 16, 128  # of a tile: the least that tensor cores take, and what fits beside the others


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
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    rank = tl.arange(0, BLOCK_R)
    wait_for_inputs(EARLY)
    low = tl.load(low_ptr + row * low_stride + rank[None, :], mask=(row < T) & (rank[None, :] < R), other=0.0)
    places = factor_ptr + rank[:, None] * factor_row_stride + column * factor_column_stride
    factor = tl.load(places, mask=(rank[:, None] < R) & (column < F), other=0.0)
    # Three products of rounded parts, as near as one in float32.
    product = tl.dot(low.to(tl.float32), factor.to(tl.float32), input_precision="tf32x3")
    inside = (row < T) & (column < F)
    out = tl.load(out_ptr + row * out_stride + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + column, (out.to(tl.float32) + scaling * product).to(out.dtype), mask=inside)


def add_low_rank(out: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """Launches the kernel; more than `MOST_RANK` are added by parts. Rows of `out` lie at one stride."""
    (T, F), rank = out.shape, low.shape[1]
    if out.numel() == 0:
        return
    low = low if low.stride(1) == 1 else low.contiguous()
    for start in range(0, rank, MOST_RANK):
        count = min(MOST_RANK, rank - start)
        _add_low_rank_kernel[(triton.cdiv(T, BLOCK_T), triton.cdiv(F, BLOCK_F))](
            out,
            low[:, start:],
            factor[start:],
            out.stride(0),
            low.stride(0),
            factor.stride(0),
            factor.stride(1),
            T,
            F,
            scaling,
            R=count,
            BLOCK_R=max(LEAST_RANK, triton.next_power_of_2(count)),
            BLOCK_T=BLOCK_T,
            BLOCK_F=BLOCK_F,
            num_warps=WARPS,
            **launch_options(out.device),
        )

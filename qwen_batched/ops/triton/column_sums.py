"""column_sums: each program sums a few columns over many rows, so that the order of additions is always the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, pdl_launch_dependents, pdl_wait

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 256, 32, 8
# More are summed in parts first.
ROWS_OF_A_PROGRAM = 4096


@triton.jit
def _column_sums_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    stride,
    PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    part = tl.program_id(1).to(tl.int64)
    row = part * PART + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < columns
    end = tl.minimum((part + 1) * PART, rows)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    pdl_wait(USE_PDL)
    for start in range(0, PART, BLOCK_R):
        here = row + start
        x = tl.load(
            x_ptr + here[:, None] * stride + column[None, :], mask=(here < end)[:, None] & mask[None, :], other=0.0
        )
        sums += x.to(tl.float32)
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + part * columns + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, C) to (C,) in `dtype`; R is at least 1."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    parts = cdiv(rows, ROWS_OF_A_PROGRAM)
    is_last = parts == 1
    out = x.new_empty((columns,) if is_last else (parts, columns), dtype=dtype if is_last else torch.float32)
    launch(
        _column_sums_kernel,
        (cdiv(columns, BLOCK_COLUMNS), parts),
        (x, out),
        (rows, columns, x.stride(0)),
        PART=min(ROWS_OF_A_PROGRAM, cdiv(rows, BLOCK_ROWS) * BLOCK_ROWS),
        BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_COLUMNS,
        num_warps=WARPS,
    )
    return out if is_last else column_sums(out, dtype)

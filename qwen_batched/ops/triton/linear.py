"""Linear layers of a single row, at the speed of memory: each weight is read once, and used at once.

See `reference.linear` and `reference.swiglu_linear`. In a graph the first weights are on their way before the row is
there (see `backend.reading_ahead`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import begin, cdiv, launch, next_power_of_2, pdl_wait
from qwen_batched.runtime.backend import reads_ahead

# H200, bf16, the products of 36 decoder blocks of the 3B model in a CUDA graph, norms between them: 1.60 ms, cuBLAS
# 2.12 ms (bytes alone 1.32 ms). Without reading ahead 1.72 ms. With two rows cuBLAS is as fast, with four much faster.
# Up to which D: columns of a program, how much of a weight's row it takes at once, and warps. H200, rows of 2560, 4096
# and 9728: 8.8, 6.0 and 13.7 us by the second, 9.3, 7.2 and 15.3 us by the first (bytes alone 7.5, 5.0 and 11.9 us).
BLOCKS = {2048: (4, 1024, 4), 10240: (4, 2048, 8)}
BLOCKS_OF_LONGER, BLOCKS_OF_GATED = (2, 2048, 4), (2, 1024, 4)


@triton.jit(do_not_specialize=["ahead"])
def _one_row_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    up_bias_ptr,
    out_ptr,
    width,
    ahead,
    D: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    begin(ahead, USE_PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < width
    weight_at = weight_ptr + n[:, None].to(tl.int64) * D + k[None, :]
    up_at = weight_ptr + (width + n)[:, None].to(tl.int64) * D + k[None, :]
    mask = inside[:, None] & (k < D)[None, :]
    weight = tl.load(weight_at, mask=mask, other=0.0)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up = tl.load(up_at, mask=mask, other=0.0)
        up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    pdl_wait(USE_PDL)
    for at in range(0, D, BLOCK_K):
        x = tl.load(x_ptr + at + k, mask=at + k < D, other=0.0).to(tl.float32)[None, :]
        sums += x * weight.to(tl.float32)
        mask = inside[:, None] & (at + BLOCK_K + k < D)[None, :]
        weight = tl.load(weight_at + at + BLOCK_K, mask=mask, other=0.0)
        if GATED:
            up_sums += x * up.to(tl.float32)
            up = tl.load(up_at + at + BLOCK_K, mask=mask, other=0.0)
    y = tl.sum(sums, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        factor = tl.sum(up_sums, axis=1)
        if HAS_BIAS:
            factor += tl.load(up_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * factor
    tl.store(out_ptr + n, y.to(weight.dtype), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(1, D) to (1, F), with `weight` (F, D)."""
    blocks = next((blocks for most, blocks in BLOCKS.items() if x.shape[-1] <= most), BLOCKS_OF_LONGER)
    return _one_row(x, weight, bias, None, weight.shape[0], *blocks)


def swiglu_linear(x: Tensor, gate_up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor:
    """(1, D) to (1, F), with `gate_up` (2F, D)."""
    return _one_row(x, gate_up, gate_bias, up_bias, gate_up.shape[0] // 2, *BLOCKS_OF_GATED, gated=True)


def _one_row(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up_bias: Tensor | None,
    width: int,
    block_n: int,
    block_k: int,
    warps: int,
    gated: bool = False,
) -> Tensor:
    dim = x.shape[-1]
    out = x.new_empty(1, width)
    if width == 0:
        return out
    biases = [weight if each is None else each.contiguous() for each in (bias, up_bias)]
    is_copy = not weight.is_contiguous()  # made just now: not to be read ahead
    launch(
        _one_row_linear_kernel,
        (cdiv(width, block_n),),
        (x.contiguous(), weight.contiguous(), *biases, out),
        (width, int(reads_ahead() and not is_copy)),
        D=dim,
        GATED=gated,
        HAS_BIAS=bias is not None,
        BLOCK_N=block_n,
        BLOCK_K=min(block_k, next_power_of_2(dim)),
        num_warps=warps,
    )
    return out

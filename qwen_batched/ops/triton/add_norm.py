"""add_norm and its gradient: one pass over the token array where PyTorch makes five. See `reference`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.column_sums import column_sums
from qwen_batched.ops.triton.launch import begin, launch, next_power_of_2, pdl_wait
from qwen_batched.runtime.backend import reads_ahead

# H200, bf16, width 1280: 16384 rows 45 us (bytes alone 40 us); 65536 rows 164 us (160 us). One to four rows a program
# and 1 to 8 warps are within 3% of each other.
WARPS, WARPS_OF_WIDE_ROWS = 4, 8
# Of the gradient: each sums up the weight's gradient over many rows before the sums are added.
PROGRAMS = 512


@triton.jit(do_not_specialize=["ahead"])
def _add_norm_kernel(
    update_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    stream_ptr,
    eps,
    ahead,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    begin(ahead, USE_PDL)
    offsets = tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_D)
    mask = column < D
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    pdl_wait(USE_PDL)
    stream = tl.load(update_ptr + offsets, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        # Rounded to the stream's dtype before the norm sees it, as the reference does.
        stream = (residual.to(tl.float32) + stream.to(tl.float32)).to(stream.dtype)
        tl.store(stream_ptr + offsets, stream, mask=mask)
    x = stream.to(tl.float32)
    if HAS_BIAS:
        x = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    normed = x * scale * weight
    if HAS_BIAS:
        normed += bias
    tl.store(normed_ptr + offsets, normed.to(stream.dtype), mask=mask)


def add_norm(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Without `residual` the stream returned is `update` itself."""
    dim = update.shape[-1]
    update = update.contiguous()
    normed = torch.empty_like(update)
    stream = update if residual is None else torch.empty_like(update)
    if update.numel() == 0:
        return normed, stream
    block = next_power_of_2(dim)
    launch(
        _add_norm_kernel,
        (update.numel() // dim,),
        (
            update,
            update if residual is None else residual.contiguous(),
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            normed,
            stream,
        ),
        (eps, int(reads_ahead() and weight.is_contiguous() and (bias is None or bias.is_contiguous()))),
        D=dim,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        BLOCK_D=block,
        num_warps=WARPS if block <= 2048 else WARPS_OF_WIDE_ROWS,
    )
    return normed, stream


@triton.jit
def _add_norm_backward_kernel(
    grad_normed_ptr,
    grad_stream_ptr,
    stream_ptr,
    weight_ptr,
    grad_ptr,
    sums_ptr,
    rows,
    eps,
    D: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    column = tl.arange(0, BLOCK_D)
    mask = column < D
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    bias_sums = tl.zeros((BLOCK_D,), tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        offsets = row * D + column
        stream = tl.load(stream_ptr + offsets, mask=mask, other=0.0)
        grad = tl.load(grad_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = stream.to(tl.float32)
        if HAS_BIAS:
            x = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        unit, scaled = x * scale, grad * weight
        out = scaled - unit * (tl.sum(scaled * unit, axis=0) / D)
        if HAS_BIAS:
            out -= tl.sum(scaled, axis=0) / D
            bias_sums += grad
        out = scale * out
        if HAS_STREAM:
            out += tl.load(grad_stream_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offsets, out.to(stream.dtype), mask=mask)
        sums += grad * unit
        row += tl.num_programs(0)
    if FOR_WEIGHT:
        at = sums_ptr + tl.program_id(0) * D * (1 + HAS_BIAS) + column
        tl.store(at, sums, mask=mask)
        if HAS_BIAS:
            tl.store(at + D, bias_sums, mask=mask)


def add_norm_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel, and adds the sums of its programs."""
    dim, wanted = stream.shape[-1], [x for x in (weight, bias) if for_weight and x is not None]
    stream = stream.contiguous()
    grad = torch.empty_like(stream)
    rows = stream.numel() // dim
    if rows == 0:
        of_weights = [*map(torch.zeros_like, wanted)]
    else:
        programs = min(rows, PROGRAMS)
        sums = torch.empty(programs, len(wanted), dim, dtype=torch.float32, device=stream.device)
        block = next_power_of_2(dim)
        launch(
            _add_norm_backward_kernel,
            (programs,),
            (
                grad_normed.contiguous(),
                stream if grad_stream is None else grad_stream.contiguous(),
                stream,
                weight.contiguous(),
                grad,
                sums,
            ),
            (rows, eps),
            D=dim,
            HAS_STREAM=grad_stream is not None,
            HAS_BIAS=bias is not None,
            FOR_WEIGHT=for_weight,
            BLOCK_D=block,
            num_warps=WARPS if block <= 2048 else WARPS_OF_WIDE_ROWS,
        )
        of_weights = [column_sums(sums[:, i], x.dtype) for i, x in enumerate(wanted)]
    return grad, *of_weights, *(weight.new_empty(0) for _ in range(2 - len(wanted)))

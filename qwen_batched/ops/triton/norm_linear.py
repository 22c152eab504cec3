"""A norm and the linear layers behind it for a single row, in one launch. See `reference.norm_linear`.

Every program adds and normalises the whole row, which stays in registers, and takes its share of the weights' rows. In
a graph the first weights are on their way before the row is there (see `backend.reading_ahead`).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import begin, cdiv, launch, next_power_of_2, pdl_wait
from qwen_batched.runtime.backend import reads_ahead

# Rows of weights at once, programs for each of the GPU's processors, and warps. H200, bf16, 36 blocks of the 3B model
# behind 241 tokens in a CUDA graph: 1.71 ms, unfused 1.773 ms. With only the qkv product fused (2560 rows): FEW 1.713
# ms, a single pass of each program over its rows, MANY 1.759 ms. 16 blocks of Qwen3-VL-2B (4096 rows): FEW 0.589 ms,
# MANY 0.568 ms, unfused 0.583 ms.
FEW, MANY, GATED = (4, 5, 4), (4, 4, 8), (2, 4, 8)


@triton.jit(do_not_specialize=["width", "ahead"])
def _norm_linear_kernel(
    update_ptr,
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stream_ptr,
    width,
    eps,
    ahead,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    begin(ahead, USE_PDL)
    first = tl.program_id(0) * BLOCK_N
    step = tl.num_programs(0) * BLOCK_N
    d = tl.arange(0, BLOCK_D)
    mask_d = d < D
    n = first + tl.arange(0, BLOCK_N)
    mask = (n < width)[:, None] & mask_d[None, :]
    weight_at = weight_ptr + n[:, None].to(tl.int64) * D + d[None, :]
    weight = tl.load(weight_at, mask=mask, other=0.0)
    up_at = weight_at + width.to(tl.int64) * D
    if IS_GATED:
        up = tl.load(up_at, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + d, mask=mask_d, other=0.0).to(tl.float32)
    pdl_wait(USE_PDL)
    stream = tl.load(update_ptr + d, mask=mask_d, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + d, mask=mask_d, other=0.0)
        # Rounded where the reference rounds: the sum to the stream's dtype, then what is normalised.
        stream = (residual.to(tl.float32) + stream.to(tl.float32)).to(stream.dtype)
    tl.store(stream_ptr + d, stream, mask=mask_d & (tl.program_id(0) == 0))
    x = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    x = (x * scale * norm).to(stream.dtype).to(tl.float32)[None, :]
    for at in range(first, width, step):
        n = at + tl.arange(0, BLOCK_N)
        inside = n < width
        mask = (n + step < width)[:, None] & mask_d[None, :]
        weight_at += step.to(tl.int64) * D
        next_weight = tl.load(weight_at, mask=mask, other=0.0)
        if IS_GATED:
            up_at += step.to(tl.int64) * D
            next_up = tl.load(up_at, mask=mask, other=0.0)
        y = tl.sum(x * weight.to(tl.float32), axis=1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if IS_GATED:
            y = y / (1.0 + tl.exp(-y)) * tl.sum(x * up.to(tl.float32), axis=1)
            up = next_up
        tl.store(out_ptr + n, y.to(stream.dtype), mask=inside)
        weight = next_weight


def norm_linear(
    update: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    is_gated: bool,
) -> tuple[Tensor, Tensor]:
    """(1, D) to (1, F) and the stream (1, D), with `weight` (F, D), or (2F, D) where the layers are a gate."""
    dim, width = update.shape[-1], weight.shape[0] // (2 if is_gated else 1)
    out, stream = update.new_empty(1, width), torch.empty_like(update, memory_format=torch.contiguous_format)
    block_n, for_each, warps = _blocks(width, is_gated, update.device)
    programs = max(1, min(cdiv(width, block_n), for_each * _processors(update.device)))
    is_copy = not (weight.is_contiguous() and norm.is_contiguous())  # made just now: not to be read ahead
    launch(
        _norm_linear_kernel,
        (programs,),
        (
            update.contiguous(),
            update if residual is None else residual.contiguous(),
            norm.contiguous(),
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            out,
            stream,
        ),
        (width, eps, int(reads_ahead() and not is_copy)),
        D=dim,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        BLOCK_N=block_n,
        BLOCK_D=next_power_of_2(dim),
        num_warps=warps,
    )
    return out, stream


def _blocks(width: int, is_gated: bool, device: torch.device) -> tuple[int, int, int]:
    if is_gated:
        return GATED
    return FEW if cdiv(width, FEW[0]) <= FEW[1] * _processors(device) else MANY


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2

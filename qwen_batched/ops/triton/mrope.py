"""mrope and its gradient: queries and keys, normalised and rotated, and values, to where attention wants them.

See `reference.mrope`. A program serves some heads of a token, as two tiles: the first halves and the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.column_sums import column_sums
from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_launch_dependents, pdl_wait

BLOCK, WARPS = 512, 4
# Of the gradient of norms: each sums up over many tokens before the sums are added.
PROGRAMS = 512


@triton.jit
def _mrope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    period,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = E // 2
    width: tl.constexpr = (N + 2 * K) * E
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    mask_e = e < half
    mask = (head < N + 2 * K)[:, None] & mask_e[None, :]
    turns = (head < N + K)[:, None]  # the values, behind the keys, do not
    at = head[:, None] * E + e[None, :]
    pdl_wait(USE_PDL)
    x = tl.load(qkv_ptr + token * width + at, mask=mask, other=0.0)
    y = tl.load(qkv_ptr + token * width + at + half, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + token % period * half + e, mask=mask_e, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token % period * half + e, mask=mask_e, other=0.0)[None, :]
    first, second = x.to(tl.float32), y.to(tl.float32)
    if HAS_NORM:
        is_query = (head < N)[:, None]
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / E + eps)[:, None]
        first *= scale * _weights(q_norm_ptr, k_norm_ptr, e, mask_e, is_query)
        second *= scale * _weights(q_norm_ptr, k_norm_ptr, e + half, mask_e, is_query)
    row = tl.load(slots_ptr + token) if HAS_SLOTS else token
    turned_x = (first * cos - second * sin).to(x.dtype)
    turned_y = (second * cos + first * sin).to(x.dtype)
    tl.store(out_ptr + row * width + at, tl.where(turns, turned_x, x), mask=mask)
    tl.store(out_ptr + row * width + at + half, tl.where(turns, turned_y, y), mask=mask)


@triton.jit
def _weights(q_norm_ptr, k_norm_ptr, e, mask_e, is_query):
    """The norm's weight of each head: of queries or of keys."""
    of_q = tl.load(q_norm_ptr + e, mask=mask_e, other=0.0).to(tl.float32)
    of_k = tl.load(k_norm_ptr + e, mask=mask_e, other=0.0).to(tl.float32)
    return tl.where(is_query, of_q[None, :], of_k[None, :])


def mrope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    rows: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """(T, (N + 2K) * E) to (rows, (N + 2K) * E)."""
    qkv = qkv.contiguous()
    tokens, width = qkv.shape
    # Attention multiplies what it does not see by 0, which garbage might survive.
    out = qkv.new_empty(tokens, width) if slots is None else qkv.new_zeros(rows, width)
    if tokens == 0:
        return out
    heads, sizes = _sizes(width, cos, num_kv_heads)
    launch(
        _mrope_kernel,
        (tokens, cdiv(heads, sizes["BLOCK_H"])),
        (
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            qkv if slots is None else slots.contiguous(),
            qkv if q_norm is None else q_norm.contiguous(),
            qkv if k_norm is None else k_norm.contiguous(),
            out,
        ),
        (cos.shape[0], eps),
        HAS_SLOTS=slots is not None,
        HAS_NORM=q_norm is not None,
        **sizes,
        num_warps=WARPS,
    )
    return out


def _sizes(width: int, cos: Tensor, num_kv_heads: int) -> tuple[int, dict[str, int]]:
    """How many heads a token has, and the constants of the kernels."""
    head_dim = 2 * cos.shape[-1]
    heads, block_e = width // head_dim, next_power_of_2(head_dim // 2)
    block_h = min(max(BLOCK // block_e, 1), next_power_of_2(heads))
    return heads, {
        "N": heads - 2 * num_kv_heads,
        "K": num_kv_heads,
        "E": head_dim,
        "BLOCK_H": block_h,
        "BLOCK_E": block_e,
    }


@triton.jit
def _mrope_backward_kernel(
    grad_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    sums_ptr,
    tokens,
    period,
    eps,
    HAS_SLOTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    half: tl.constexpr = E // 2
    width: tl.constexpr = (N + 2 * K) * E
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    e = tl.arange(0, BLOCK_E)
    mask_e = e < half
    mask = (head < N + 2 * K)[:, None] & mask_e[None, :]
    turns, is_query = (head < N + K)[:, None], (head < N)[:, None]
    at = head[:, None] * E + e[None, :]
    if HAS_NORM:
        first_weight = _weights(q_norm_ptr, k_norm_ptr, e, mask_e, is_query)
        second_weight = _weights(q_norm_ptr, k_norm_ptr, e + half, mask_e, is_query)
    first_sums = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    second_sums = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    token = tl.program_id(0).to(tl.int64)
    while token < tokens:
        row = tl.load(slots_ptr + token) if HAS_SLOTS else token
        x = tl.load(grad_ptr + row * width + at, mask=mask, other=0.0)
        y = tl.load(grad_ptr + row * width + at + half, mask=mask, other=0.0)
        cos = tl.load(cos_ptr + token % period * half + e, mask=mask_e, other=0.0)[None, :]
        sin = tl.load(sin_ptr + token % period * half + e, mask=mask_e, other=0.0)[None, :]
        first = x.to(tl.float32) * cos + y.to(tl.float32) * sin
        second = y.to(tl.float32) * cos - x.to(tl.float32) * sin
        if HAS_NORM:
            first_unit = tl.load(qkv_ptr + token * width + at, mask=mask, other=0.0).to(tl.float32)
            second_unit = tl.load(qkv_ptr + token * width + at + half, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(first_unit * first_unit, axis=1) + tl.sum(second_unit * second_unit, axis=1)
            scale = tl.rsqrt(squares / E + eps)[:, None]
            first_unit *= scale
            second_unit *= scale
            first_sums += first * first_unit
            second_sums += second * second_unit
            first *= first_weight
            second *= second_weight
            mean = ((tl.sum(first * first_unit, axis=1) + tl.sum(second * second_unit, axis=1)) / E)[:, None]
            first = scale * (first - first_unit * mean)
            second = scale * (second - second_unit * mean)
        tl.store(out_ptr + token * width + at, tl.where(turns, first.to(x.dtype), x), mask=mask)
        tl.store(out_ptr + token * width + at + half, tl.where(turns, second.to(x.dtype), y), mask=mask)
        token += tl.num_programs(0)
    if FOR_WEIGHT:
        is_key = turns & (head >= N)[:, None]
        sums_at = sums_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * E + e
        tl.store(sums_at, tl.sum(tl.where(is_query, first_sums, 0.0), axis=0), mask=mask_e)
        tl.store(sums_at + half, tl.sum(tl.where(is_query, second_sums, 0.0), axis=0), mask=mask_e)
        tl.store(sums_at + E, tl.sum(tl.where(is_key, first_sums, 0.0), axis=0), mask=mask_e)
        tl.store(sums_at + E + half, tl.sum(tl.where(is_key, second_sums, 0.0), axis=0), mask=mask_e)


def mrope_backward(
    grad: Tensor,
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    for_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, (N + 2K) * E) to (T, (N + 2K) * E), and the sums of the programs to (E,) each."""
    grad = grad.contiguous()
    tokens, width = (grad if slots is None else slots).shape[0], grad.shape[1]
    out = grad.new_empty(tokens, width)
    norms = [x for x in (q_norm, k_norm) if for_weight and x is not None]
    if tokens == 0:
        of_norms = [*map(torch.zeros_like, norms)]
    else:
        heads, sizes = _sizes(width, cos, num_kv_heads)
        grid = (min(tokens, PROGRAMS) if norms else tokens, cdiv(heads, sizes["BLOCK_H"]))
        sums = grad.new_empty(grid[0] * grid[1], 2, sizes["E"] if norms else 0, dtype=torch.float32)
        launch(
            _mrope_backward_kernel,
            grid,
            (
                grad,
                grad if qkv is None else qkv.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                grad if slots is None else slots.contiguous(),
                grad if q_norm is None else q_norm.contiguous(),
                grad if k_norm is None else k_norm.contiguous(),
                out,
                sums,
            ),
            (tokens, cos.shape[0], eps),
            HAS_SLOTS=slots is not None,
            HAS_NORM=q_norm is not None,
            FOR_WEIGHT=bool(norms),
            **sizes,
            num_warps=WARPS,
        )
        of_norms = [column_sums(sums[:, i], x.dtype) for i, x in enumerate(norms)]
    return out, *of_norms, *(grad.new_empty(0) for _ in range(2 - len(norms)))

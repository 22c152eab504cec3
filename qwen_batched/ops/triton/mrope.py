"""mrope: rotated queries and keys, and values, from the packed qkv product to where attention wants them.

See `reference.mrope`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_launch_dependents, pdl_wait

BLOCK, WARPS = 512, 4


@triton.jit
def _mrope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    out_ptr,
    period,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    E: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = E // 2
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # over the first halves of all heads
    mask = column < WIDTH // 2
    first = column // half * E + column % half
    turns = mask & (first < ROTATED)
    pdl_wait(USE_PDL)
    x = tl.load(qkv_ptr + token * WIDTH + first, mask=mask, other=0.0)
    y = tl.load(qkv_ptr + token * WIDTH + first + half, mask=mask, other=0.0)
    # The values, behind the keys, are turned by nothing.
    angle = token % period * half + column % half
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    sin = -sin if INVERSE else sin
    row = tl.load(slots_ptr + token) if HAS_SLOTS else token
    rotated_x = x.to(tl.float32) * cos - y.to(tl.float32) * sin
    rotated_y = y.to(tl.float32) * cos + x.to(tl.float32) * sin
    tl.store(out_ptr + row * WIDTH + first, rotated_x.to(x.dtype), mask=mask)
    tl.store(out_ptr + row * WIDTH + first + half, rotated_y.to(x.dtype), mask=mask)


def mrope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    slots: Tensor | None = None,
    rows: int | None = None,
    inverse: bool = False,
) -> Tensor:
    """(T, (N + 2K) * E) to (rows, (N + 2K) * E)."""
    qkv = qkv.contiguous()
    tokens, width = qkv.shape
    head_dim = 2 * cos.shape[-1]
    # Attention multiplies what it does not see by 0, which garbage might survive.
    out = qkv.new_empty(tokens, width) if slots is None else qkv.new_zeros(rows, width)
    if tokens == 0:
        return out
    block = min(BLOCK, next_power_of_2(width // 2))
    launch(
        _mrope_kernel,
        (tokens, cdiv(width // 2, block)),
        (qkv, cos.contiguous(), sin.contiguous(), qkv if slots is None else slots.contiguous(), out),
        (cos.shape[0],),
        WIDTH=width,
        ROTATED=width - num_kv_heads * head_dim,
        E=head_dim,
        HAS_SLOTS=slots is not None,
        INVERSE=inverse,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out

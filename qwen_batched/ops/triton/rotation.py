"""Rotary embedding inside an attention kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def angles(cos_ptr, sin_ptr, token, seen, e, E: tl.constexpr):
    """Cosine and signed sine for columns `e`: rotated[e] = x[e] * cos + x[partner of e] * sin."""
    half: tl.constexpr = E // 2
    mask = seen[:, None] & (e < E)[None, :]
    index = token[:, None] * half + tl.where(e < half, e, e - half)[None, :]
    cos = tl.load(cos_ptr + index, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + index, mask=mask, other=0.0)
    return cos, tl.where(e < half, -1.0, 1.0)[None, :] * sin


@triton.jit
def rotated(
    base_ptr,
    row,
    seen,
    e,
    cos,
    sin,
    E: tl.constexpr,
    norm_ptr=None,
    eps=0.0,
    HAS_NORM: tl.constexpr = False,
):
    """Columns `e` of the queries or keys at `row`, normalised, rotated and rounded as the reference does."""
    half: tl.constexpr = E // 2
    mask = seen[:, None] & (e < E)[None, :]
    partner = tl.where(e < half, e + half, e - half)
    x = tl.load(base_ptr + row[:, None] + e[None, :], mask=mask, other=0.0)
    y = tl.load(base_ptr + row[:, None] + partner[None, :], mask=mask, other=0.0)
    own, other = x.to(tl.float32), y.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, axis=1) / E + eps)[:, None]
        own *= scale * tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        other *= scale * tl.load(norm_ptr + partner, mask=e < E, other=0.0).to(tl.float32)[None, :]
    return (own * cos + other * sin).to(x.dtype)

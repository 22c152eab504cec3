"""Rotary embedding. See the package."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.ops.resize import widen


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
    """Rotates the queries and keys of a packed projection, and puts each token where attention wants it.

    Args:
        qkv: (T, (N + 2K) * E): the heads of all queries, then of the keys, then of the values.
        cos, sin: (T, E / 2), from `mrope_tables`; or (P, E / 2), P dividing T: every P tokens begin the table anew.
        num_kv_heads: K.
        slots: Int64 (T,), the row of each token; None where tokens stand as they come.
        rows: How many rows there are; T where `slots` is None.
        q_norm, k_norm: (E,), weights of an RMSNorm of each query's and each key's head, before they are rotated, with
            `eps`; both or none.

    Returns:
        (rows, (N + 2K) * E), zero in rows without a token.
    """
    heads = qkv.unflatten(-1, (-1, 2 * cos.shape[-1]))
    cos, sin = _for_all_tokens(cos, sin, qkv.shape[0])
    turning, values = widen(heads[..., :-num_kv_heads, :]), heads[..., -num_kv_heads:, :]
    if q_norm is not None:
        turning = _unit_heads(turning, eps)[0] * _head_weights(turning, num_kv_heads, q_norm, k_norm)
    turned = rotate(turning, cos[:, None], sin[:, None]).to(qkv.dtype)
    out = torch.cat((turned, values), dim=-2).flatten(-2)
    return out if slots is None else out.new_zeros(rows, out.shape[-1]).index_copy(0, slots, out)


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
    """The gradient of `mrope`, from that of its result and, with norms, its `qkv`.

    Returns (T, (N + 2K) * E), and (E,) of each norm's weight, (0,) where it is not wanted.
    """
    grad = grad if slots is None else grad.index_select(0, slots)
    heads = grad.unflatten(-1, (-1, 2 * cos.shape[-1]))
    cos, sin = _for_all_tokens(cos, sin, grad.shape[0])
    of_turned, of_values = widen(heads[..., :-num_kv_heads, :]), heads[..., -num_kv_heads:, :]
    of_turning = rotate(of_turned, cos[:, None], -sin[:, None])
    of_q_norm, of_k_norm = grad.new_empty(0), grad.new_empty(0)
    if q_norm is not None:
        unit, scale = _unit_heads(widen(qkv.unflatten(-1, heads.shape[-2:])[..., :-num_kv_heads, :]), eps)
        if for_weight:
            of_weights = of_turning * unit
            of_q_norm = of_weights[..., :-num_kv_heads, :].flatten(0, -2).sum(0).to(q_norm.dtype)
            of_k_norm = of_weights[..., -num_kv_heads:, :].flatten(0, -2).sum(0).to(k_norm.dtype)
        scaled = of_turning * _head_weights(unit, num_kv_heads, q_norm, k_norm)
        of_turning = scale * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return torch.cat((of_turning.to(grad.dtype), of_values), dim=-2).flatten(-2), of_q_norm, of_k_norm


def _for_all_tokens(cos: Tensor, sin: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Tables (tokens, E / 2) of those that begin anew every so many tokens."""
    if 0 < cos.shape[0] < tokens:
        return cos.repeat(tokens // cos.shape[0], 1), sin.repeat(tokens // sin.shape[0], 1)
    return cos, sin


def _unit_heads(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Heads (..., E) with a root mean square of 1, and what they were multiplied by."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale, scale


def _head_weights(x: Tensor, num_kv_heads: int, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    """(N + K, E), in the dtype of the queries' and keys' heads `x`."""
    queries = x.shape[-2] - num_kv_heads
    return torch.cat((q_norm.expand(queries, -1), k_norm.expand(num_kv_heads, -1))).to(x.dtype)


def mrope_tables(position_ids: Tensor, inv_freq: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of multimodal rope (Qwen2-VL, arXiv:2409.12191, section 2.1).

    Of the frequencies `inv_freq` (E / 2,) float32, each turns with the position that `axes`, int64 (E / 2,), names:
    those in time, height and width are `position_ids` (3, ...), integers. Returns each (..., E / 2) float32.
    """
    positions = position_ids.to(inv_freq.dtype).movedim(0, -1)
    angles = positions.index_select(-1, axes) * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) in the half-split layout of GPT-NeoX."""
    first, second = widen(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

"""Attention. See the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.reference.rotation import mrope, rotate
from qwen_batched.ops.segments import Run, Segments


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Segments, num_heads: int) -> Tensor:
    """Rotary embedding and attention within each segment of each image, (I, P, D).

    Args:
        qkv: (I, P, 3 * D), the packed projection: all queries, then all keys, then all values.
        cos, sin: (P, E / 2) float32, rotation of the first and second half of a head against each other.
        segments: Of an image's P tokens. Windows are segments; so is the whole image.
        num_heads: N; E = D / N.
    """
    heads = qkv.unflatten(-1, (3, num_heads, -1))
    turned = rotate(heads[:, :, :2], cos[:, None, None], sin[:, None, None])
    q_IPNE, k_IPNE, v_IPNE = *turned.unbind(2), heads[:, :, 2]
    outs = [_attend_run(q_IPNE, k_IPNE, v_IPNE, run) for run in segments.runs]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_run(q_IPNE: Tensor, k_IPNE: Tensor, v_IPNE: Tensor, run: Run) -> Tensor:
    """Attention within the equal segments of one run, as one dense batch: (I, run.count * run.length, D)."""
    images, _, heads, size = q_IPNE.shape
    segmented, tokens = (images * run.count, run.length, heads, size), run.count * run.length
    parts = [x.narrow(1, run.start, tokens).reshape(segmented).transpose(1, 2) for x in (q_IPNE, k_IPNE, v_IPNE)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(images, tokens, heads * size)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), (B, S, N * E).

    `q` (B, S, N, E), `k` and `v` (B, C, K, E), K dividing N. `visible` is None for causal attention, where C = S,
    or bool, the keys that every query of a sample may see, (B, C), or that each may, (B, S, C).
    """
    # PyTorch's float32 GPU kernels do not know grouped heads and would fall back to S x S scores in memory.
    grouped = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and visible is None
    if not grouped:  # before they are transposed: PyTorch 2.11 exports no other order for sequences of any length
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = visible
    if visible is not None:
        mask = visible[:, None, None] if visible.ndim == 2 else visible[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=visible is None, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One more token of each sample, (B, N * E): rotates it, stores its key and value, attends to all tokens so far.

    Args:
        qkv: (B, (N + 2K) * E), as in `mrope`, with its norms; `cos` and `sin` (B, E / 2).
        keys, values: (B, C, K, E), of the tokens so far, keys rotated; take the new ones.
        lengths: Int64 (B,), how many tokens each sample has so far; below C.
        tickets: Int32 (B * K,), zero before and after: what the kernel's programs share, not used here.
    """
    batch, capacity, num_kv_heads, head_dim = keys.shape
    heads = mrope(qkv, cos, sin, num_kv_heads, None, None, q_norm, k_norm, eps).unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    samples = torch.arange(batch, device=qkv.device)
    # Under autocast keys and values come in another dtype than the cache has.
    keys[samples, lengths], values[samples, lengths] = k.to(keys.dtype), v.to(values.dtype)
    visible = torch.arange(capacity, device=qkv.device) <= lengths[:, None]
    return causal_attention(q[:, None], keys, values, visible)[:, 0]


def extend_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor | None = None,
    causal: bool = True,
    visible: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """T more tokens of each sample, (B * T, N * E): rotates them, and attends to all tokens so far and to each other.

    Args:
        qkv: (B * T, (N + 2K) * E), as in `mrope`, with its norms; `cos` and `sin` (B * T, E / 2).
        keys, values: (B, C, K, E), of the tokens so far, keys rotated; they stay as they are.
        lengths: Int64 (B,), how many tokens each sample has so far, at most C.
        tickets: Int32 (B * T * N,), zero before and after: what the kernel's programs share, not used here.
        causal: Whether a new token sees those before it and itself; otherwise it sees all new tokens.
        visible: Bool (B, T, C + T), what each new token may see of the tokens so far and of the new ones, beside that;
            None for all. A token that sees nothing gets zeros.
    """
    batch, capacity, num_kv_heads, head_dim = keys.shape
    heads = mrope(qkv, cos, sin, num_kv_heads, None, None, q_norm, k_norm, eps)
    heads = heads.view(batch, -1, heads.shape[1] // head_dim, head_dim)
    q, k, v = heads.split([heads.shape[2] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=2)
    tokens = q.shape[1]
    # Under autocast keys and values come in another dtype than the cache has.
    keys, values = torch.cat((keys, k.to(keys.dtype)), dim=1), torch.cat((values, v.to(values.dtype)), dim=1)
    sees = torch.ones(batch, tokens, capacity + tokens, dtype=torch.bool, device=qkv.device)
    sees[..., :capacity] = (torch.arange(capacity, device=qkv.device) < lengths[:, None])[:, None]
    if causal:
        sees[..., capacity:] = sees[..., capacity:].tril()
    if visible is not None:
        sees &= visible
    out = causal_attention(q.to(keys.dtype), keys, values, sees)
    return out.masked_fill(~sees.any(dim=-1, keepdim=True), 0).flatten(0, 1)

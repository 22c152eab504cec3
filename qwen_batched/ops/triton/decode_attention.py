"""decode_attention: one token of each sample is rotated, stored in the cache and attends to it, in one launch.

See `reference.decode_attention`. A program serves one key/value head of a sample, with all queries that share it, over
one part of the context, which it may read before the new token is there. The last program of a head to finish adds the
parts up, in their order, so that results do not depend on which one that is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import begin, cdiv, launch, next_power_of_2, pdl_wait
from qwen_batched.ops.triton.rotation import angles, rotated
from qwen_batched.runtime.backend import reads_ahead

LOG2_E = math.log2(math.e)
LEAST_ROWS = 16  # of a tensor core's tile
# H200, bf16, 36 blocks of the 3B model behind 241 tokens, the rest as it is: 8 warps and 8 parts at once 1.674 ms, 4
# warps 1.701 ms, one part at a time 1.718 ms.
TILE, WARPS, AT_ONCE = 64, 8, 8
# Parts of the context: enough to give every processor of a large GPU something to read, few enough to add up fast.
PROGRAMS, MAX_PARTS = 256, 32


@triton.jit
def _keys_and_values(keys_ptr, values_ptr, base, token, stop, e, STRIDE: tl.constexpr, E: tl.constexpr):
    seen = (token < stop)[:, None] & (e < E)[None, :]
    place = base + token[:, None] * STRIDE + e[None, :]
    return tl.load(keys_ptr + place, mask=seen, other=0.0), tl.load(values_ptr + place, mask=seen, other=0.0)


# Not compiled anew for another context.
@triton.jit(do_not_specialize=["capacity", "parts", "ahead"])
def _decode_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    tickets_ptr,
    q_norm_ptr,
    k_norm_ptr,
    parts_ptr,
    sums_ptr,
    out_ptr,
    capacity,
    parts,
    scale,
    eps,
    ahead,
    G: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    begin(ahead, USE_PDL)
    head = tl.program_id(0) % K
    sample = (tl.program_id(0) // K).to(tl.int64)
    part = tl.program_id(1)
    g, e, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E), tl.arange(0, TILE)
    one = tl.arange(0, 1)
    mask_ge = (g < G)[:, None] & (e < E)[None, :]
    mask_e = (e < E)[None, :]
    length = tl.load(lengths_ptr + sample)
    part_tokens = tl.cdiv(tl.cdiv(length, parts), TILE) * TILE
    start = part * part_tokens
    stop = tl.minimum(start + part_tokens, length)
    base = sample * capacity * K * E + head * E
    k, v = _keys_and_values(keys_ptr, values_ptr, base, start + s, stop, e, K * E, E)
    pdl_wait(USE_PDL)

    width: tl.constexpr = (G * K + 2 * K) * E
    row = sample * width
    cos, sin = angles(cos_ptr, sin_ptr, sample + one, one == 0, e, E)
    q = rotated(qkv_ptr, row + (head * G + g) * E, g < G, e, cos, sin, E, q_norm_ptr, eps, HAS_NORM)
    maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    if part == 0:  # which has the new token
        at = row + (G * K + head) * E + one
        new_k = rotated(qkv_ptr, at, one == 0, e, cos, sin, E, k_norm_ptr, eps, HAS_NORM)
        new_v = tl.load(qkv_ptr + row + (G * K + K + head) * E + e[None, :], mask=mask_e, other=0.0)
        new_at = base + length * K * E + e[None, :]
        fits = mask_e & (length + one < capacity)[:, None]
        tl.store(keys_ptr + new_at, new_k, mask=fits)
        tl.store(values_ptr + new_at, new_v, mask=fits)
        maximum = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
        total += 1.0
        out += new_v.to(tl.float32)
    for at in range(start, stop, TILE):
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((at + s < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        maximum = higher
        k, v = _keys_and_values(keys_ptr, values_ptr, base, at + TILE + s, stop, e, K * E, E)

    out_at = sample * (G * K * E) + (head * G + g)[:, None] * E + e[None, :]
    if SPLIT:
        first = tl.program_id(0).to(tl.int64) * parts * BLOCK_G
        tl.store(parts_ptr + (first + part * BLOCK_G + g)[:, None] * BLOCK_E + e[None, :], out, mask=mask_ge)
        tl.store(sums_ptr + 2 * (first + part * BLOCK_G + g), maximum)
        tl.store(sums_ptr + 2 * (first + part * BLOCK_G + g) + 1, total)
        tl.debug_barrier()  # every thread has stored before the ticket says so
        ticket = tl.atomic_add(tickets_ptr + tl.program_id(0), 1, sem="acq_rel")
        if ticket == parts - 1:
            maximum = tl.full((BLOCK_G,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_G,), tl.float32)
            out = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
            for group in range(0, parts, AT_ONCE):
                for member in tl.static_range(AT_ONCE):  # unrolled, so that their loads do not wait for each other
                    index = group + member
                    rows = first + index * BLOCK_G + g
                    seen = (g < BLOCK_G) & (index < parts)
                    # Past the L1 cache, which may hold what was there before.
                    part_maximum = tl.load(sums_ptr + 2 * rows, mask=seen, other=float("-inf"), cache_modifier=".cg")
                    part_total = tl.load(sums_ptr + 2 * rows + 1, mask=seen, other=0.0, cache_modifier=".cg")
                    part_at = parts_ptr + rows[:, None] * BLOCK_E + e[None, :]
                    part_out = tl.load(part_at, mask=mask_ge & (index < parts), other=0.0, cache_modifier=".cg")
                    higher = tl.maximum(maximum, part_maximum)  # finite: part 0 comes first, and has a token
                    shrink, part_shrink = tl.exp2(maximum - higher), tl.exp2(part_maximum - higher)
                    total = total * shrink + part_total * part_shrink
                    out = out * shrink[:, None] + part_out * part_shrink[:, None]
                    maximum = higher
            tl.store(out_ptr + out_at, (out / total[:, None]).to(q.dtype), mask=mask_ge)
            tl.store(tickets_ptr + tl.program_id(0), 0)
    else:
        tl.store(out_ptr + out_at, (out / total[:, None]).to(q.dtype), mask=mask_ge)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """(B, (N + 2K) * E) and a cache (B, C, K, E) to (B, N * E). `tickets`: int32 (B * K,), zeros before and after."""
    qkv = qkv.contiguous()
    batch, capacity, kv_heads, head_dim = keys.shape
    group = qkv.shape[1] // head_dim // kv_heads - 2
    out = qkv.new_empty(batch, group * kv_heads * head_dim)
    if batch == 0:
        return out
    parts = _parts(batch * kv_heads, capacity)
    block_g = max(LEAST_ROWS, next_power_of_2(group))
    block_e = max(LEAST_ROWS, next_power_of_2(head_dim))
    rows = batch * kv_heads * parts * block_g
    launch(
        _decode_attention_kernel,
        (batch * kv_heads, parts),
        (
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            keys,
            values,
            lengths,
            tickets,
            qkv if q_norm is None else q_norm.contiguous(),
            qkv if k_norm is None else k_norm.contiguous(),
            qkv.new_empty(rows, block_e, dtype=torch.float32),
            qkv.new_empty(rows, 2, dtype=torch.float32),
            out,
        ),
        (capacity, parts, head_dim**-0.5 * LOG2_E, eps, int(reads_ahead())),  # exp2 is what the hardware has
        G=group,
        K=kv_heads,
        E=head_dim,
        HAS_NORM=q_norm is not None,
        SPLIT=parts > 1,
        BLOCK_G=block_g,
        BLOCK_E=block_e,
        TILE=TILE,
        AT_ONCE=AT_ONCE,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=WARPS,
    )
    return out


def _parts(heads: int, capacity: int) -> int:
    """Into how many parts the context of each of `heads` is split. Of shapes alone: a graph holds it."""
    return max(1, min(PROGRAMS // heads, cdiv(capacity, TILE), MAX_PARTS))

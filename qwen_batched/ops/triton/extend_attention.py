"""extend_attention: T tokens of each sample are rotated, attend to a cached prompt and to each other, in one launch.

See `reference.extend_attention`. A program serves some queries of one key/value head of a sample, over one part of the
prompt; the first part's programs have the new tokens too. The last program of these queries to finish adds the parts
up, in their order, as in `decode_attention`.
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
# Queries and keys of a tile. 64 queries would make Triton 3.6 use Hopper's wgmma, see `rotary_attention`.
MAX_QUERIES, TILE, WARPS, STAGES = 32, 64, 4, 2
TILE_OF_FLOAT32 = 32  # twice the bytes in shared memory
PROGRAMS, MAX_PARTS = 256, 32  # see `decode_attention`
# Below every score, and finite: a query that sees nothing gets zeros, not NaN.
LEAST_SCORE = tl.constexpr(-1e30)


@triton.jit
def _absorb(scores, v, maximum, total, out, PRECISION: tl.constexpr):
    """Softmax over one tile more: running maximum, sum of weights and weighted values."""
    higher = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(maximum - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return higher, total, out


# Not compiled anew for another prompt.
@triton.jit(do_not_specialize=["capacity", "tokens", "parts", "ahead"])
def _extend_attention_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    visible_ptr,
    tickets_ptr,
    q_norm_ptr,
    k_norm_ptr,
    parts_ptr,
    sums_ptr,
    out_ptr,
    capacity,
    tokens,
    parts,
    scale,
    eps,
    ahead,
    G: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    begin(ahead, USE_PDL)
    head = tl.program_id(0) % K
    sample = (tl.program_id(0) // K).to(tl.int64)
    part = tl.program_id(1)
    e, s, j = tl.arange(0, BLOCK_E), tl.arange(0, TILE), tl.arange(0, BLOCK_T)
    row = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # queries of one token stand side by side
    is_query = row < tokens * G
    query_token = row // G
    mask_e = (e < E)[None, :]
    length = tl.load(lengths_ptr + sample)
    part_tokens = tl.cdiv(tl.cdiv(length, parts), TILE) * TILE
    start = part * part_tokens
    stop = tl.minimum(start + part_tokens, length)
    base = sample * capacity * K * E + head * E
    pdl_wait(USE_PDL)

    width: tl.constexpr = (G * K + 2 * K) * E
    first = sample * tokens
    cos, sin = angles(cos_ptr, sin_ptr, first + query_token, is_query, e, E)
    q_at = (first + query_token) * width + (head * G + row % G) * E
    q = rotated(qkv_ptr, q_at, is_query, e, cos, sin, E, q_norm_ptr, eps, HAS_NORM)
    visible_at = (first + query_token)[:, None] * (capacity + tokens)
    maximum = tl.full((BLOCK_Q,), LEAST_SCORE, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    if part == 0:  # which has the new tokens
        for at in range(0, tokens, BLOCK_T):
            token = at + j
            is_token = token < tokens
            k_at = (first + token) * width + (G * K + head) * E
            k_cos, k_sin = angles(cos_ptr, sin_ptr, first + token, is_token, e, E)
            k = rotated(qkv_ptr, k_at, is_token, e, k_cos, k_sin, E, k_norm_ptr, eps, HAS_NORM)
            v_at = k_at[:, None] + K * E + e[None, :]
            v = tl.load(qkv_ptr + v_at, mask=is_token[:, None] & mask_e, other=0.0)
            sees = is_query[:, None] & is_token[None, :]
            if IS_CAUSAL:
                sees &= token[None, :] <= query_token[:, None]
            if HAS_MASK:
                sees &= tl.load(visible_ptr + visible_at + capacity + token[None, :], mask=sees, other=0) != 0
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(sees, scores, float("-inf"))
            maximum, total, out = _absorb(scores, v, maximum, total, out, PRECISION)
    for at in range(start, stop, TILE):
        token = at + s
        is_token = token < stop
        place = base + token[:, None] * (K * E) + e[None, :]
        k = tl.load(keys_ptr + place, mask=is_token[:, None] & mask_e, other=0.0)
        v = tl.load(values_ptr + place, mask=is_token[:, None] & mask_e, other=0.0)
        sees = is_query[:, None] & is_token[None, :]
        if HAS_MASK:
            sees &= tl.load(visible_ptr + visible_at + token[None, :], mask=sees, other=0) != 0
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(sees, scores, float("-inf"))
        maximum, total, out = _absorb(scores, v, maximum, total, out, PRECISION)

    out_at = (first + query_token)[:, None] * (G * K * E) + (head * G + row % G)[:, None] * E + e[None, :]
    mask = is_query[:, None] & mask_e
    if SPLIT:
        block = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        q_row = tl.arange(0, BLOCK_Q)
        mine = (block * parts + part) * BLOCK_Q + q_row
        tl.store(parts_ptr + mine[:, None] * BLOCK_E + e[None, :], out)
        tl.store(sums_ptr + 2 * mine, maximum)
        tl.store(sums_ptr + 2 * mine + 1, total)
        tl.debug_barrier()  # every thread has stored before the ticket says so
        ticket = tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel")
        if ticket == parts - 1:
            maximum = tl.full((BLOCK_Q,), LEAST_SCORE, tl.float32)
            total = tl.zeros((BLOCK_Q,), tl.float32)
            out = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
            for index in range(parts):
                rows = (block * parts + index) * BLOCK_Q + q_row
                # Past the L1 cache, which may hold what was there before.
                part_maximum = tl.load(sums_ptr + 2 * rows, cache_modifier=".cg")
                part_total = tl.load(sums_ptr + 2 * rows + 1, cache_modifier=".cg")
                part_out = tl.load(parts_ptr + rows[:, None] * BLOCK_E + e[None, :], cache_modifier=".cg")
                higher = tl.maximum(maximum, part_maximum)
                shrink, part_shrink = tl.exp2(maximum - higher), tl.exp2(part_maximum - higher)
                total = total * shrink + part_total * part_shrink
                out = out * shrink[:, None] + part_out * part_shrink[:, None]
                maximum = higher
            out = out / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out_ptr + out_at, out.to(q.dtype), mask=mask)
            tl.store(tickets_ptr + block, 0)
    else:
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + out_at, out.to(q.dtype), mask=mask)


def extend_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    tickets: Tensor,
    causal: bool = True,
    visible: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """(B * T, (N + 2K) * E) and a cache (B, C, K, E) to (B * T, N * E). `tickets`: see the reference."""
    qkv = qkv.contiguous()
    batch, capacity, kv_heads, head_dim = keys.shape
    tokens, group = qkv.shape[0] // max(batch, 1), qkv.shape[1] // head_dim // kv_heads - 2
    out = qkv.new_empty(qkv.shape[0], group * kv_heads * head_dim)
    if out.numel() == 0:
        return out
    block_q = min(MAX_QUERIES, max(LEAST_ROWS, next_power_of_2(tokens * group)))
    block_e = max(LEAST_ROWS, next_power_of_2(head_dim))
    blocks = cdiv(tokens * group, block_q)
    tile = TILE_OF_FLOAT32 if qkv.dtype == torch.float32 else TILE
    parts = _parts(batch * kv_heads * blocks, capacity)
    rows = batch * kv_heads * blocks * parts * block_q if parts > 1 else 1
    scratch = qkv.new_empty(rows, block_e, dtype=torch.float32), qkv.new_empty(rows, 2, dtype=torch.float32)
    launch(
        _extend_attention_kernel,
        (batch * kv_heads, parts, blocks),
        (
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            keys,
            values,
            lengths,
            lengths if visible is None else visible.contiguous().view(torch.uint8),
            tickets,
            qkv if q_norm is None else q_norm.contiguous(),
            qkv if k_norm is None else k_norm.contiguous(),
            *scratch,
            out,
        ),
        (capacity, tokens, parts, head_dim**-0.5 * LOG2_E, eps, int(reads_ahead())),  # exp2 is what the hardware has
        G=group,
        K=kv_heads,
        E=head_dim,
        HAS_NORM=q_norm is not None,
        HAS_MASK=visible is not None,
        IS_CAUSAL=causal,
        SPLIT=parts > 1,
        BLOCK_Q=block_q,
        BLOCK_T=min(tile, max(LEAST_ROWS, next_power_of_2(tokens))),
        BLOCK_E=block_e,
        TILE=tile,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def _parts(programs: int, capacity: int) -> int:
    """Into how many parts the prompt is split for each of `programs`. Of shapes alone: a graph holds it."""
    return max(1, min(PROGRAMS // programs, cdiv(capacity, TILE), MAX_PARTS))

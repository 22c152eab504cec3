"""likeliest_token in two launches: the best of each part of the vocabulary, and the best of these.

See `reference.likeliest_token`. PyTorch makes seven launches of it, some of which read float32 copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_launch_dependents, pdl_wait

PART, WARPS = 1024, 4  # logits of a program


@triton.jit
def _best_of_part_kernel(
    logits_ptr,
    forbidden_ptr,
    best_ptr,
    place_ptr,
    broken_ptr,
    width,
    forbidden_stride,
    HAS_FORBIDDEN: tl.constexpr,
    PART: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    pdl_wait(USE_PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = part * PART + tl.arange(0, PART)
    inside = places < width
    logits = tl.load(logits_ptr + row * width + places, mask=inside, other=0.0).to(tl.float32)
    is_number = tl.abs(logits) < float("inf")  # False for NaN
    broken = tl.sum((~is_number).to(tl.int32), axis=0)
    # Of NaN nothing is above anything.
    logits = tl.where(inside & (logits == logits), logits, float("-inf"))
    if HAS_FORBIDDEN:
        forbidden = tl.load(forbidden_ptr + row * forbidden_stride + places, mask=inside, other=1)
        logits = tl.where(forbidden != 0, float("-inf"), logits)
    best, place = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    at = row * tl.num_programs(1) + part
    tl.store(best_ptr + at, best)
    tl.store(place_ptr + at, part * PART + place)
    tl.store(broken_ptr + at, broken)


@triton.jit
def _best_of_all_kernel(
    best_ptr, place_ptr, broken_ptr, token_ptr, is_finite_ptr, parts, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    pdl_launch_dependents(USE_PDL)
    pdl_wait(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    at, inside = row * parts + part, part < parts
    best = tl.load(best_ptr + at, mask=inside, other=float("-inf"))
    _, chosen = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    broken = tl.sum(tl.load(broken_ptr + at, mask=inside, other=0), axis=0)
    tl.store(token_ptr + row, tl.load(place_ptr + row * parts + chosen).to(tl.int64))
    tl.store(is_finite_ptr + row, broken == 0)


def likeliest_token(logits: Tensor, forbidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """(R, W) to (R,) and (R,)."""
    logits = logits.contiguous()
    rows, width = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    is_finite = logits.new_empty(rows, dtype=torch.bool)
    if rows == 0:
        return tokens, is_finite
    parts = cdiv(width, PART)
    best = logits.new_empty(rows, parts, dtype=torch.float32)
    places, broken = (logits.new_empty(rows, parts, dtype=torch.int32) for _ in range(2))
    mask = logits if forbidden is None else forbidden.contiguous()
    launch(
        _best_of_part_kernel,
        (rows, parts),
        (logits, mask, best, places, broken),
        (width, 0 if len(mask) == 1 else width),
        HAS_FORBIDDEN=forbidden is not None,
        PART=PART,
        num_warps=WARPS,
    )
    launch(
        _best_of_all_kernel,
        (rows,),
        (best, places, broken, tokens, is_finite),
        (parts,),
        BLOCK=next_power_of_2(parts),
        num_warps=WARPS,
    )
    return tokens, is_finite

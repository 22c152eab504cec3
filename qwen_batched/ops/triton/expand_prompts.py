"""expand_prompts in one launch, where PyTorch makes sixty. See `reference.expand_prompts`.

A program makes some places of a sample's sequence. It goes through the prompt once to see where it ends, and once more
to see which token each place belongs to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.reference import NO_TOKEN
from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_launch_dependents, pdl_wait

PLACES, TOKENS, WARPS = 128, 64, 4


@triton.jit
def _ranks(present):
    """Each camera's turn: the present ones in their order, then the absent ones."""
    here = present.to(tl.int32)
    return tl.where(present, tl.cumsum(here, axis=0) - 1, tl.cumsum(1 - here, axis=0) - 1 + tl.sum(here, axis=0))


# Not compiled anew for another text.
@triton.jit(do_not_specialize=["batch", "prompt_length", "length", "image_token", "pad_token"])
def _expand_prompts_kernel(
    prompts_ptr,
    grids_ptr,
    mask_ptr,
    ids_ptr,
    real_ptr,
    positions_ptr,
    cameras_ptr,
    features_ptr,
    batch,
    prompt_length,
    length,
    image_token,
    pad_token,
    NO_TOKEN: tl.constexpr,
    V: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_launch_dependents(USE_PDL)
    pdl_wait(USE_PDL)
    sample = tl.program_id(0)
    s = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    c, u = tl.arange(0, BLOCK_V), tl.arange(0, TOKENS)
    heights = tl.load(grids_ptr + 2 * c, mask=c < V, other=0).to(tl.int32)
    widths = tl.load(grids_ptr + 2 * c + 1, mask=c < V, other=0).to(tl.int32)
    cells = heights * widths
    features = tl.cumsum(cells, axis=0) - cells

    # How long this sample is.
    texts, images = 0, 0
    for at in range(0, prompt_length, TOKENS):
        token = tl.load(prompts_ptr + sample * prompt_length + at + u, mask=at + u < prompt_length, other=NO_TOKEN).to(
            tl.int32
        )
        images += tl.sum((token == image_token).to(tl.int32), axis=0)
        texts += tl.sum(((token != image_token) & (token != NO_TOKEN)).to(tl.int32), axis=0)
    present = c < V
    if HAS_MASK:
        present = present & (tl.load(mask_ptr + sample * V + c, mask=c < V, other=0) != 0)
    ranks = _ranks(present)
    own = texts + tl.sum(tl.where(ranks < images, cells, 0), axis=0)

    slot = s - (length - own) if LEFT else s
    nothing = tl.zeros((PLACES,), tl.int32)
    token_of, cell_of, first_of, camera_of, width_of, feature_of = nothing, nothing, nothing, nothing, nothing, nothing
    images, cells_before, steps_before = 0, 0, 0
    for at in range(0, prompt_length, TOKENS):
        token = tl.load(prompts_ptr + sample * prompt_length + at + u, mask=at + u < prompt_length, other=NO_TOKEN).to(
            tl.int32
        )
        is_image = (token == image_token).to(tl.int32)
        is_text = ((token != image_token) & (token != NO_TOKEN)).to(tl.int32)
        turn = images + tl.cumsum(is_image, axis=0) - 1
        chosen = (ranks[None, :] == turn[:, None]) & (is_image[:, None] == 1)  # (TOKENS, BLOCK_V)
        height = tl.sum(tl.where(chosen, heights[None, :], 0), axis=1) + is_text
        width = tl.sum(tl.where(chosen, widths[None, :], 0), axis=1) + is_text
        camera = tl.sum(tl.where(chosen, c[None, :], 0), axis=1) + V * is_text
        feature = tl.sum(tl.where(chosen, features[None, :], 0), axis=1)
        count, step = height * width, tl.maximum(height, width)
        begin = cells_before + tl.cumsum(count, axis=0) - count
        first = steps_before + tl.cumsum(step, axis=0) - step
        belongs = (begin[None, :] <= slot[:, None]) & (slot[:, None] < (begin + count)[None, :])
        token_of += tl.sum(tl.where(belongs, token[None, :], 0), axis=1)
        cell_of += tl.sum(tl.where(belongs, slot[:, None] - begin[None, :], 0), axis=1)
        first_of += tl.sum(tl.where(belongs, first[None, :], 0), axis=1)
        camera_of += tl.sum(tl.where(belongs, camera[None, :], 0), axis=1)
        width_of += tl.sum(tl.where(belongs, width[None, :], 0), axis=1)
        feature_of += tl.sum(tl.where(belongs, feature[None, :], 0), axis=1)
        images += tl.sum(is_image, axis=0)
        cells_before += tl.sum(count, axis=0)
        steps_before += tl.sum(step, axis=0)

    inside = s < length
    real = (slot >= 0) & (slot < own)
    is_image = real & (camera_of < V)
    place = sample * length + s
    row, column = cell_of // tl.maximum(width_of, 1), cell_of % tl.maximum(width_of, 1)
    tl.store(ids_ptr + place, tl.where(real, token_of, pad_token).to(tl.int64), mask=inside)
    tl.store(real_ptr + place, real, mask=inside)
    tl.store(positions_ptr + place, tl.where(real, first_of, 0).to(tl.int64), mask=inside)
    tl.store(positions_ptr + batch * length + place, tl.where(real, first_of + row, 0).to(tl.int64), mask=inside)
    tl.store(positions_ptr + 2 * batch * length + place, tl.where(real, first_of + column, 0).to(tl.int64), mask=inside)
    tl.store(cameras_ptr + place, tl.where(is_image, camera_of, NO_TOKEN).to(tl.int64), mask=inside)
    tl.store(features_ptr + place, tl.where(is_image, feature_of + cell_of, NO_TOKEN).to(tl.int64), mask=inside)


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, U) to five (B, S), one of them thrice."""
    batch, cameras = prompts.shape[0], grids.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=prompts.device)

    ids, camera_ids, features = (empty(batch, length) for _ in range(3))
    real, positions = empty(batch, length, dtype=torch.bool), empty(3, batch, length)
    if ids.numel() > 0:
        mask = prompts if camera_mask is None else camera_mask.contiguous()
        launch(
            _expand_prompts_kernel,
            (batch, cdiv(length, PLACES)),
            (prompts.contiguous(), grids.contiguous(), mask, ids, real, positions, camera_ids, features),
            (batch, prompts.shape[1], length, image_token_id, pad_token_id),
            NO_TOKEN=NO_TOKEN,
            V=cameras,
            HAS_MASK=camera_mask is not None,
            LEFT=left,
            BLOCK_V=next_power_of_2(max(2, cameras)),  # Triton 3.6 cannot sum up along an axis of one
            TOKENS=TOKENS,
            PLACES=PLACES,
            num_warps=WARPS,
        )
    return ids, real, positions, camera_ids, features

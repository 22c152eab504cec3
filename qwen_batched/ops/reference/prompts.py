"""Prompts with a place for each cell of their images. See the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TOKEN = -1  # no token, no camera, no feature


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    left: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gives each image token of the prompts as many places as its camera's image has cells.

    Rope positions are those of transformers' `get_rope_index` for still images (Qwen2-VL, arXiv:2409.12191, section
    2.1): a text token advances by 1 on all three axes; an image keeps its first position in time, adds its row and its
    column on the other axes, and the text after it goes on at first + max(h, w).

    Args:
        prompts: Int64 (B, U), one image token for each camera that the sample has; `NO_TOKEN` fills up the rows.
        grids: Int64 (V, 2), height and width in merged cells of each camera's image.
        camera_mask: Bool (B, V), False where a camera is absent; None where none is.
        image_token_id, pad_token_id: The token that stands for an image; what fills the ids on padding.
        length, left: S, no less than the longest sequence; whether padding stands on the left.

    Returns:
        The fields of `model.sequence.Sequences`, in its order.
    """
    batch, cameras = prompts.shape[0], grids.shape[0]
    # A text token is a grid of 1 x 1, at index `cameras`: then text and images follow one rule.
    grids = F.pad(grids, (0, 0, 0, 1), value=1)
    heights, widths = grids.unbind(1)
    camera_BU = _camera_of_token(prompts == image_token_id, camera_mask, batch, cameras)
    is_token_BU = prompts != NO_TOKEN
    cells_BU = (heights * widths)[camera_BU] * is_token_BU
    advance_BU = torch.maximum(heights, widths)[camera_BU] * is_token_BU
    ends_BU = cells_BU.cumsum(1)
    totals_B1 = ends_BU[:, -1:]

    slots_BS = torch.arange(length, device=prompts.device).expand(batch, -1)
    if left:
        slots_BS = slots_BS - (length - totals_B1)
    mask_BS = (slots_BS >= 0) & (slots_BS < totals_B1)
    source_BS = torch.searchsorted(ends_BU, slots_BS.contiguous(), right=True).clamp_(max=prompts.shape[1] - 1)

    camera_BS = camera_BU.gather(1, source_BS)
    cell_BS = slots_BS - (ends_BU - cells_BU).gather(1, source_BS)
    first_BS = (advance_BU.cumsum(1) - advance_BU).gather(1, source_BS)
    width_BS = widths[camera_BS]
    positions = torch.stack((first_BS, first_BS + cell_BS // width_BS, first_BS + cell_BS % width_BS))
    first_feature = (heights * widths).cumsum(0) - heights * widths
    is_image_BS = mask_BS & (camera_BS < cameras)
    return (
        prompts.gather(1, source_BS).masked_fill(~mask_BS, pad_token_id),
        mask_BS,
        positions.masked_fill(~mask_BS, 0),
        camera_BS.masked_fill(~is_image_BS, NO_TOKEN),
        (first_feature[camera_BS] + cell_BS).masked_fill(~is_image_BS, NO_TOKEN),
    )


def _camera_of_token(is_image_BU: Tensor, camera_mask: Tensor | None, batch: int, cameras: int) -> Tensor:
    """The camera of each token (B, U): the sample's j-th image is its j-th present camera; `cameras` for text."""
    order = torch.arange(cameras + 1, device=is_image_BU.device).expand(batch, -1)
    if camera_mask is not None:
        present_first = torch.argsort((~camera_mask).to(torch.uint8), dim=1, stable=True)
        order = torch.cat((present_first, order[:, -1:]), dim=1)
    # .long() first: on CUDA, PyTorch 2.11 leaves the cumulative sum of a single bool a bool.
    image_BU = (is_image_BU.long().cumsum(1) - 1).masked_fill(~is_image_BU, cameras)
    return order.gather(1, image_BU)

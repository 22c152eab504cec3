"""Prompts with one token per image -> sequences with one token per image cell, on the device.

Which cameras a sample has may be known to the device alone (`camera_mask`), so nothing here reads a value: where each
token goes is arithmetic on tensors, the same for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TOKEN = -1


@dataclass(frozen=True)
class Sequences:
    """Token sequences of B samples, padded to S.

    Attributes:
        input_ids: Int64 (B, S).
        attention_mask: Bool (B, S), False on padding.
        position_ids: Int64 (3, B, S), temporal, height and width rope positions; 0 on padding.
        camera_ids: Int64 (B, S), the camera of an image token, -1 elsewhere.
        feature_index: Int64 (B, S), which of its sample's features (cameras in order, each row-major) an image token
            stands for, -1 elsewhere.
        token_index: Int64 (T,), the places b * S + s of the tokens that are not padding, in ascending order; where only
            the device knows how many there are, T = B * S and padding follows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    camera_ids: Tensor
    feature_index: Tensor
    token_index: Tensor


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    *,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    tokens: int | None,
    padding_side: str,
) -> Sequences:
    """Gives each image token of the prompts as many places as its camera's image has cells.

    Rope positions are those of transformers' `get_rope_index` for still images (Qwen2-VL, arXiv:2409.12191, section
    2.1): a text token advances by 1 on all three axes; an image keeps its first position in time, adds its row and its
    column on the other axes, and the text after it goes on at first + max(h, w).

    Args:
        prompts: Int64 (B, U), one image token for each camera that the sample has; `NO_TOKEN` fills up the rows.
        grids: Int64 (V, 2), height and width in merged cells of each camera's image.
        camera_mask: Bool (B, V), False where a camera is absent; None where none is.
        image_token_id: The token that stands for an image.
        pad_token_id: Fills `input_ids` on padding.
        length: S, no less than the longest sequence.
        tokens: T, how many tokens all sequences have; None where only the device knows.
        padding_side: "left" or "right".
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
    if padding_side == "left":
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
    return Sequences(
        input_ids=prompts.gather(1, source_BS).masked_fill(~mask_BS, pad_token_id),
        attention_mask=mask_BS,
        position_ids=positions.masked_fill(~mask_BS, 0),
        camera_ids=camera_BS.masked_fill(~is_image_BS, NO_TOKEN),
        feature_index=(first_feature[camera_BS] + cell_BS).masked_fill(~is_image_BS, NO_TOKEN),
        token_index=torch.argsort((~mask_BS).flatten().to(torch.uint8), stable=True)[:tokens],
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


def place_features(embeds_BSD: Tensor, features: Tensor | list[Tensor], feature_index: Tensor) -> Tensor:
    """The embeddings with each image token's feature in its place.

    Args:
        embeds_BSD: Token embeddings.
        features: (B, V, h, w, D), or V tensors (B, h, w, D).
        feature_index: (B, S), see `Sequences`.
    """
    by_camera = [features.flatten(1, 3)] if isinstance(features, Tensor) else [x.flatten(1, 2) for x in features]
    features_BMD = torch.cat(by_camera, dim=1)
    index_BS1 = feature_index[..., None]
    placed_BSD = features_BMD.gather(1, index_BS1.clamp(min=0).expand(-1, -1, features_BMD.shape[-1]))
    return torch.where(index_BS1 >= 0, placed_BSD.to(embeds_BSD.dtype), embeds_BSD)

"""Prompts with one token per image -> sequences with one token per image cell, on the device.

Which cameras a sample has may be known to the device alone (`camera_mask`), so nothing here reads a value: where each
token goes is arithmetic on tensors, the same for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_batched import ops

NO_LABEL = -100  # of a token that is not trained on, as in transformers


@dataclass(frozen=True)
class Sequences:
    """Token sequences of B samples, padded to S."""

    input_ids: Tensor  # int64 (B, S)
    attention_mask: Tensor  # bool (B, S), False on padding
    position_ids: Tensor  # int64 (3, B, S), temporal, height and width rope positions; 0 on padding
    camera_ids: Tensor  # int64 (B, S), the camera of an image token, -1 elsewhere
    # Int64 (B, S), which of its sample's features (cameras in order, each row-major) an image token stands for, -1
    # elsewhere.
    feature_index: Tensor


def expand_prompts(
    prompts: Tensor,
    grids: Tensor,
    camera_mask: Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    length: int,
    padding_side: str,
) -> Sequences:
    """`ops.expand_prompts`, which see, with a name for the padding side and for each result."""
    left = padding_side == "left"
    return Sequences(*ops.expand_prompts(prompts, grids, camera_mask, image_token_id, pad_token_id, length, left))


def label_answers(sequences: Sequences, answers: Tensor) -> Tensor:
    """What to train on: the tokens at the end of each sequence that are its answer's, int64 (B,) `answers` of them.

    Returns labels, int64 (B, S): the answers' tokens, `NO_LABEL` elsewhere; each is predicted from the one before.
    """
    mask_BS = sequences.attention_mask
    tokens_BS = mask_BS.long().cumsum(1)
    is_answer_BS = mask_BS & (tokens_BS > tokens_BS[:, -1:] - answers[:, None])
    return sequences.input_ids.masked_fill(~is_answer_BS, NO_LABEL)


class Places(NamedTuple):
    """Which tokens get features, and which rows of all features these are."""

    rows: Tensor  # int64 (B * S,), some row where a token gets none
    is_image: Tensor  # bool (B, S, 1)


def find_places(feature_index: Tensor, rows_BRD: Tensor) -> Places:
    """Of `feature_index` (B, S), -1 where a token gets no feature, among rows as `feature_rows` returns them."""
    rows_BS, (samples, rows_per_sample) = feature_index.clamp(min=0), rows_BRD.shape[:2]
    if samples > 1:
        rows_BS = rows_BS + torch.arange(samples, device=rows_BS.device)[:, None] * rows_per_sample
    return Places(rows_BS.flatten(), (feature_index >= 0)[..., None])


def feature_rows(features: Tensor | list[Tensor], by_sample: bool) -> Tensor:
    """Features (B, V, h, w, D), or V tensors (B, h, w, D), as rows (B, R, D) of each sample.

    Or, not `by_sample`, as rows (1, R, D) of all of them, tensor by tensor.
    """
    parts = [features.flatten(1, 3)] if isinstance(features, Tensor) else [part.flatten(1, 2) for part in features]
    if not by_sample:
        parts = [part.flatten(0, 1)[None] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def place_features(embeds_BSD: Tensor, rows_BRD: Tensor, places: Places) -> Tensor:
    """Token embeddings with each image token's feature in its place; `places` are those among the rows."""
    placed_BSD = rows_BRD.flatten(0, 1).index_select(0, places.rows).view(embeds_BSD.shape)
    return torch.where(places.is_image, placed_BSD.to(embeds_BSD.dtype), embeds_BSD)

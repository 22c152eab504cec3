"""Prompts with one token per image -> sequences with one token per image cell, on the device.

Which cameras a sample has may be known to the device alone (`camera_mask`), so nothing here reads a value: where each
token goes is arithmetic on tensors, the same for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def place_features(embeds_BSD: Tensor, features: Tensor | list[Tensor], feature_index: Tensor) -> Tensor:
    """Token embeddings with each image token's feature, of (B, V, h, w, D) or V tensors (B, h, w, D), in its place."""
    if isinstance(features, Tensor):
        features_BMD = features.flatten(1, 3)
    else:
        features_BMD = torch.cat([camera.flatten(1, 2) for camera in features], dim=1)
    index_BS1 = feature_index[..., None]
    placed_BSD = features_BMD.gather(1, index_BS1.clamp(min=0).expand(-1, -1, features_BMD.shape[-1]))
    return torch.where(index_BS1 >= 0, placed_BSD.to(embeds_BSD.dtype), embeds_BSD)

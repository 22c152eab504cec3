"""A batch's token ids and pixels -> input embeddings (B, S, D), with each image token's feature in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
from qwen_batched.model.sequence import place_features
from qwen_batched.process_group import is_waited_for

Features = Tensor | list[Tensor]


def embed(
    visual: BatchedVisionTransformer, decoder: BatchedDecoder, batch: dict[str, Tensor | list[Tensor]]
) -> tuple[Tensor, Features | None]:
    """The embeddings, and the image features (see `BatchedVisionTransformer.forward`); None without images.

    A batch may hold the features already, in place of pixels.
    """
    features = batch.get("features")
    if "pixel_values" in batch:
        features = visual(batch["pixel_values"], batch["raster_order"], batch.get("camera_present"))
    embeds_BSD = decoder.embed_tokens(batch["input_ids"])
    if features is not None:
        return place_features(embeds_BSD, features, batch["feature_index"]), features
    if not is_waited_for(visual):
        return embeds_BSD, None
    # The others may have images: so one blank cell goes through the tower, and to no place.
    return place_features(embeds_BSD, _blank_feature(visual, batch["input_ids"]), batch["feature_index"]), None


def _blank_feature(visual: BatchedVisionTransformer, input_ids: Tensor) -> Tensor:
    """(B, 1, 1, 1, D)."""
    config = visual.config
    pixel_values = torch.zeros(1, 1, config.cell_patches, config.patch_dim, device=input_ids.device)
    feature = visual(pixel_values, input_ids.new_zeros(1, 1, 1))
    return feature.expand(len(input_ids), -1, -1, -1, -1)

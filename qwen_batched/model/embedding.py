"""A batch's token ids and pixels -> input embeddings (B, S, D), with each image token's feature in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_batched.inputs.batch import Batch, Features
from qwen_batched.inputs.sequence import place_features
from qwen_batched.model.decoder import BatchedDecoder
from qwen_batched.model.vision import BatchedVisionTransformer
from qwen_batched.training.process_groups import needs_collective_participation


def embed(visual: BatchedVisionTransformer, decoder: BatchedDecoder, batch: Batch) -> tuple[Tensor, Features | None]:
    """The embeddings, and the image features (see `BatchedVisionTransformer.forward`); None without images.

    Samples that are not `valid` become NaN.
    """
    features = batch.features if batch.pixel_values is None else image_features(visual, batch)
    embeds_BSD = decoder.embed_tokens(batch.input_ids)
    placed = features
    if features is None and needs_collective_participation(visual):
        # The others may have images: so one blank cell goes through the tower, and to no place.
        placed = _blank_feature(visual, batch.input_ids)
    if placed is not None:
        embeds_BSD = place_features(embeds_BSD, placed, batch.feature_index)
    if batch.valid is not None:
        embeds_BSD = embeds_BSD.masked_fill(~batch.valid[:, None, None], torch.nan)
    return embeds_BSD, features


def image_features(visual: BatchedVisionTransformer, batch: Batch, **options: object) -> Features | list[Features]:
    """The features of a batch's pixels, with `layers` those of each layer, in the form in which cameras were given."""
    features = visual(batch.pixel_values, batch.grids, batch.camera_present, **options)
    if not batch.as_list:
        return features
    return [*map(_by_camera, features)] if options.get("layers") is not None else _by_camera(features)


def _by_camera(features: Features) -> list[Tensor]:
    """Features (B, V, ...) as one tensor for each camera."""
    return [camera.contiguous() for camera in features.unbind(1)] if isinstance(features, Tensor) else features


def _blank_feature(visual: BatchedVisionTransformer, input_ids: Tensor) -> Tensor:
    """(B, 1, 1, 1, D)."""
    config = visual.config
    pixel_values = torch.zeros(1, 1, config.cell_patches, config.patch_dim, device=input_ids.device)
    feature = visual(pixel_values, ((1, 1),))
    return feature.expand(len(input_ids), -1, -1, -1, -1)

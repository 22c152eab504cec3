"""A batch's token ids and pixels -> input embeddings (B, S, D), with each image token's feature in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_batched.inputs.batch import Batch, FeatureMaps, Features
from qwen_batched.inputs.sequence import feature_rows, find_places, place_features
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.vision import VisionTransformer
from qwen_batched.training.process_groups import needs_collective_participation


class Embedded(NamedTuple):
    """What the decoder takes, and where it comes from."""

    inputs_embeds: Tensor  # (B, S, D)
    # Deep features where the main ones stand, each (B, S, D) and zero on text: see `Decoder.forward`.
    deep: list[Tensor]
    features: Features | None  # None without images


def embed(visual: VisionTransformer, decoder: Decoder, batch: Batch) -> Embedded:
    """A batch's embeddings. Samples that are not `valid` become NaN."""
    features = batch.features if batch.pixel_values is None else image_features(visual, batch)
    embeds_BSD = batch.inputs_embeds
    if embeds_BSD is None:
        embeds_BSD = decoder.embed_tokens(batch.input_ids)
    placed = features
    if features is None and needs_collective_participation(visual):
        # The others may have images: so one blank cell goes through the tower, and to no place.
        placed = _blank_features(visual, embeds_BSD)
    deep = []
    if placed is not None:
        by_sample = batch.images is None
        main_MD, *deep_MD = (feature_rows(maps, by_sample) for maps in (placed.main, *placed.deep))
        places = find_places(batch.feature_index, len(main_MD) // len(embeds_BSD) if by_sample else None)
        blank = torch.zeros_like(embeds_BSD) if deep_MD else None
        deep = [place_features(blank, rows_MD, places) for rows_MD in deep_MD]
        embeds_BSD = place_features(embeds_BSD, main_MD, places)
    if batch.valid is not None:
        embeds_BSD = embeds_BSD.masked_fill(~batch.valid[:, None, None], torch.nan)
    return Embedded(embeds_BSD, deep, features)


def image_features(visual: VisionTransformer, batch: Batch, chunk_size: int | None = None) -> Features:
    """The features of a batch's pixels, in the form in which cameras were given."""
    # No argument more than there must be, so that hooks see the call that users write.
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    if visual.config.deepstack_visual_indexes is None:
        main, deep = visual(batch.pixel_values, batch.grids, batch.camera_present, **options), []
    else:
        main, deep = visual(batch.pixel_values, batch.grids, batch.camera_present, deepstack=True, **options)
    return Features(_as_given(main, batch), [_as_given(maps, batch) for maps in deep])


def block_outputs(
    visual: VisionTransformer, batch: Batch, layers: Sequence[int], chunk_size: int | None
) -> list[FeatureMaps]:
    """The outputs of blocks for a batch's pixels, in the form in which cameras were given."""
    outputs = visual(batch.pixel_values, batch.grids, batch.camera_present, layers=layers, chunk_size=chunk_size)
    return [_as_given(maps, batch) for maps in outputs]


def features_of_images(maps: FeatureMaps, batch: Batch) -> FeatureMaps:
    """What callers get: as cameras were given, or one (h, w, D) for each of the batch's own images."""
    return maps if batch.images is None else [maps[group][row] for group, row in batch.images]


def _as_given(maps: FeatureMaps, batch: Batch) -> FeatureMaps:
    """One tensor (B, V, ...) as one for each camera, where cameras were given so."""
    if not batch.as_list or not isinstance(maps, Tensor):
        return maps
    return [camera.contiguous() for camera in maps.unbind(1)]


def _blank_features(visual: VisionTransformer, inputs_embeds: Tensor) -> Features:
    """Of one cell for each sample: (B, 1, 1, 1, D)."""
    config = visual.config
    pixel_values = torch.zeros(1, 1, config.cell_patches, config.patch_dim, device=inputs_embeds.device)
    main, deep = image_features(visual, Batch(pixel_values=pixel_values, grids=((1, 1),)))
    shape = (len(inputs_embeds), -1, -1, -1, -1)
    return Features(main.expand(shape), [maps.expand(shape) for maps in deep])

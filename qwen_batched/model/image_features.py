"""A batch's pixels -> the features of its images, in the form in which cameras were given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_batched.inputs.batch import Batch, FeatureMaps, Features
from qwen_batched.model.vision import VisionTransformer
from qwen_batched.training.process_groups import needs_collective_participation


def features_of(visual: VisionTransformer, batch: Batch) -> Features | None:
    """The features of a batch: its own, or those of its pixels; None without images."""
    return batch.features if batch.pixel_values is None else image_features(visual, batch)


def blank_features(visual: VisionTransformer, batch: Batch) -> Features | None:
    """Of one cell for each sample, (B, 1, 1, 1, D), for a batch without images where other processes may have some.

    They keep the tower's collectives in step, and replace no embedding. None where the tower has none.
    """
    if not needs_collective_participation(visual):
        return None
    config, mask = visual.config, batch.attention_mask
    pixel_values = torch.zeros(1, 1, config.cell_patches, config.patch_dim, device=mask.device)
    main, deep = image_features(visual, Batch(pixel_values=pixel_values, grids=((1, 1),)))
    shape = (len(mask), -1, -1, -1, -1)
    return Features(main.expand(shape), [maps.expand(shape) for maps in deep])


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

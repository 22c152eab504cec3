"""What the network runs on: the typed form of a batch inside the package.

`processor(...)` gives loaders a dict of its tensors, see `inputs.prepared`, and `model(**batch)` turns that into this
once. Registered with PyTorch's pytrees: tensors are children, all else is the structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_batched.inputs.pytree_nodes import register_node

Grid = tuple[int, int]  # height and width of an image in merged cells
FeatureMaps = Tensor | list[Tensor]  # (B, V, h, w, D), or one (B, h, w, D) for each camera


class Features(NamedTuple):
    """What the decoder takes of images."""

    main: FeatureMaps  # (B, V, h, w, D), or V tensors (B, h_v, w_v, D)
    # One such item for each of the config's `deepstack_visual_indexes`. The decoder adds the first to the image tokens
    # after its first block, and so on.
    deep: list[FeatureMaps]


torch.serialization.add_safe_globals([Features])  # so that torch.load reads stored ones without pickle's dangers


def without_absent(maps: FeatureMaps, camera_present: Tensor | None) -> FeatureMaps:
    """Feature maps with zeros for cameras that are absent, by bool (B, V); None where none is."""
    if camera_present is None:
        return maps
    absent = ~camera_present[:, :, None, None, None]
    if isinstance(maps, Tensor):
        return maps.masked_fill(absent, 0)
    return [camera.masked_fill(absent[:, index], 0) for index, camera in enumerate(maps)]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of B samples padded to S tokens, with V cameras, on one device. Every tensor has B first.

    Or with N `images` of the batch's own, any number for each sample: then pixels and features are lists of one tensor
    for each grid, images first, and `feature_index` counts through all of them.
    """

    # Int64 (B, S); like the other four of `Sequences` None for images without texts, or alone where only
    # embeddings were given.
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None  # (B, S, D), in place of the embeddings of `input_ids`
    attention_mask: Tensor | None = None  # bool (B, S), False on padding
    rope_positions: Tensor | None = None  # int64 (B, 3, S), temporal, height and width positions
    camera_ids: Tensor | None = None  # int64 (B, S), the camera of an image token, -1 elsewhere
    feature_index: Tensor | None = None  # int64 (B, S), see `Sequences`
    labels: Tensor | None = None  # int64 (B, S), see `label_answers`; None without targets
    # (B, V, P, patch_dim) in window order, or V tensors (B, P_v, patch_dim) when sizes differ; with `images` one
    # (N_g, P_g, patch_dim) for each grid; None without images, or with `features`.
    pixel_values: Tensor | list[Tensor] | None = None
    camera_present: Tensor | None = None  # bool (B, V), False where a camera is absent; None where none is
    features: Features | None = None  # image features in place of pixels
    # Bool (B,), False for samples whose hidden states become NaN; None where the host has checked them.
    valid: Tensor | None = None
    labels_valid: Tensor | None = None  # bool (B,), the same of what the loss needs
    grids: tuple[Grid, ...] = ()  # of each camera's image, or each tensor of pixels, where there are any
    images: tuple[tuple[int, int], ...] | None = None  # the tensor and the row of each of the batch's own images
    is_checked: bool = True  # whether its values are known to fit together; only then may anything be computed
    as_list: bool = False  # whether image features are a list, of one tensor for each camera
    tokens: int | None = None  # how many tokens are not padding; None where only the device knows
    is_padded: bool = True  # False where the host knows that no token is padding
    answer_tokens: int | None = None  # how many labels there are, or the most there can be where only the device knows

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        pixels = self.pixel_values
        first = pixels[0] if isinstance(pixels, (list, tuple)) else pixels
        return (self.attention_mask if first is None else first).device


HOST_FIELDS = ("grids", "images", "is_checked", "as_list", "tokens", "is_padded", "answer_tokens")


register_node(Batch, HOST_FIELDS)

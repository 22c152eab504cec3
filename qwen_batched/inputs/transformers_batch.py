"""A batch of transformers' processor, as the host knows it, and where its tokens and images stand.

Its images are the batch's, back to back in the order of their tokens, any number of any size for each sample. Which
image a token belongs to follows from how many image tokens stand before it: nothing here reads a value from a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import QwenVLConfig, VisionConfig
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import Features, Grid
from qwen_batched.inputs.checks import can_read, describe_tensor
from qwen_batched.inputs.faults import find_label_faults, refuse
from qwen_batched.inputs.given_features import grids_of_images, read_image_features
from qwen_batched.inputs.pytree_nodes import register_node
from qwen_batched.inputs.sequence import NO_LABEL

# In the order of `forward`'s arguments.
NAMES = (
    *("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels", "position_ids", "mm_token_type_ids"),
    *("inputs_embeds", "image_features"),
)
# What transformers' models take too, with the values that change no result of this package.
INERT = {
    "use_cache": (True, False),
    "output_attentions": (False,),
    "cache_position": checks.ANY_VALUE,
    **dict.fromkeys(("past_key_values", "head_mask", "rope_deltas"), ()),
    **dict.fromkeys(("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"), ()),
}
IMAGE_TYPE = 1  # of a token in `mm_token_type_ids`


@dataclass(frozen=True, eq=False)
class TransformersBatch:
    """A checked batch of B samples padded to S tokens, with N images.

    To PyTorch's pytrees its tensors are children, all else is the structure, hashable. Tensors are on the host or on
    `device`.
    """

    input_ids: Tensor | None  # int64 (B, S); None where only embeddings are given
    attention_mask: Tensor | None  # (B, S), 0 on padding; None where there is none
    pixel_values: Tensor | None  # (patches, patch_dim), image by image; None without images, or with features
    labels: Tensor | None  # int64 (B, S)
    position_ids: Tensor | None  # int64 (B, S), (3, B, S) or (4, B, S)
    mm_token_type_ids: Tensor | None  # (B, S), 1 on image tokens; looked at where the host has not checked it
    inputs_embeds: Tensor | None  # (B, S, D)
    features: Features | None  # of images, (h * w, D) each, in place of pixels
    grids: tuple[Grid, ...]  # of each image
    device: torch.device  # where the batch goes
    is_checked: bool  # whether the host has seen all values
    tokens: int | None  # how many tokens are not padding; None where only the device knows
    answer_tokens: int  # how many labels there are, or the most there can be

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        return tuple((self.inputs_embeds if self.input_ids is None else self.input_ids).shape[:2])


TENSORS = (*(name for name in NAMES if name not in ("image_grid_thw", "image_features")), "features")
# Whose values decide where tokens and images stand.
VALUES = ("input_ids", "attention_mask", "labels", "position_ids", "mm_token_type_ids")
FACTS = ("grids", "device", "is_checked", "tokens", "answer_tokens")


register_node(TransformersBatch, FACTS)


def read_transformers_batch(
    given: Mapping[str, Any], config: QwenVLConfig, device: torch.device, dtype: torch.dtype | None = None
) -> TransformersBatch:
    """The batch that transformers' processor made, and the caller's labels and positions.

    The grids are read: at no cost on the host, at that of one wait on a GPU. Everything else is checked here where it
    is on the host. `dtype` is what embeddings and image features must have, None for any. Raises `TypeError` or
    `ValueError`, before any work, where it is not a batch of this model.
    """
    for name in given.keys() - set(NAMES):
        checks.check_inert("forward", name, given[name], INERT)
    features = given.get("image_features")
    for name in given.keys() & set(NAMES) - {"image_features"}:
        if not isinstance(given[name], Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(given[name])}")
        checks.check_plain(name, given[name])
        checks.check_device(name, given[name], device)
    values = {name: given.get(name) for name in TENSORS}
    ids, mask, labels, embeds = (values[name] for name in ("input_ids", "attention_mask", "labels", "inputs_embeds"))
    if ids is not None:
        if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 (B, S), got {describe_tensor(ids)}")
        values["input_ids"] = ids.long()
    elif embeds is None:
        raise ValueError("input_ids must be int64 (B, S), got None")
    elif values["position_ids"] is None or "image_grid_thw" in given:
        needs = "position_ids" if values["position_ids"] is None else "input_ids, which say where images go"
        raise ValueError(f"inputs_embeds without input_ids needs {needs}, got none")
    if embeds is not None:
        checks.check_embeds("inputs_embeds", embeds, None if ids is None else ids.shape, config.text.hidden_size, dtype)
    size = _check_shapes(values)
    grids = _grids_of(given.get("image_grid_thw"), values["pixel_values"], features, config)
    if features is not None:
        values["features"] = read_image_features(features, grids, config.vision, dtype, device)
    read = [values[name] for name in VALUES if values[name] is not None]
    batch = TransformersBatch(
        **values,
        grids=grids,
        device=device,
        is_checked=can_read(*read),
        tokens=size if mask is None else int((mask != 0).sum()) if can_read(mask) else None,
        answer_tokens=0 if labels is None else int((labels != NO_LABEL).sum()) if can_read(labels) else size,
    )
    if batch.is_checked:
        layout = lay_out(batch, image_table(grids, torch.device("cpu")), config.image_token_id)
        found = faults(batch, layout, config)
        if labels is not None:
            found |= find_label_faults(labels, layout.mask, config.text.vocab_size)
        refuse("a batch", found)
    return batch


def _check_shapes(values: Mapping[str, Tensor | None]) -> int:
    """B * S."""
    ids = values["input_ids"]
    batch, length = (values["inputs_embeds"] if ids is None else ids).shape[:2]
    allowed = {
        "attention_mask": [(batch, length)],
        "labels": [(batch, length)],
        "mm_token_type_ids": [(batch, length)],
        "position_ids": [(batch, length), (3, batch, length), (4, batch, length)],
    }
    for name, shapes in allowed.items():
        value = values[name]
        if value is not None and tuple(value.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must be {expected} to fit input_ids, got {describe_tensor(value)}")
        is_mask = name in ("attention_mask", "mm_token_type_ids")
        if value is not None and not is_mask and value.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {describe_tensor(value)}")
        if value is not None and value.dtype.is_complex:
            raise ValueError(f"{name} must be bool or of numbers, got {describe_tensor(value)}")
    return batch * length


def read_grids(thw: Tensor, merge: int) -> tuple[Grid, ...]:
    """The grid of each image in merged cells of `merge` x `merge` patches, read from `image_grid_thw` (N, 3).

    Raises `ValueError` where it holds anything but still images in whole cells.
    """
    if thw.ndim != 2 or thw.shape[1] != 3 or thw.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"image_grid_thw must be int64 (N, 3), got {describe_tensor(thw)}")
    sizes = thw.tolist()
    for t, h, w in sizes:
        if t != 1 or h < merge or w < merge or h % merge or w % merge:
            expected = f"1, height and width in patches, multiples of {merge}"
            raise ValueError(f"image_grid_thw must hold {expected}, got {(t, h, w)}")
    return tuple((h // merge, w // merge) for _, h, w in sizes)


def check_patches(pixels: Tensor, grids: Sequence[Grid], vision: VisionConfig) -> None:
    """Raises `ValueError` where `pixel_values` are not the patches of images of these grids."""
    patches, width = sum(h * w for h, w in grids) * vision.cell_patches, vision.patch_dim
    floating = pixels.dtype.is_floating_point and pixels.dtype.itemsize > 1
    if tuple(pixels.shape) != (patches, width) or not floating:
        expected = f"floating ({patches}, {width}) to fit image_grid_thw"
        raise ValueError(f"pixel_values must be {expected}, got {describe_tensor(pixels)}")


def _grids_of(thw: Tensor | None, pixels: Tensor | None, features: object, config: QwenVLConfig) -> tuple[Grid, ...]:
    if pixels is not None and features is not None:
        raise ValueError("give either pixel_values or image_features, got both")
    if thw is None and (grids := grids_of_images(features)):
        return grids
    if (thw is None) != (pixels is None and features is None):
        raise ValueError("pixel_values or image_features and image_grid_thw must come together, got one of them")
    if thw is None:
        return ()
    if len(thw) == 0:
        raise ValueError("image_grid_thw must hold at least one image, got none")
    grids = read_grids(thw, config.vision.spatial_merge_size)
    if pixels is not None:
        check_patches(pixels, grids, config.vision)
    return grids


class Layout(NamedTuple):
    """Where tokens and images stand; each tensor (B, S) but the positions."""

    mask: Tensor  # bool, False on padding
    rope_positions: Tensor  # int64 (B, 3, S), 0 on padding
    camera_ids: Tensor  # int64, which of its sample's images a token belongs to, -1 elsewhere
    # Int64, which of all features, grid by grid, an image token stands for, -1 elsewhere.
    feature_index: Tensor
    is_image: Tensor  # bool, whether the id is that of an image token
    rank: Tensor  # int64, how many image tokens of the batch stand before one
    cell: Tensor  # int64, which of its image's cells an image token stands for
    is_last: Tensor  # bool, whether it stands for the last one


class ImageTable(NamedTuple):
    """Of each image, (N,) int64."""

    ends: Tensor  # the cells of it and of all images before it
    cells: Tensor
    widths: Tensor
    advances: Tensor  # how far the text behind it moves on
    features: Tensor  # the first of its features, grid by grid


def group_by_grid(grids: Sequence[Grid]) -> dict[Grid, list[int]]:
    """The images of each grid, grids in the order of their first images."""
    groups: dict[Grid, list[int]] = {}
    for image, grid in enumerate(grids):
        groups.setdefault(grid, []).append(image)
    return groups


def image_places(groups: Mapping[Grid, Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Of each image its group, and its row there."""
    places = {image: (group, row) for group, each in enumerate(groups.values()) for row, image in enumerate(each)}
    return tuple(places[image] for image in range(len(places)))


def image_table(grids: Sequence[Grid], device: torch.device) -> ImageTable:
    """What `lay_out` looks up of each image."""
    cells = [h * w for h, w in grids]
    features, begin = [0] * len(grids), 0
    for images in group_by_grid(grids).values():
        for image in images:
            features[image] = begin
            begin += cells[image]
    columns = [*itertools.accumulate(cells)], cells, [w for _, w in grids], [max(grid) for grid in grids], features
    return ImageTable(*torch.tensor(columns, dtype=torch.int64, device="cpu").to(device))


def lay_out(batch: TransformersBatch, table: ImageTable, image_token_id: int) -> Layout:
    """Where the tokens and images of a batch stand.

    Rope positions are those of transformers' `get_rope_index` for still images, see `reference.expand_prompts`, or the
    batch's own.
    """
    ids, mask, device = batch.input_ids, batch.attention_mask, table.ends.device
    mask = torch.ones(batch.shape, dtype=torch.bool, device=device) if mask is None else mask != 0
    is_image = torch.zeros_like(mask) if ids is None else ids == image_token_id
    rank = is_image.flatten().long().cumsum(0).view(mask.shape) - 1
    none = torch.full_like(rank, -1)
    if not batch.grids:
        first = mask.long().cumsum(1) - 1
        positions = first[:, None].expand(-1, 3, -1)
        cell, is_last, camera, feature = none, torch.zeros_like(mask), none, none
    else:
        image = torch.searchsorted(table.ends, rank.clamp(min=0), right=True).clamp_(max=len(batch.grids) - 1)
        cells = table.cells[image]
        cell = rank - table.ends[image] + cells
        is_last = is_image & (cell == cells - 1)
        advance = torch.where(is_image, table.advances[image] * is_last, 1) * mask
        first = advance.cumsum(1) - advance
        width = table.widths[image]
        row, column = (torch.where(is_image, place, 0) for place in (cell // width, cell % width))
        positions = torch.stack((first, first + row, first + column), dim=1)
        inside = is_image & (cell < cells)
        camera = torch.where(inside, (inside & (cell == 0)).long().cumsum(1) - 1, none)
        feature = torch.where(inside, table.features[image] + cell, none)
    if batch.position_ids is not None:
        given = batch.position_ids
        positions = given[:, None].expand(-1, 3, -1) if given.ndim == 2 else given[-3:].transpose(0, 1)
    return Layout(mask, positions.masked_fill(~mask[:, None], 0), camera, feature, is_image, rank, cell, is_last)


def faults(batch: TransformersBatch, layout: Layout, config: QwenVLConfig) -> dict[str, Tensor]:
    """What each sample (B,) does wrong, by what would be right."""
    rows = config.text.vocab_size
    mask, is_image, cell = layout.mask, layout.is_image, layout.cell
    total = sum(h * w for h, w in batch.grids)
    is_later = is_image & (cell > 0)
    goes_on = torch.zeros_like(mask)  # the token before is of the same image, and as visible
    goes_on[:, 1:] = is_image[:, :-1] & (mask[:, 1:] == mask[:, :-1])
    ends = torch.ones_like(mask)
    ends[:, :-1] = ~is_image[:, 1:]
    is_wrong = (is_later & ~goes_on) | (is_image & ends & ~layout.is_last) | (is_image & (layout.rank >= total))
    found = {
        "at least one token for each sample": ~mask.any(dim=1),
        "as many image tokens in input_ids as the images of image_grid_thw have cells, each image in one piece": (
            is_wrong.any(dim=1) | (is_image.sum() != total)
        ),
    }
    if (ids := batch.input_ids) is not None:
        found[f"input_ids from 0 to {rows - 1}"] = ((ids < 0) | (ids >= rows)).any(dim=1)
    if batch.mm_token_type_ids is not None and ids is not None:
        types = torch.where(is_image, IMAGE_TYPE, 0)
        found["mm_token_type_ids of 1 on image tokens and 0 elsewhere"] = (batch.mm_token_type_ids != types).any(dim=1)
    text = _text_positions(batch.position_ids)
    if text is not None and batch.attention_mask is None and batch.position_ids.ndim == 3:
        # So transformers tells where a sequence begins.
        found["text positions that rise by 1 along a row, since several sequences in one are not supported"] = (
            text.diff(dim=1) != 1
        ).any(dim=1)
    elif text is not None:
        # Of visible tokens only: what stands on padding counts for the token before.
        highest = text.masked_fill(~mask, torch.iinfo(text.dtype).min).cummax(dim=1).values
        found["position_ids that rise along a row, since several sequences in one are not supported"] = (
            mask & (text < highest)
        ).any(dim=1)
    return found


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Those by which transformers tells packed sequences apart, (B, S); None where it does not."""
    if position_ids is None or (position_ids.ndim == 3 and len(position_ids) == 3):
        return None
    return position_ids if position_ids.ndim == 2 else position_ids[0]

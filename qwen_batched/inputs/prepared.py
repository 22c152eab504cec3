"""A batch as `TensorProcessor` gives it to data loaders, and back to what the model runs on.

Every tensor of it has B first and memory of its own, so that whoever moves, pins, cuts, joins or stores batches cannot
break one. What only the host knows travels beside them, as numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import Batch, FeatureMaps, Features, Grid
from qwen_batched.inputs.checks import IMAGE_NAMES, TEXT_NAMES, can_read
from qwen_batched.inputs.faults import find_label_faults, make_safe, refuse
from qwen_batched.inputs.given_features import batch_size, grids_of, hide_absent, read_features
from qwen_batched.inputs.sequence import NO_LABEL
from qwen_batched.runtime.host_copies import to_device

MARKER = "prepared"
BESIDE_IMAGES = ("raster_order", "camera_present")
FEATURE_NAMES = ("image_features", "deep_features")
NAMES = {*TEXT_NAMES, *IMAGE_NAMES, *FEATURE_NAMES, "inputs_embeds", "camera_present", "labels", MARKER}
# Of batches that earlier releases made: told apart from transformers' by these.
EARLIER_NAMES = {"token_index", "answer_index", "raster_order", "feature_index", "camera_ids", "camera_present"}


class HostFacts(dict):
    """What the host knows of a batch, and the mark of a batch that `TensorProcessor` prepared.

    A mapping without items. Libraries that cut or join the tensors of a batch build each mapping in it anew from its
    items, and so forget what is no longer true: then the host counts again, or the device does without. The two facts
    are those of a `Batch`.
    """

    def __init__(
        self, items: Collection[Any] = (), tokens: int | None = None, answer_tokens: int | None = None
    ) -> None:
        super().__init__()
        if len(items):
            raise ValueError(f"HostFacts holds no items, got {len(items)}")
        self.tokens, self.answer_tokens = tokens, answer_tokens

    def to(self, *arguments: Any, **keywords: Any) -> HostFacts:
        """Itself: `{name: value.to(device) for ...}` moves a batch."""
        return self

    def __getitem__(self, rows: object) -> HostFacts:
        """Of some of the batch's rows: `{name: value[:2] for ...}` cuts a batch."""
        return HostFacts()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostFacts) and vars(self) == vars(other)

    def __reduce__(self) -> tuple[type[HostFacts], tuple[tuple[()], int | None, int | None]]:
        return HostFacts, ((), self.tokens, self.answer_tokens)

    def __repr__(self) -> str:
        return f"HostFacts(tokens={self.tokens}, answer_tokens={self.answer_tokens})"


torch.serialization.add_safe_globals([HostFacts])  # so that torch.load reads a stored batch without pickle's dangers


def prepare(batch: Batch, raster_orders: Sequence[Tensor]) -> dict[str, Tensor | list[Tensor] | HostFacts]:
    """The prepared form of a batch that `TensorProcessor.batch` made, with `raster_order` (h, w) of each camera."""
    prepared: dict[str, Any] = {}
    for name in (*TEXT_NAMES, "labels"):
        if (value := getattr(batch, name)) is not None:
            prepared[name] = value.contiguous()
    pixels = batch.pixel_values
    if batch.as_list and isinstance(pixels, Tensor):
        # Of one sample the parts are contiguous as they are, and share their memory.
        pixels = [part.clone(memory_format=torch.contiguous_format) for part in pixels.unbind(1)]
    if isinstance(pixels, Tensor):
        prepared["pixel_values"] = pixels.contiguous()
        prepared["raster_order"] = raster_orders[0].repeat(len(pixels), 1, 1)
    elif pixels is not None:
        prepared["pixel_values"] = [part.contiguous() for part in pixels]
        pairs = zip(pixels, raster_orders, strict=True)
        prepared["raster_order"] = [order.repeat(len(part), 1, 1) for part, order in pairs]
    if batch.features is not None:
        prepared |= _prepared_features(batch.features)
    if batch.camera_present is not None:
        prepared["camera_present"] = batch.camera_present.clone(memory_format=torch.contiguous_format)
    if batch.input_ids is not None:  # a batch of images only goes to the vision transformer, which takes nothing else
        prepared[MARKER] = HostFacts(tokens=batch.tokens, answer_tokens=batch.answer_tokens)
    return prepared


def _prepared_features(features: Features) -> dict[str, Tensor | list[Tensor]]:
    """The entries of a prepared batch with B first; deep features stand behind each other in one tensor."""

    def copied(maps: Sequence[FeatureMaps]) -> Tensor | list[Tensor]:
        if isinstance(maps[0], Tensor):
            return torch.stack(list(maps), dim=1)
        return [torch.stack(cameras, dim=1) for cameras in zip(*maps, strict=True)]

    own = partial(torch.clone, memory_format=torch.contiguous_format)
    main = features.main
    main = own(main) if isinstance(main, Tensor) else [own(camera) for camera in main]
    return {"image_features": main} | ({"deep_features": copied(features.deep)} if features.deep else {})


def _given_features(batch: Mapping[str, Any]) -> FeatureMaps | Features | None:
    """The way back; or `Features` as the caller gave them beside the batch."""
    main, deep = batch.get("image_features"), batch.get("deep_features")
    if deep is None:
        return main
    parts, ndim = ([deep], 6) if isinstance(deep, Tensor) else (deep, 5)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(x, Tensor) and x.ndim == ndim for x in parts):
        found = checks.describe_tensor(deep) if isinstance(deep, Tensor) else shown(deep)
        raise ValueError(f"deep_features must be (B, L, V, h, w, D), or a list of (B, L, h, w, D), got {found}")
    if len(counts := sorted({x.shape[1] for x in parts})) > 1:
        raise ValueError(f"deep_features must have the same L for each camera, got {counts}")
    if isinstance(deep, Tensor):
        return Features(main, list(deep.unbind(1)))
    return Features(main, [list(maps) for maps in zip(*(camera.unbind(1) for camera in deep), strict=True)])


def check_prepared(batch: Collection[str]) -> None:
    """Raises `TypeError` or `ValueError` where `batch` holds not all of a prepared one, or more."""
    if MARKER not in batch:
        if "raster_order" in batch and "input_ids" not in batch:
            raise ValueError(f"a prepared batch must hold texts, got {sorted(batch)}: give them to the processor")
        raise ValueError(
            f"a prepared batch must hold {MARKER!r}, got one without: keep every entry of the processor's batch, "
            "not only tensors, or prepare it again if an earlier release made it"
        )
    if unknown := sorted(batch - NAMES):
        raise TypeError(f"a prepared batch holds {sorted(NAMES)}, got also {unknown}")


def restore(
    batch: Mapping[str, Any], config: QwenVLConfig, device: torch.device, dtype: torch.dtype | None = None
) -> Batch:
    """What the model runs on, on `device`; from pinned memory without a wait.

    `dtype` is what embeddings and image features must have, None for any.

    Facts of tensors on the host are checked here, those of others by `check_on_device`. Raises `TypeError` or
    `ValueError`, before any work, where the batch is not what a processor returned for frames and texts of this model.
    """
    grids = _check_fields(batch, config, device)
    features, embeds = _given_features(batch), batch.get("inputs_embeds")
    if features is not None:
        features = read_features(features, config.vision, dtype, device)
        grids = _check_features(features, batch)
    if embeds is not None:
        checks.check_embeds("inputs_embeds", embeds, batch["input_ids"].shape, config.text.hidden_size, dtype)
        checks.check_device("inputs_embeds", embeds, device)
    input_ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch.get("labels")
    facts: HostFacts = batch[MARKER]
    tokens = _count(mask, facts.tokens, input_ids.numel())
    answers = None if labels is None else _count(labels != NO_LABEL, facts.answer_tokens, labels.numel())
    layout = {name: batch[name] for name in (*TEXT_NAMES, "labels", "camera_present") if name in batch}
    is_checked = can_read(*layout.values())
    if is_checked:
        refuse("a prepared batch", _faults(layout, grids, config, tokens) | _label_faults(layout, config, answers))

    pixels = batch.get("pixel_values")
    as_list = isinstance(pixels if features is None else features.main, (list, tuple))
    if pixels is not None and as_list and len(set(grids)) == 1:
        pixels = torch.stack(list(pixels), dim=1)
    if isinstance(pixels, Tensor):
        pixels = pixels.to(device, non_blocking=True)
    elif pixels is not None:
        pixels = [part.to(device, non_blocking=True) for part in pixels]
    layout = {name: value.to(device, non_blocking=True) for name, value in layout.items()}
    if features is not None:
        features = hide_absent(to_device(features, device), layout.get("camera_present"))
    return Batch(
        **layout,
        pixel_values=pixels,
        features=features,
        inputs_embeds=None if embeds is None else to_device(embeds, device),
        grids=tuple(grids),
        as_list=as_list,
        is_checked=is_checked,
        tokens=tokens,
        is_padded=not (can_read(mask) and tokens == mask.numel()),
        answer_tokens=answers,
    )


def check_on_device(batch: Batch, config: QwenVLConfig) -> Batch:
    """A batch that `restore` could not read, made safe."""
    if batch.is_checked:
        return batch
    layout = {name: getattr(batch, name) for name in (*TEXT_NAMES, "labels", "camera_present")}
    layout = {name: value for name, value in layout.items() if value is not None}
    found = _faults(layout, batch.grids, config, batch.tokens)
    of_labels = _label_faults(layout, config, batch.answer_tokens)
    return make_safe(batch, found, of_labels, config.text.vocab_size, sum(h * w for h, w in batch.grids))


def _check_features(features: Features, batch: Mapping[str, Any]) -> Sequence[Grid]:
    """The grid of each camera, where features fit the rest of the batch."""
    found, size = grids_of(features), len(batch["input_ids"])
    if batch_size(features) != size:
        raise ValueError(f"image_features must be of {size} samples to fit input_ids, got {batch_size(features)}")
    orders = batch.get("raster_order")  # of the frames that they are in place of
    if orders is not None:
        wanted = [tuple(order.shape[1:]) for order in ([orders] if isinstance(orders, Tensor) else orders)]
        if (wanted * len(found) if isinstance(orders, Tensor) else wanted) != [*found]:
            raise ValueError(f"image_features must be of the grids {wanted} of raster_order, got {[*found]}")
    if "camera_present" in batch:
        _check_tensor("camera_present", batch["camera_present"], (size, len(found)), torch.bool)
    return found


def _check_fields(batch: Mapping[str, Any], config: QwenVLConfig, device: torch.device) -> Sequence[Grid]:
    """Checks all that can be seen without a look at values; the grid of each camera's image."""
    if not isinstance(batch[MARKER], HostFacts):
        raise TypeError(f"{MARKER} must be what the processor returned, got {type(batch[MARKER]).__name__}")
    has_images, has_features = "pixel_values" in batch, "image_features" in batch
    if has_images and has_features:
        raise ValueError("give either pixel_values or image_features, got both")
    expected = (*TEXT_NAMES, *(IMAGE_NAMES if has_images else ()))
    missing = [name for name in expected if name not in batch]
    stray = [] if has_images or has_features else [name for name in (*BESIDE_IMAGES, *FEATURE_NAMES) if name in batch]
    if missing or stray:
        raise ValueError(f"a prepared batch must hold {expected}, got {sorted(batch)}")
    for name in batch.keys() - {MARKER}:
        parts = batch[name] if name in IMAGE_NAMES and isinstance(batch[name], list | tuple) else [batch[name]]
        for part in parts:
            if isinstance(part, Tensor):
                checks.check_plain(name, part)
                checks.check_device(name, part, device)
    input_ids = batch["input_ids"]
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be (B, S), got {checks.describe_tensor(input_ids)}")
    size, length = input_ids.shape
    for name in (*TEXT_NAMES, *(("labels",) if "labels" in batch else ())):
        shape = (size, 3, length) if name == "rope_positions" else (size, length)
        _check_tensor(name, batch[name], shape, torch.bool if name == "attention_mask" else torch.int64)
    if not has_images:
        return []
    sizes = config.vision.patch_dim, config.vision.cell_patches, size
    grids = checks.check_pixels(batch["pixel_values"], batch["raster_order"], *sizes)
    if "camera_present" in batch:
        _check_tensor("camera_present", batch["camera_present"], (size, len(grids)), torch.bool)
    return grids


def _check_tensor(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape} to fit input_ids, got {checks.describe_tensor(value)}")


def _count(marks: Tensor, known: int | None, most: int) -> int:
    """How many are marked: counted on the host; elsewhere what the host knew, or the most there can be."""
    if can_read(marks):
        return max(1, int(marks.sum()))
    return most if known is None else max(1, min(known, most))


def _faults(
    layout: Mapping[str, Tensor], grids: Sequence[Grid], config: QwenVLConfig, tokens: int
) -> dict[str, Tensor]:
    """What each sample (B,) does wrong, by what would be right.

    Where image tokens stand decides everything else. So it is worked out again, by the rule of
    `reference.expand_prompts`, and compared.
    """
    ids_BS, mask_BS = layout["input_ids"], layout["attention_mask"]
    device, (size, _) = ids_BS.device, ids_BS.shape
    present_BV = layout.get("camera_present", torch.ones(size, len(grids), dtype=torch.bool, device=device))
    is_image_BS = mask_BS & (ids_BS == config.image_token_id)
    is_text_BS = mask_BS & ~is_image_BS
    images_before_BS = is_image_BS.long().cumsum(1) - is_image_BS.long()
    position_BS = is_text_BS.long().cumsum(1) - is_text_BS.long()
    row_BS, column_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS)
    feature_BS, camera_BS = (torch.full_like(ids_BS, -1) for _ in range(2))
    begin_B, feature = torch.zeros(size, dtype=torch.int64, device=device), 0
    for camera, (h, w) in enumerate(grids):  # as numbers: a table of them would have to be copied to the device
        end_B = begin_B + present_BV[:, camera] * (h * w)
        cell_BS = images_before_BS - begin_B[:, None]
        inside_BS = is_image_BS & (cell_BS >= 0) & (images_before_BS < end_B[:, None])
        # What stands behind the image is max(h, w) further.
        behind_BS = present_BV[:, camera, None] & (images_before_BS >= end_B[:, None])
        position_BS = position_BS + behind_BS * max(h, w)
        row_BS = torch.where(inside_BS, cell_BS // w, row_BS)
        column_BS = torch.where(inside_BS, cell_BS % w, column_BS)
        feature_BS = torch.where(inside_BS, feature + cell_BS, feature_BS)
        camera_BS = camera_BS.masked_fill(inside_BS, camera)
        begin_B, feature = end_B, feature + h * w
    positions_B3S = torch.stack((position_BS, position_BS + row_BS, position_BS + column_BS), dim=1)
    positions_B3S = positions_B3S.masked_fill(~mask_BS[:, None], 0)

    rows = config.text.vocab_size
    return {
        "at least one token for each sample": ~mask_BS.any(dim=1),
        f"input_ids from 0 to {rows - 1}": ((ids_BS < 0) | (ids_BS >= rows)).any(dim=1),
        "as many image tokens in input_ids as its images have cells": is_image_BS.sum(dim=1) != begin_B,
        "the camera_ids of its image tokens": (layout["camera_ids"] != camera_BS).any(dim=1),
        "the feature_index of its image tokens": (layout["feature_index"] != feature_BS).any(dim=1),
        "the rope_positions of its tokens": (layout["rope_positions"] != positions_B3S).any(dim=2).any(dim=1),
        "no more tokens than were counted": mask_BS.sum(dim=1).cumsum(0) > tokens,
    }


def _label_faults(layout: Mapping[str, Tensor], config: QwenVLConfig, answers: int | None) -> dict[str, Tensor]:
    """The same of labels, where there are any."""
    if "labels" not in layout:
        return {}
    labels_BS = layout["labels"]
    return {
        **find_label_faults(labels_BS, layout["attention_mask"], config.text.vocab_size),
        "no more labels than were counted": (labels_BS != NO_LABEL).sum(dim=1).cumsum(0) > answers,
    }

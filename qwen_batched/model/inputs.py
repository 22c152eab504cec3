"""What callers may pass: every check of frames, texts, masks and sizes, made before any work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from qwen_batched.arguments import as_int, integer, shown
from qwen_batched.model.geometry import MAX_ASPECT_RATIO
from qwen_batched.model.sequence import NO_LABEL

TEXT_NAMES = ("input_ids", "attention_mask", "position_ids", "camera_ids", "feature_index")
IMAGE_NAMES = ("pixel_values", "raster_order")
LABEL_NAMES = ("labels", "answer_index")
Resize = str | tuple[int, int] | None


def check_frames(images: Tensor | Sequence[Tensor], min_side: int) -> list[Tensor]:
    """`images` as groups of cameras of one size, (B, V_g, 3, H, W) each, in camera order.

    Raises:
        TypeError: `images` is neither a tensor nor a list of tensors.
        ValueError: Its shape, dtype or device is not as the contract says.
    """
    if isinstance(images, Tensor):
        if images.ndim != 5:
            raise ValueError(f"images must be (B, n_cameras, 3, H, W), got {images.ndim} dimensions {_shape(images)}")
        groups = [images]
    elif isinstance(images, (list, tuple)) and all(isinstance(frames, Tensor) for frames in images):
        if not images:
            raise ValueError("images must hold at least one camera, got an empty list")
        for camera, frames in enumerate(images):
            if frames.ndim != 4:
                raise ValueError(
                    f"images[{camera}] must be (B, 3, H, W), got {frames.ndim} dimensions {_shape(frames)}"
                )
        groups = [frames[:, None] for frames in images]
    else:
        raise TypeError(f"images must be a tensor or a list of tensors, got {_describe(images)}")
    for group in groups:
        _check_group(group, min_side)
    batches, devices = [group.shape[0] for group in groups], {group.device for group in groups}
    if len(set(batches)) > 1:
        raise ValueError(f"all cameras must have the same batch size, got {batches}")
    if len(devices) > 1:
        raise ValueError(f"all cameras must be on one device, got {sorted(map(str, devices))}")
    return groups


def _check_group(frames: Tensor, min_side: int) -> None:
    batch, cameras, channels, height, width = frames.shape
    if width == 3 or channels != 3:
        hint = "; this looks like channels last" if width == 3 else ""
        raise ValueError(f"images must have 3 channels before height and width, got {_shape(frames)}{hint}")
    if batch == 0 or cameras == 0:
        raise ValueError(f"images must hold at least one sample and one camera, got {_shape(frames)}")
    if frames.layout != torch.strided:
        raise ValueError(f"images must be dense, got {frames.layout}")
    if frames.dtype != torch.uint8 and not frames.dtype.is_floating_point:
        raise ValueError(f"images must be uint8 (0..255) or floating (0..1), got {frames.dtype}")
    if min(height, width) < min_side:
        raise ValueError(f"images must be at least {min_side} x {min_side} pixels, got {height} x {width}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"images must have an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}")


def check_texts(texts: Sequence[str], batch: int | None) -> int:
    """The number of texts. Raises `TypeError` or `ValueError` where it is not a list of `batch` strings."""
    _check_strings("texts", texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got an empty list")
    if batch is not None and len(texts) != batch:
        raise ValueError(f"texts must hold one text per sample, got {len(texts)} texts for {batch} samples of images")
    return len(texts)


def check_targets(targets: Sequence[str], texts: Sequence[str] | None) -> None:
    """Raises `TypeError` or `ValueError` where `targets` is not a list of one string for each of `texts`."""
    if texts is None:
        raise ValueError("targets need texts that they answer, got texts=None")
    _check_strings("targets", targets)
    if len(targets) != len(texts):
        raise ValueError(f"targets must hold one answer per text, got {len(targets)} answers for {len(texts)} texts")


def _check_strings(name: str, strings: Sequence[str]) -> None:
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise TypeError(f"{name} must be a list of str, got {_describe(strings)}")
    for index, string in enumerate(strings):
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise ValueError(f"{name}[{index}] must be Unicode text, got half of a surrogate pair in {shown(string)}")


def check_camera_mask(camera_mask: Tensor, batch: int, cameras: int, device: torch.device) -> None:
    """Raises `TypeError` or `ValueError` where the mask is not bool (batch, cameras) on the host or on `device`."""
    if not isinstance(camera_mask, Tensor):
        raise TypeError(f"camera_mask must be a bool tensor, got {_describe(camera_mask)}")
    if camera_mask.dtype != torch.bool or camera_mask.shape != (batch, cameras):
        raise ValueError(
            f"camera_mask must be bool ({batch}, {cameras}), got {camera_mask.dtype} {_shape(camera_mask)}"
        )
    check_device("camera_mask", camera_mask, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises `ValueError` where `tensor` is neither on the host nor on `device`."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name} must be on the host or on {device}, got {tensor.device}")


def check_resize(resize: Resize, factor: int) -> None:
    """Raises `TypeError` or `ValueError` where `resize` is not "hf", None or a size in multiples of `factor`."""
    if resize is None or (isinstance(resize, str) and resize == "hf"):
        return
    if not isinstance(resize, (tuple, list)) or len(resize) != 2 or not all(map(_is_int, resize)):
        raise TypeError(f"resize must be 'hf', None or (height, width) in pixels, got {shown(resize)}")
    if any(side < factor or side % factor for side in resize):
        raise ValueError(f"resize must be multiples of {factor} pixels, got {tuple(resize)}")


def check_chunk_size(chunk_size: int | None) -> int | None:
    """`chunk_size`. Raises `TypeError` or `ValueError` where it is neither None nor an int of at least 1."""
    if chunk_size is None:
        return None
    if not _is_int(chunk_size):
        raise TypeError(f"chunk_size must be None or an int, got {shown(chunk_size)}")
    return as_int("chunk_size", chunk_size, 1)


def resolve_layers(layers: Sequence[int], size: int) -> list[int]:
    """`layers` as indices 0 to `size` - 1; negative ones count from the end.

    Raises:
        TypeError: `layers` is not a list or tuple of ints.
        ValueError: It is empty, or an index is out of range.
    """
    if not isinstance(layers, (list, tuple)) or any(type(layer) is not int for layer in layers):
        if not isinstance(layers, (list, tuple)) or not all(map(_is_int, layers)):
            raise TypeError(f"layers must be a list or tuple of ints, got {shown(layers)}")
        layers = [integer(layer) for layer in layers]  # NumPy's
    if not layers or not all(-size <= layer < size for layer in layers):
        raise ValueError(f"layers must be one or more indices from {-size} to {size - 1}, got {tuple(layers)}")
    return [layer % size for layer in layers]


def _is_int(value: object) -> bool:
    return type(value) is int or type(integer(value)) is int


def check_norm(norm: str) -> None:
    """Raises `ValueError` where `norm` is neither "post" nor "pre"."""
    if norm not in ("post", "pre"):
        raise ValueError(f"norm must be 'post' or 'pre', got {shown(norm)}")


def check_logits(logits: str | None) -> None:
    """Raises `ValueError` where `logits` is neither None nor "last" nor "all"."""
    if logits not in (None, "last", "all"):
        raise ValueError(f"logits must be None, 'last' or 'all', got {shown(logits)}")


def check_given(name: str, value: object, kind: str) -> None:
    """Raises `TypeError` where `value` is None."""
    if value is None:
        raise TypeError(f"{name} must be {kind}, got None")


def check_decoder_inputs(
    inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, token_index: Tensor | None, width: int
) -> None:
    """Raises `ValueError` where the decoder's inputs do not fit together, or not its `width`."""
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != width:
        raise ValueError(f"inputs_embeds must be (B, S, {width}), got {_shape(inputs_embeds)}")
    batch, length = inputs_embeds.shape[:2]
    if position_ids.shape != (3, batch, length) or attention_mask.shape != (batch, length):
        raise ValueError(
            f"inputs_embeds {_shape(inputs_embeds)} needs position_ids (3, {batch}, {length}) and attention_mask "
            f"({batch}, {length}), got {_shape(position_ids)} and {_shape(attention_mask)}"
        )
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool, got {attention_mask.dtype}")
    if token_index is not None:
        _check_index("token_index", token_index, batch * length)


def check_hidden_states(hidden_states: Tensor, width: int) -> None:
    """Raises `ValueError` where `hidden_states` do not have the model's `width`."""
    if hidden_states.shape[-1:] != (width,):
        raise ValueError(f"hidden_states must be (..., {width}), got {_shape(hidden_states)}")


def _check_index(name: str, index: object, places: int) -> None:
    fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1
    if not fits or not 0 < index.numel() <= places:
        raise ValueError(f"{name} must be torch.int64 (T,) with 1 to {places} tokens, got {_describe_tensor(index)}")


def check_batch_names(names: Collection[str]) -> None:
    """Raises `TypeError` where there are names that no processor's batch has."""
    unknown = sorted(set(names) - {*TEXT_NAMES, *IMAGE_NAMES, *LABEL_NAMES, "token_index", "camera_present"})
    if unknown:
        raise TypeError(f"forward() got unexpected arguments {unknown}")


def check_batch_alone(
    batch: Collection[str],
    images: object,
    texts: object,
    camera_mask: object,
    targets: object,
    template: str,
    resize: Resize,
) -> None:
    """Raises `TypeError` or `ValueError` where a processor's batch comes with what shapes one when it is made."""
    check_batch_names(batch)
    if images is not None or texts is not None:
        raise ValueError("give either images and texts or a processor's batch, got both")
    if camera_mask is not None or targets is not None or template != "chat" or resize != "hf":
        raise ValueError(
            "camera_mask, targets, template and resize shape a batch when the processor makes it, not later"
        )


def check_batch(batch: Mapping[str, object], patch_dim: int, cell_patches: int, vocab_size: int) -> None:
    """Raises `TypeError` or `ValueError` where `batch` is not what a processor returned for frames and texts."""
    check_batch_names(batch)
    has_images = "pixel_values" in batch
    has_labels = any(name in batch for name in LABEL_NAMES)
    expected = (
        *TEXT_NAMES,
        "token_index",
        *(IMAGE_NAMES if has_images else ()),
        *(LABEL_NAMES if has_labels else ()),
    )
    missing = [name for name in expected if name not in batch]
    stray = [name for name in ("raster_order", "camera_present") if name in batch and not has_images]
    if missing or stray:
        raise ValueError(f"a processor's batch must hold {expected}, got {sorted(batch)}")
    input_ids = batch["input_ids"]
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (B, S), got {_describe_tensor(input_ids)}")
    for name in TEXT_NAMES:
        shape = (3, *input_ids.shape) if name == "position_ids" else tuple(input_ids.shape)
        _check_tensor(name, batch[name], shape, torch.bool if name == "attention_mask" else torch.int64)
    _check_index("token_index", batch["token_index"], input_ids.numel())
    if has_labels:
        _check_tensor("labels", batch["labels"], tuple(input_ids.shape), torch.int64)
        _check_index("answer_index", batch["answer_index"], input_ids.numel())
        _check_labels(batch["labels"], batch["answer_index"], vocab_size)
    mask = batch["attention_mask"]
    if mask.device.type == "cpu" and mask.sum() > batch["token_index"].numel():
        raise ValueError(
            f"token_index must hold every token of attention_mask, got {len(batch['token_index'])} of {mask.sum()}"
        )
    if has_images:
        cameras = check_pixels(batch["pixel_values"], batch["raster_order"], patch_dim, cell_patches, len(input_ids))
        if "camera_present" in batch:
            _check_tensor("camera_present", batch["camera_present"], (len(input_ids), cameras), torch.bool)


def _check_labels(labels: Tensor, answer_index: Tensor, vocab_size: int) -> None:
    """Of tensors on the host alone: elsewhere nothing is read back."""
    if labels.device.type == answer_index.device.type == "cpu":
        if not 0 <= answer_index.min() <= answer_index.max() < labels.numel():
            raise ValueError(f"answer_index must hold places in 0..{labels.numel() - 1}, got others")
        uses = torch.zeros_like(labels).flatten().index_add(0, answer_index, torch.ones_like(answer_index))
        if (uses > 1).any():
            raise ValueError(f"answer_index must hold each place once, got one twice in {len(answer_index)}")
        wrong = (labels != NO_LABEL) & ((labels < 0) | (labels >= vocab_size))
        if wrong.any():
            raise ValueError(f"labels must be {NO_LABEL} or 0 to {vocab_size - 1}, got {wrong.sum()} others")
        outside = labels.flatten().index_fill(0, answer_index, NO_LABEL) != NO_LABEL
        if outside.any():
            raise ValueError(f"answer_index must hold the places of all labels, got labels at {outside.sum()} others")


def check_pixels(
    pixel_values: object, raster_order: object, patch_dim: int, cell_patches: int, batch: int | None = None
) -> int:
    """The number of cameras. Raises `ValueError` where pixels and grids do not fit together or to `batch` samples."""
    if isinstance(pixel_values, Tensor):
        if not isinstance(raster_order, Tensor) or raster_order.ndim != 3:
            raise ValueError(f"raster_order must be (V, h, w), got {_describe_tensor(raster_order)}")
        cameras, h, w = raster_order.shape
        _check_pixel_tensor(pixel_values, (batch, cameras, h * w * cell_patches, patch_dim))
        return cameras
    if not isinstance(pixel_values, (list, tuple)) or not isinstance(raster_order, (list, tuple)):
        raise ValueError("pixel_values and raster_order must both be tensors or both be lists of one per camera")
    if len(pixel_values) != len(raster_order) or not pixel_values:
        raise ValueError(f"expected a raster_order per camera, got {len(raster_order)} for {len(pixel_values)} cameras")
    for pixels, order in zip(pixel_values, raster_order, strict=True):
        if not isinstance(order, Tensor) or order.ndim != 2:
            raise ValueError(f"raster_order must be (h, w) for each camera, got {_describe_tensor(order)}")
        batch = pixels.shape[0] if batch is None and isinstance(pixels, Tensor) and pixels.ndim else batch
        _check_pixel_tensor(pixels, (batch, order.numel() * cell_patches, patch_dim))
    return len(pixel_values)


def _check_pixel_tensor(pixels: object, shape: tuple[int | None, ...]) -> None:
    fits = isinstance(pixels, Tensor) and pixels.dtype.is_floating_point and pixels.ndim == len(shape)
    if not fits or any(want not in (None, got) for want, got in zip(shape, pixels.shape, strict=True)):
        wanted = ", ".join("B" if side is None else str(side) for side in shape)
        raise ValueError(
            f"pixel_values must be floating ({wanted}) to fit raster_order, got {_describe_tensor(pixels)}"
        )


def _check_tensor(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or _shape(value) != shape or value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape} to fit input_ids, got {_describe_tensor(value)}")


def _describe_tensor(value: object) -> str:
    return f"{value.dtype} {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {sorted({type(item).__name__ for item in value})}"
    return type(value).__name__

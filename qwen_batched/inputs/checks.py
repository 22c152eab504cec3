"""What callers may pass: every check of frames, texts, masks and sizes, made before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qwen_batched.arguments import as_int, integer, shown
from qwen_batched.checkpoint.config import MAX_FRAME_PIXELS
from qwen_batched.inputs.batch import Grid

TEXT_NAMES = ("input_ids", "attention_mask", "rope_positions", "camera_ids", "feature_index")
IMAGE_NAMES = ("pixel_values", "raster_order")
ANY_VALUE = object()  # of an argument that never changes a result
Resize = str | tuple[int, int] | None
MAX_ASPECT_RATIO = 200
# Bicubic resizing overshoots by less, so frames that were resized before pass; frames in 0..255 do not.
FLOAT_RANGE = (-0.5, 1.5)
_SURROGATES = re.compile("[\ud800-\udfff]")


def check_frames(images: Tensor | Sequence[Tensor], min_side: int) -> list[Tensor]:
    """`images` as groups of cameras of one size, (B, V_g, 3, H, W) each, in camera order.

    Raises `TypeError` where `images` is neither a tensor nor a list of tensors, `ValueError` where its shape, dtype or
    device is not as the contract says.
    """
    if isinstance(images, Tensor):
        check_plain("images", images)
        if images.ndim != 5:
            raise ValueError(f"images must be (B, n_cameras, 3, H, W), got {images.ndim} dimensions {_shape(images)}")
        groups = [images]
    elif isinstance(images, (list, tuple)) and all(isinstance(frames, Tensor) for frames in images):
        if not images:
            raise ValueError("images must hold at least one camera, got an empty list")
        for camera, frames in enumerate(images):
            check_plain(f"images[{camera}]", frames)
            if (ndim := frames.ndim) != 4:
                raise ValueError(f"images[{camera}] must be (B, 3, H, W), got {ndim} dimensions {_shape(frames)}")
        groups = [frames[:, None] for frames in images]
    else:
        raise TypeError(f"images must be a tensor or a list of tensors, got {_describe(images)}")
    for group in groups:
        _check_group(group, min_side)
    if len(groups) > 1:
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
    if frames.dtype != torch.uint8 and not (frames.dtype.is_floating_point and frames.dtype.itemsize > 1):
        raise ValueError(f"images must be uint8 (0..255) or floating (0..1), got {frames.dtype}")
    if min(height, width) < min_side:
        raise ValueError(f"images must be at least {min_side} x {min_side} pixels, got {height} x {width}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"images must have an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}")


def check_texts(texts: Sequence[str] | str, batch: int | None) -> Sequence[str]:
    """The texts as a list, of one for a string. Raises `TypeError` or `ValueError` where not `batch` strings."""
    if isinstance(texts, str):
        texts = [texts]
    _check_strings("texts", texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got an empty list")
    if batch is not None and len(texts) != batch:
        raise ValueError(f"texts must hold one text per sample, got {len(texts)} texts for {batch} samples of images")
    return texts


def check_targets(targets: Sequence[str] | str, texts: Sequence[str] | None) -> Sequence[str]:
    """The same of targets. Raises `TypeError` or `ValueError` where they are not one string for each of `texts`."""
    if texts is None:
        raise ValueError("targets need texts that they answer, got texts=None")
    if isinstance(targets, str):
        targets = [targets]
    _check_strings("targets", targets)
    if len(targets) != len(texts):
        raise ValueError(f"targets must hold one answer per text, got {len(targets)} answers for {len(texts)} texts")
    return targets


def is_text(value: object) -> bool:
    """Whether `value` could be meant as texts: a string, or a list of them alone."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value))


def check_system(system: str | None, texts: Sequence[str] | None, template: str) -> None:
    """Raises `TypeError` or `ValueError` where `system` is neither None nor a string for the chat template."""
    if system is None:
        return
    if texts is None:
        raise ValueError("system needs texts that it stands before, got texts=None")
    if not isinstance(system, str):
        raise TypeError(f"system must be None or a str, got {_describe(system)}")
    if template != "chat":
        raise ValueError(f"system is the chat template's system text and needs template='chat', got {template!r:.200}")
    check_unicode("system", system)


def _check_strings(name: str, strings: Sequence[str]) -> None:
    # Of strings of a class of their own each is looked at.
    if not isinstance(strings, (list, tuple)) or not (
        {*map(type, strings)} <= {str} or all(isinstance(string, str) for string in strings)
    ):
        raise TypeError(f"{name} must be a list of str, got {_describe(strings)}")
    for index, string in enumerate(strings):
        if not string.isascii():
            check_unicode(f"{name}[{index}]", string)


def check_unicode(name: str, string: str) -> None:
    """Raises `ValueError` where `string` holds half of a surrogate pair, which no tokenizer takes."""
    if not string.isascii() and _SURROGATES.search(string):
        raise ValueError(f"{name} must be Unicode text, got half of a surrogate pair in {shown(string)}")


def check_float_range(groups: Sequence[Tensor], camera_mask: Tensor | None) -> None:
    """Raises `ValueError` where floating frames on the host are not in 0..1.

    Values that are not finite pass: they spoil their own sample. So do absent cameras' frames, which change nothing.
    """
    low, high = FLOAT_RANGE
    cameras = 0
    for frames in groups:
        here = slice(cameras, cameras := cameras + frames.shape[1])
        # A functional transform or a mode hides values.
        is_hidden = type(frames) is not Tensor or torch._C._functorch.maybe_current_level() is not None
        if not frames.dtype.is_floating_point or frames.device.type != "cpu" or is_hidden:
            continue
        frames = frames.detach()
        least, most = frames.aminmax()
        if low <= least and most <= high:
            continue
        if camera_mask is not None:
            if camera_mask.device.type != "cpu":
                continue
            frames = frames[camera_mask[:, here]]
        outside = frames[(frames < low) | (frames > high)]
        outside = outside[outside.isfinite()]
        if outside.numel():
            raise ValueError(
                f"floating images must be in 0..1, got {float(outside[0]):g}: divide frames in 0..255 by 255, or give "
                "them as uint8; undo a normalisation"
            )


def check_camera_mask(camera_mask: Tensor, batch: int, cameras: int, device: torch.device) -> None:
    """Raises `TypeError` or `ValueError` where the mask is not bool (batch, cameras) on the host or on `device`."""
    if not isinstance(camera_mask, Tensor):
        raise TypeError(f"camera_mask must be a bool tensor, got {_describe(camera_mask)}")
    check_plain("camera_mask", camera_mask)
    if camera_mask.dtype != torch.bool or camera_mask.shape != (batch, cameras):
        raise ValueError(f"camera_mask must be bool ({batch}, {cameras}), got {describe_tensor(camera_mask)}")
    check_device("camera_mask", camera_mask, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises `ValueError` where `tensor` is neither on the host nor on `device`."""
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(f"{name} must be on the host or on {device}, got {tensor.device}")


def check_plain(name: str, tensor: Tensor) -> None:
    """Raises `ValueError` where `tensor` is not dense, or has no values."""
    kind = None
    if tensor.is_nested:
        kind = "a nested tensor"
    elif tensor.layout != torch.strided:
        kind = str(tensor.layout)
    elif tensor.is_quantized:
        kind = str(tensor.dtype)
    elif tensor.device.type == "meta":
        kind = "one on the meta device"
    elif isinstance(tensor, FakeTensor) and not torch._C._len_torch_dispatch_stack():
        kind = "a fake tensor outside its mode"
    if kind is not None:
        raise ValueError(f"{name} must be a dense tensor with values, got {kind}")


def can_read(*tensors: Tensor) -> bool:
    """Whether values can be read without waiting for a device, or breaking a compiler's graph."""
    return not torch.compiler.is_compiling() and all(tensor.device.type == "cpu" for tensor in tensors)


def check_dtype(dtype: object) -> torch.dtype:
    """Raises `TypeError` or `ValueError` where `dtype` is no floating dtype of 16 bits or more."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}")
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype must be floating, of 16 bits or more, got {dtype}")
    return dtype


def check_resize(resize: Resize, factor: int) -> Resize:
    """`resize` with plain ints.

    Raises `TypeError` where it is not "hf", None or a pair of ints, `ValueError` where the size is not in multiples of
    `factor`, or above `MAX_FRAME_PIXELS`.
    """
    if resize is None or (isinstance(resize, str) and resize == "hf"):
        return resize
    sides = [integer(side) for side in resize] if isinstance(resize, (tuple, list)) else []
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise TypeError(f"resize must be 'hf', None or (height, width) in pixels, got {shown(resize)}")
    height, width = sides
    if any(side < factor or side % factor for side in (height, width)):
        raise ValueError(f"resize must be multiples of {factor} pixels, got {shown((height, width))}")
    if height * width > MAX_FRAME_PIXELS:
        raise ValueError(f"resize must ask for fewer than 2**31 pixels a frame, got {shown((height, width))}")
    return height, width


def check_chunk_size(chunk_size: int | None) -> int | None:
    """`chunk_size` as an int. Raises `TypeError` or `ValueError` where it is neither None nor at least 1."""
    if chunk_size is None:
        return None
    if type(integer(chunk_size)) is not int:
        raise TypeError(f"chunk_size must be None or an int, got {shown(chunk_size)}")
    return as_int("chunk_size", chunk_size, 1)


def resolve_layers(layers: Sequence[int], size: int, name: str = "layers") -> list[int]:
    """`layers` as indices 0 to `size` - 1; negative ones count from the end.

    Raises `TypeError` where `layers` is not a list or tuple of ints, `ValueError` where it is empty, or an index is out
    of range.
    """
    given, resolved = [], []
    for layer in layers if isinstance(layers, (list, tuple)) else (None,):
        given.append(layer if type(layer) is int else integer(layer))
        if type(given[-1]) is not int:
            raise TypeError(f"{name} must be a list or tuple of ints, got {shown(layers)}")
        resolved.append(given[-1] % size)
    if not given or min(given) < -size or max(given) >= size:
        raise ValueError(f"{name} must be one or more indices from {-size} to {size - 1}, got {shown(layers)}")
    return resolved


def check_choice(name: str, value: str | None, *choices: str | None) -> None:
    """Raises `ValueError` where `value` is none of them."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}")


def check_inert(function: str, name: str, value: object, inert: Mapping[str, object]) -> None:
    """Raises where an argument of transformers' `function` may change a result.

    `inert` holds, by name, the values besides None at which it does not. Raises `TypeError` for an unknown name,
    `ValueError` for another value.
    """
    if name not in inert:
        raise TypeError(f"{function}() got an unexpected argument {name!r}")
    if inert[name] is not ANY_VALUE and (isinstance(value, Tensor) or value not in inert[name]):
        raise ValueError(f"{name} is not supported: it must be None, got {shown(value)}")


def check_item_count(count: int | Tensor) -> None:
    """Raises `TypeError` or `ValueError` where `num_items_in_batch` is no number above 0, or tensor of one."""
    if isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"num_items_in_batch must be one number, got {describe_tensor(count)}")
    elif isinstance(count, bool) or not isinstance(count, (int, float)):
        raise TypeError(f"num_items_in_batch must be a number, got {shown(count)}")
    elif count <= 0:
        raise ValueError(f"num_items_in_batch must be above 0, got {count}")


def check_embeds(name: str, embeds: Tensor, shape: Sequence[int] | None, width: int, dtype: torch.dtype | None) -> None:
    """Raises `TypeError` or `ValueError` where `embeds` are not (*shape, width) in `dtype`; None for any."""
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name} must be a tensor, got {_describe(embeds)}")
    check_plain(name, embeds)
    expected = ("B", "S") if shape is None else tuple(shape)
    fits = embeds.ndim == 3 and (shape is None or tuple(embeds.shape[:2]) == expected)
    if not fits or embeds.shape[2] != width or embeds.numel() == 0:
        raise ValueError(f"{name} must be ({', '.join(map(str, (*expected, width)))}), got {describe_tensor(embeds)}")
    check_floating(name, embeds, dtype)


def check_floating(name: str, x: Tensor, dtype: torch.dtype | None) -> None:
    """Raises `ValueError` where `x` is not of the model's `dtype`; None for any floating one."""
    if not x.dtype.is_floating_point or (dtype is not None and x.dtype != dtype):
        raise ValueError(f"{name} must be {dtype or 'floating'}, the model's dtype, got {x.dtype}")


def check_room(length: int, new_tokens: int, most: int) -> None:
    """Raises `ValueError` where a prompt of `length` tokens and its new ones exceed the model's maximum."""
    if length + new_tokens > most:
        raise ValueError(f"prompt and new tokens must fit into {most} tokens, got {length} and {new_tokens}")


def check_given(name: str, value: object, kind: str) -> None:
    """Raises `TypeError` where `value` is None."""
    if value is None:
        raise TypeError(f"{name} must be {kind}, got None")


def check_decoder_inputs(
    inputs_embeds: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    tokens: int | None,
    like: Tensor,
    is_padded: bool = True,
) -> None:
    """Raises `TypeError` or `ValueError` where the decoder's inputs do not fit together, or its embedding `like`."""
    named = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "attention_mask": attention_mask}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_describe(tensor)}")
        check_plain(name, tensor)
        if tensor.device != inputs_embeds.device:
            check_same_device(name, [tensor], inputs_embeds)
    check_same_device("inputs_embeds", [inputs_embeds], like)
    width = like.shape[-1]
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != width or inputs_embeds.numel() == 0:
        raise ValueError(f"inputs_embeds must be (B, S, {width}), got {_shape(inputs_embeds)}")
    batch, length = inputs_embeds.shape[:2]
    if position_ids.shape != (3, batch, length) or attention_mask.shape != (batch, length):
        raise ValueError(
            f"inputs_embeds {_shape(inputs_embeds)} needs position_ids (3, {batch}, {length}) and attention_mask "
            f"({batch}, {length}), got {_shape(position_ids)} and {_shape(attention_mask)}"
        )
    dtypes = attention_mask.dtype, position_ids.dtype
    if dtypes != (torch.bool, torch.int64):
        raise ValueError(f"attention_mask must be bool and position_ids int64, got {dtypes[0]} and {dtypes[1]}")
    _check_activations("inputs_embeds", inputs_embeds, like)
    if tokens is not None:
        tokens = as_int("tokens", tokens, 1, batch * length)
        if can_read(attention_mask) and attention_mask.sum() > tokens:
            raise ValueError(f"tokens must count all of attention_mask, got {tokens} for {attention_mask.sum()}")
    if not is_padded and can_read(attention_mask) and (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
        raise ValueError("attention_mask must have padding at the end of rows only with is_padded=False, got it before")


def check_same_device(name: str, tensors: Sequence[Tensor], parameter: Tensor) -> None:
    """Raises `ValueError` where one of `tensors` is not where `parameter` is; one that is offloaded comes to them."""
    for tensor in tensors:
        if tensor.device != parameter.device and not parameter.is_meta:
            raise ValueError(f"{name} must be on {parameter.device}, got {tensor.device}")


def _check_activations(name: str, x: Tensor, parameter: Tensor) -> None:
    """Products need one dtype; autocast casts, and sharded parameters are cast when they are used."""
    if type(parameter) is nn.Parameter and x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must be {parameter.dtype}, the model's dtype, got {x.dtype}")


def check_hidden_states(hidden_states: Tensor, like: Tensor) -> None:
    """Raises `TypeError` or `ValueError` where `hidden_states` are not as wide as the model's embedding `like`."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states must be a tensor, got {_describe(hidden_states)}")
    check_plain("hidden_states", hidden_states)
    if hidden_states.shape[-1:] != like.shape[-1:]:
        raise ValueError(f"hidden_states must be (..., {like.shape[-1]}), got {_shape(hidden_states)}")
    check_same_device("hidden_states", [hidden_states], like)
    _check_activations("hidden_states", hidden_states, like)


def check_pixels(
    pixel_values: object, raster_order: object, patch_dim: int, cell_patches: int, batch: int | None = None
) -> Sequence[Grid]:
    """The grid of each camera's image, in merged cells, as shapes say it.

    Of `pixel_values` (B, V, P, patch_dim) or V tensors (B, P_v, patch_dim), and `raster_order` (B, h, w) or one for
    each camera, or the grids themselves, pairs of ints; of a list the tensors may then differ in how many images they
    hold. Raises `ValueError` where they do not fit together, or not to `batch` samples; None for the first tensor's.
    """
    uniform = isinstance(pixel_values, Tensor)
    if not uniform and not isinstance(pixel_values, (list, tuple)):
        raise ValueError("pixel_values and raster_order must both be tensors or both be lists of one per camera")
    pixels = [pixel_values] if uniform else pixel_values
    for part in pixels:
        if not isinstance(part, Tensor):
            raise ValueError(f"pixel_values must be tensors, got {_describe(part)}")
        check_plain("pixel_values", part)
    if uniform and pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be (B, V, P, patch_dim), got {describe_tensor(pixel_values)}")
    cameras = pixel_values.shape[1:2] if uniform else ()
    if type(raster_order) is tuple and raster_order and type(raster_order[0]) is tuple:
        grids, counts = raster_order, [part.shape[0] if batch is None and part.ndim else batch for part in pixels]
        if len(grids) != (cameras or (len(pixels),))[0] or (uniform and len(set(grids)) > 1):
            raise ValueError(f"expected a grid per camera, one for all of a tensor, got {shown(grids)}")
    else:
        orders = _raster_orders(raster_order, uniform, len(pixels))
        batch = orders[0].shape[0] if batch is None else batch
        for order in orders:
            if order.shape[0] != batch:
                raise ValueError(f"raster_order must be of {batch} samples, got {describe_tensor(order)}")
        grids = [(order.shape[1], order.shape[2]) for order in orders] * (cameras or (1,))[0]
        counts = [batch] * len(pixels)
    for part, count, (h, w) in zip(
        pixels, counts, grids, strict=False
    ):  # of a tensor, the first grid is every camera's
        shape, floating = (count, *cameras, h * w * cell_patches, patch_dim), part.dtype.is_floating_point
        if tuple(part.shape) != shape or part.numel() == 0 or not (floating and part.dtype.itemsize > 1):
            raise ValueError(f"pixel_values must be floating {shape} to fit raster_order, got {describe_tensor(part)}")
    return grids


def _raster_orders(raster_order: object, uniform: bool, count: int) -> Sequence[Tensor]:
    """`raster_order` as one tensor for each of `count` tensors of pixels."""
    if isinstance(raster_order, Tensor) != uniform or not isinstance(raster_order, (Tensor, list, tuple)):
        raise ValueError("pixel_values and raster_order must both be tensors or both be lists of one per camera")
    orders = [raster_order] if uniform else raster_order
    if len(orders) != count or not count:
        raise ValueError(f"expected a raster_order per camera, got {len(orders)} for {count} cameras")
    for order in orders:
        if not isinstance(order, Tensor):
            raise ValueError(f"raster_order must be tensors, got {_describe(order)}")
        check_plain("raster_order", order)
        if order.ndim != 3 or order.dtype != torch.int64 or order.numel() == 0:
            raise ValueError(f"raster_order must be int64 (B, h, w), got {describe_tensor(order)}")
    return orders


def describe_tensor(value: object) -> str:
    """Dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _describe(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {sorted({type(item).__name__ for item in value})}"
    return type(value).__name__

"""Image features that a caller gives in place of frames: today's of `encode_images`, or last month's from disk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.inputs.batch import FeatureMaps, Features, Grid, without_absent
from qwen_batched.inputs.checks import check_device, check_floating, check_plain, describe_tensor


def read_features(given: object, vision: VisionConfig, dtype: torch.dtype | None, device: torch.device) -> Features:
    """Features of cameras, (B, V, h, w, D) or V tensors (B, h, w, D), and as many deep ones as the model has.

    On the host or on `device`, as given. Raises `TypeError` or `ValueError` where they are not; `dtype` is the model's,
    None where any will do.
    """
    features = _with_deep(given, vision)
    for name, maps in _named(features):
        is_list = not isinstance(maps, Tensor)
        if is_list and not isinstance(maps, (list, tuple)):
            raise TypeError(f"{name} must be a tensor or a list of one for each camera, got {shown(maps)}")
        if is_list and not maps:
            raise ValueError(f"{name} must hold at least one camera, got an empty list")
        for camera in maps if is_list else [maps]:
            _check(name, camera, 4 if is_list else 5, vision.out_hidden_size, dtype, device)
        sizes = [len(camera) for camera in maps] if is_list else []
        if len(set(sizes)) > 1:
            raise ValueError(f"{name} must be of one batch size, got {sizes}")
        if _shapes(maps) != _shapes(features.main):
            raise ValueError(f"{name} must have the shapes of the main features, got {_shapes(maps)}")
    return features


def grids_of(features: Features) -> tuple[Grid, ...]:
    """The grid of each camera."""
    main = features.main
    if isinstance(main, Tensor):
        return (tuple(main.shape[2:4]),) * main.shape[1]
    return tuple(tuple(camera.shape[1:3]) for camera in main)


def batch_size(features: Features) -> int:
    """B."""
    return len(features.main) if isinstance(features.main, Tensor) else len(features.main[0])


def hide_absent(features: Features, camera_present: Tensor | None) -> Features:
    """Features with zeros for cameras that are absent, by (B, V), as `encode_images` gives them; None where none is."""
    main, *deep = (without_absent(maps, camera_present) for maps in (features.main, *features.deep))
    return Features(main, deep)


def grids_of_images(given: object) -> tuple[Grid, ...]:
    """The grid of each image where `given` says it, as one (h, w, D) for each; otherwise empty."""
    maps = given.main if isinstance(given, Features) else given
    if isinstance(maps, (list, tuple)) and all(isinstance(image, Tensor) and image.ndim == 3 for image in maps):
        return tuple(tuple(image.shape[:2]) for image in maps)
    return ()


def read_image_features(
    given: Any, grids: Sequence[Grid], vision: VisionConfig, dtype: torch.dtype | None, device: torch.device
) -> Features:
    """Features of images of these grids, one (h * w, D) each, and as many lists of deep ones as the model has.

    Given as one (h, w, D) or (h * w, D) for each image, as (T, D) of all images back to back, or as what transformers'
    `get_image_features` returns. Errors as of `read_features`.
    """
    if hasattr(given, "pooler_output"):
        given = Features(given.pooler_output, list(getattr(given, "deepstack_features", None) or []))
    elif type(given) is tuple and len(given) == 2 and all(isinstance(part, (list, tuple)) for part in given):
        given = Features(*given)  # as before transformers 5
    named = _named(_with_deep(given, vision))
    main, *deep = (_of_images(name, maps, grids, vision, dtype, device) for name, maps in named)
    return Features(main, deep)


def stack_by_grid(features: Features, groups: Mapping[Grid, Sequence[int]]) -> Features:
    """Features of images, (h * w, D) each, as one (N_g, h, w, D) for each grid."""

    def stack(maps: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack([maps[i] for i in images]).unflatten(1, grid) for grid, images in groups.items()]

    return Features(stack(features.main), [stack(maps) for maps in features.deep])


def _of_images(
    name: str,
    maps: FeatureMaps,
    grids: Sequence[Grid],
    vision: VisionConfig,
    dtype: torch.dtype | None,
    device: torch.device,
) -> list[Tensor]:
    sizes = [h * w for h, w in grids]
    if isinstance(maps, Tensor):
        _check(name, maps, 2, vision.out_hidden_size, dtype, device)
        if len(maps) != sum(sizes):
            raise ValueError(f"{name} must have {sum(sizes)} rows to fit image_grid_thw, got {describe_tensor(maps)}")
        return list(maps.split(sizes))
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of one for each image, got {shown(maps)}")
    if len(maps) != len(grids):
        raise ValueError(f"{name} must hold one tensor for each of {len(grids)} images, got {len(maps)}")
    for image, (h, w) in zip(maps, grids, strict=True):
        expected = 3 if isinstance(image, Tensor) and image.ndim == 3 else 2
        _check(name, image, expected, vision.out_hidden_size, dtype, device)
        if tuple(image.shape[:-1]) not in ((h, w), (h * w,)):
            raise ValueError(f"{name} must be of the grid {(h, w)} of image_grid_thw, got {describe_tensor(image)}")
    return [image.reshape(-1, image.shape[-1]) for image in maps]


def _with_deep(given: object, vision: VisionConfig) -> Features:
    """`given` with as many deep features as the model has."""
    features = given if isinstance(given, Features) else Features(given, [])
    if not isinstance(features.main, (Tensor, list, tuple)):
        raise TypeError(f"image_features must be a tensor, a list of tensors or Features, got {shown(given)}")
    wanted = len(vision.deepstack_visual_indexes or ())
    if not isinstance(features.deep, (list, tuple)) or len(features.deep) != wanted:
        found = len(features.deep) if isinstance(features.deep, (list, tuple)) else shown(features.deep)
        expected = "Features with no deep ones" if not wanted else f"Features with {wanted} deep ones"
        hint = "; encode_images(..., deepstack=True) returns them" if wanted else ""
        raise ValueError(f"image_features of this model must be {expected}, got {found}{hint}")
    return features


def _named(features: Features) -> list[tuple[str, Any]]:
    return [("image_features", features.main), *zip(itertools.repeat("image_features.deep"), features.deep)]


def _check(name: str, x: object, ndim: int, width: int, dtype: torch.dtype | None, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be tensors, got {shown(x)}")
    check_plain(name, x)
    check_device(name, x, device)
    shape = {2: "(h * w, {})", 3: "(h, w, {})", 4: "(B, h, w, {})", 5: "(B, V, h, w, {})"}[ndim].format(width)
    if x.ndim != ndim or x.shape[-1] != width or x.numel() == 0:
        raise ValueError(f"{name} must be {shape}, got {describe_tensor(x)}")
    check_floating(name, x, dtype)


def _shapes(maps: FeatureMaps) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in ([maps] if isinstance(maps, Tensor) else maps)]

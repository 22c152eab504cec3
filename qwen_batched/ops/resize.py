"""Bicubic resize as transformers' image processors do it, on a CPU to the last bit.

There they resize uint8 images with Pillow, or with a kernel of PyTorch's that follows it: one axis at a time, in fixed
point, rounding to whole pixels after each. Formulas are those of Pillow's Resample.c.
"""

from __future__ import annotations

import functools
import math
from importlib.metadata import version

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

PILLOW, TORCHVISION = RESAMPLE_BACKENDS = ("pillow", "torchvision")
PRECISION_BITS = 22
CUBIC_SUPPORT, CUBIC_A = 2.0, -0.5
MAX_AXES = 256


def resize(frames: Tensor, height: int, width: int, resample_backend: str) -> Tensor:
    """Bicubic resize with antialiasing, as transformers' image processors do it on the same device.

    uint8 frames stay whole numbers: on a GPU torchvision rounds once, after both axes; on a CPU Pillow and torchvision
    round after each axis, which moves about one value in six by 1. Floating frames are never rounded.

    Args:
        frames: (I, 3, H, W), uint8 in 0..255 or floating.
        height, width: Of the result.
        resample_backend: One of `RESAMPLE_BACKENDS`: whose pixels uint8 frames on a CPU get.

    Returns:
        (I, 3, height, width) in float32 (float64 for float64 frames): 0..255 for uint8 frames, the frames' own range
        (beyond which bicubic may overshoot) otherwise.

    Raises:
        ValueError: `resample_backend` is unknown.
    """
    check_resample_backend(resample_backend)
    if frames.shape[-2:] == (height, width):
        return widen(frames)
    if frames.dtype != torch.uint8:
        return _interpolate(widen(frames), height, width)
    if frames.is_cuda:
        return _interpolate(widen(frames), height, width).round_().clamp_(0, 255)
    if resample_backend == PILLOW:
        return widen(_pillow_resize(frames, height, width))
    return widen(_interpolate(frames, height, width))  # PyTorch's uint8 kernel, which torchvision calls


def check_resample_backend(resample_backend: str) -> None:
    """Raises `ValueError` where it is none of `RESAMPLE_BACKENDS`."""
    if not isinstance(resample_backend, str) or resample_backend not in RESAMPLE_BACKENDS:
        raise ValueError(f"resample_backend must be one of {RESAMPLE_BACKENDS}, got {resample_backend!r}")


def _interpolate(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[0] == 0:  # which PyTorch refuses on a GPU
        return pixels.new_empty(*pixels.shape[:2], height, width)
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _pillow_resize(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 frames (..., H, W) to (..., height, width), as int32 in 0..255."""
    pixels = frames.int()
    for dim, _, target in _pillow_steps(tuple(frames.shape[-2:]), (height, width)):
        pixels = _resize_axis(pixels, dim, target)
    return pixels


def pillow_matrices(source: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, Tensor]]:
    """The same resize as products of matrices: of each step its dimension and its weights, float64 (target, source).

    After each, `round_pillow` makes pixels of the product. In float64 all sums are exact.
    """
    steps = []
    for dim, old, new in _pillow_steps(source, target):
        sources, weights = _axis_table(old, new)
        steps.append((dim, torch.zeros(new, old, dtype=torch.float64, device="cpu").scatter_add_(1, sources, weights)))
    return steps


def round_pillow(products: Tensor) -> Tensor:
    """Whole pixels, in float64, of products with `pillow_matrices`."""
    half, unit = 1 << (PRECISION_BITS - 1), 1 << PRECISION_BITS
    return ((products + half) * (1 / unit)).floor().clamp(0, 255)


def _pillow_steps(source: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Dimension, old and new size of each axis that changes, in Pillow's order."""
    saved_rows, saved_columns = (old - new for old, new in zip(source, target, strict=True))
    rows_first = _pillow_chooses_the_axis() and saved_rows > 0 and saved_rows > 2 * saved_columns
    steps = [(dim, source[dim], target[dim]) for dim in ((-2, -1) if rows_first else (-1, -2))]
    return [step for step in steps if step[1] != step[2]]


@functools.cache
def _pillow_chooses_the_axis() -> bool:
    """Since 13, Pillow may begin with the rows; before, it began with the columns."""
    return Version(version("pillow")) >= Version("13")


def _resize_axis(pixels: Tensor, dim: int, target: int) -> Tensor:
    sources, weights = _axis_table(pixels.shape[dim], target)
    rows = pixels.movedim(dim, 0)
    # Weighted sums of a few rows each. In float64, sums of these integers are exact.
    total = F.embedding_bag(sources, rows.flatten(1).double(), per_sample_weights=weights, mode="sum")
    rounded = (total.long() + (1 << (PRECISION_BITS - 1))) >> PRECISION_BITS
    return rounded.clamp_(0, 255).int().view(target, *rows.shape[1:]).movedim(0, dim)


@functools.lru_cache(MAX_AXES)
def _axis_table(source: int, target: int) -> tuple[Tensor, Tensor]:
    """The source pixels of each target pixel, and their weights in units of 2**-22, each (target, taps)."""
    scale = source / target
    stretch = max(scale, 1.0)
    support = CUBIC_SUPPORT * stretch
    centres = (torch.arange(target, dtype=torch.float64, device="cpu") + 0.5) * scale
    starts = (centres - support + 0.5).trunc().clamp(min=0).long()
    ends = (centres + support + 0.5).trunc().clamp(max=source).long()
    sources = starts[:, None] + torch.arange(2 * math.ceil(support) + 1, device="cpu")
    weights = _cubic((sources - centres[:, None] + 0.5) / stretch) * (sources < ends[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True)
    fixed = (weights * (1 << PRECISION_BITS) + torch.where(weights < 0, -0.5, 0.5)).trunc()
    return sources.clamp(max=source - 1), fixed


def _cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel (Keys 1981) with a = -0.5."""
    x, a = x.abs(), CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))

"""Pillow's bicubic resize of uint8 images, in PyTorch and to the last bit.

transformers' image processors resize on the CPU with Pillow, or with a kernel of PyTorch's that follows it: one axis at
a time, in fixed point, rounding to whole pixels after each. Formulas are those of Pillow's Resample.c.
"""

from __future__ import annotations

import functools
import math
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import Tensor

PRECISION_BITS = 22
CUBIC_SUPPORT, CUBIC_A = 2.0, -0.5
MAX_AXES = 256


def resize_uint8(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 frames (..., H, W) to (..., height, width), as int32 in 0..255."""
    saved_rows, saved_columns = frames.shape[-2] - height, frames.shape[-1] - width
    rows_first = _pillow_chooses_the_axis() and saved_rows > 0 and saved_rows > 2 * saved_columns
    pixels = frames.int()
    for dim in (-2, -1) if rows_first else (-1, -2):
        target = height if dim == -2 else width
        if pixels.shape[dim] != target:
            pixels = _resize_axis(pixels, dim, target)
    return pixels


@functools.cache
def _pillow_chooses_the_axis() -> bool:
    """Since 13, Pillow may begin with the rows; before, it began with the columns."""
    return Version(version("pillow")) >= Version("13")


def _resize_axis(pixels: Tensor, dim: int, target: int) -> Tensor:
    starts, weights = _axis_table(pixels.shape[dim], target)
    # Rows in front: then each tap copies whole rows instead of picking single pixels.
    rows = pixels.movedim(dim, 0)
    shape = (target, *rows.shape[1:])
    rows = rows.flatten(1)
    last = rows.shape[0] - 1
    total = torch.full((target, rows.shape[1]), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=rows.device)
    for tap, weight in enumerate(weights):
        total += rows.index_select(0, (starts + tap).clamp(max=last)) * weight[:, None]
    return (total >> PRECISION_BITS).clamp_(0, 255).view(shape).movedim(0, dim)


@functools.lru_cache(MAX_AXES)
def _axis_table(source: int, target: int) -> tuple[Tensor, Tensor]:
    """First source pixel of each target pixel (target,), and int32 weights of those from there (taps, target)."""
    with torch.device("cpu"):
        return _make_axis_table(source, target)


def _make_axis_table(source: int, target: int) -> tuple[Tensor, Tensor]:
    scale = source / target
    stretch = max(scale, 1.0)
    support = CUBIC_SUPPORT * stretch
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale
    starts = (centres - support + 0.5).trunc().clamp(min=0).long()
    ends = (centres + support + 0.5).trunc().clamp(max=source).long()
    sources = starts + torch.arange(2 * math.ceil(support) + 1)[:, None]
    weights = _cubic((sources - centres + 0.5) / stretch) * (sources < ends)
    weights = weights / weights.sum(dim=0)
    fixed = (weights * (1 << PRECISION_BITS) + torch.where(weights < 0, -0.5, 0.5)).trunc().int()
    return starts, fixed


def _cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel (Keys 1981) with a = -0.5."""
    x, a = x.abs(), CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))

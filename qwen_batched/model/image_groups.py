"""Images of several sizes back to back, and their way back to rows, columns and cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from qwen_batched.inputs.batch import without_absent
from qwen_batched.model.geometry import VisionPlan


@dataclass(frozen=True)
class ImageGroup:
    """`count` images of one size, back to back: `tokens` in all."""

    count: int
    plan: VisionPlan
    tokens: int


def without_leading(x: Tensor | None, groups: Sequence[ImageGroup]) -> Tensor | None:
    """The tokens of all images, (T, C), without their leading ones; None stays None."""
    if x is None or groups[0].plan.leading == 0:
        return x
    parts = zip(x.split([group.tokens for group in groups]), groups, strict=True)
    return join([part.unflatten(0, (group.count, -1))[:, group.plan.leading :].flatten(0, 1) for part, group in parts])


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts back to back; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def to_raster(x: Tensor, group: ImageGroup, patch_rows: int) -> Tensor:
    """Tokens of a group in window order to (count, rows, columns, width); a cell has `patch_rows` x `patch_rows`."""
    h, w = group.plan.raster_order.shape
    cells = rearrange(x, "(i m a) c -> i m a c", i=group.count, a=patch_rows**2)
    cells = cells.index_select(1, group.plan.raster_order.flatten())
    return rearrange(cells, "i (h w) (y x) c -> i (h y) (w x) c", h=h, w=w, y=patch_rows, x=patch_rows)


def by_camera(images: list[Tensor], batch: int, camera_mask: Tensor | None, uniform: bool) -> Tensor | list[Tensor]:
    """One (B * V, h, w, D) to (B, V, h, w, D); one (B, h, w, D) per camera stays so. Absent cameras become zero."""
    return without_absent(images[0].unflatten(0, (batch, -1)) if uniform else images, camera_mask)

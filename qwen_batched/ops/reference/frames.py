"""Camera frames as patches. See the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from qwen_batched.ops.resize import resize


def frames_to_patches(
    frames: Tensor,
    height: int,
    width: int,
    resize_tables: Sequence[Tensor] | None,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
    dtype: torch.dtype,
    resample_backend: str,
) -> Tensor:
    """Camera frames (I, 3, H, W) to patches (I, P, 3 * repeat * patch_size**2) of `dtype`.

    `resize.resize` to `height` x `width`, then `patchify`; see there for the other arguments.

    Args:
        resize_tables: Those of `geometry.resize_axis`, the width's two and the height's two, from which a kernel
            resizes; None where the frames have their size, or no kernel is to resize them. Not used here.
    """
    pixels = resize(frames, height, width, resample_backend)
    return patchify(pixels, scale, mean, std, window_order, patch_size, merge, repeat).to(dtype)


def patchify(
    pixels: Tensor,
    scale: float,
    mean: Tensor,
    std: Tensor,
    window_order: Tensor,
    patch_size: int,
    merge: int,
    repeat: int,
) -> Tensor:
    """Normalises frames and cuts them into the vision transformer's patches, in window order.

    Args:
        pixels: (I, 3, H, W), floating; H and W are multiples of `patch_size * merge`.
        scale: Brings `pixels` to 0..1.
        mean, std: (3, 1, 1), of pixels in 0..1.
        window_order: (M,) the raster index of the merged cell at each place, from `VisionPlan`.
        patch_size, merge: Side of a patch in pixels, and of a merged cell in patches.
        repeat: Temporal patch size; a still image is repeated over it.

    Returns:
        (I, P, 3 * repeat * patch_size**2). Inside a merged cell patches are in raster order; inside a patch, values are
        ordered by channel, time, row, column.
    """
    pixels = (pixels * scale - mean) / std
    cells = rearrange(
        pixels, "i c (h mh ph) (w mw pw) -> i (h w) (mh mw) c ph pw", mh=merge, mw=merge, ph=patch_size, pw=patch_size
    )
    cells = cells.index_select(1, window_order)[:, :, :, :, None]
    return cells.expand(-1, -1, -1, -1, repeat, -1, -1).flatten(1, 2).flatten(2)

"""frames_to_patches: camera frames resized, normalised and cut into patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.backend import refuse_forced_triton
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


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
    """See `reference.frames_to_patches`."""
    way = route((frames,))
    if resize_tables is None and tuple(frames.shape[-2:]) != (height, width):
        refuse_forced_triton("its kernel resizes by tables, and got none")
        way = REFERENCE
    arguments = (frames, height, width, resize_tables, scale, mean, std, window_order, patch_size, merge, repeat)
    if way == REFERENCE:
        return reference.frames_to_patches(*arguments, dtype, resample_backend)
    return (_forward.kernel if way == KERNEL else _forward.traced)(*arguments, dtype, resample_backend)


_forward = Operator(
    "frames_to_patches(Tensor frames, SymInt height, SymInt width, Tensor[]? resize_tables, float scale, Tensor mean, "
    "Tensor std, Tensor window_order, int patch_size, int merge, int repeat, ScalarType dtype, "
    "str resample_backend) -> Tensor",
    fake=lambda frames, height, width, tables, scale, mean, std, order, patch, merge, repeat, dtype, backend: (
        frames.new_empty(frames.shape[0], height * width // patch**2, 3 * repeat * patch**2, dtype=dtype)
    ),
)

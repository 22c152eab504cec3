"""Camera frames to patches: resize along rows, then resize along columns, round, normalise and cut in one pass.

See `reference.frames_to_patches`. Frames are read once, patches written once; between the passes stands a float32 array
of the frames at their new width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_batched.ops.triton.launch import cdiv, launch, next_power_of_2, pdl_wait

# H200, 24 uint8 frames 480x640 to 448x448: width 66 us (4 rows of 128 columns 88 us), height 100 us (4 to 8 warps).
WIDTH_ROWS, WIDTH_BLOCK, WIDTH_WARPS = 2, 512, 4
CELL_WARPS = 4
# Unrolled, all loads of a pixel are in flight at once (188 us in all against 225 us); a 4K frame shrunk to 224 has 75.
MAX_UNROLLED_TAPS = 32


@triton.jit
def _add_tap(total, pixels, weights, inside):
    pixel = tl.load(pixels, mask=inside, other=0).to(tl.float32)
    return total + pixel * tl.load(weights, mask=inside, other=0.0)


@triton.jit
def _resize_width_kernel(
    frames_ptr,
    starts_ptr,
    weights_ptr,
    out_ptr,
    rows,
    width_in,
    width_out,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (first_row + row < rows) & (x < width_out)[None, :]
    pdl_wait(USE_PDL)
    start = tl.load(starts_ptr + x, mask=x < width_out, other=0)
    pixels = frames_ptr + first_row * width_in + (row * width_in + start[None, :])
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    weights = weights_ptr + x[None, :]
    if UNROLL:
        for tap in tl.static_range(TAPS):
            total = _add_tap(total, pixels + tap, weights + tap * width_out, inside)
    else:
        for tap in range(TAPS):
            total = _add_tap(total, pixels + tap, weights + tap * width_out, inside)
    tl.store(out_ptr + first_row * width_out + (row * width_out + x[None, :]), total, mask=inside)


@triton.jit
def _resize_height_and_cut_kernel(
    pixels_ptr,
    starts_ptr,
    weights_ptr,
    order_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    cells,
    cells_wide,
    height_in,
    height,
    width,
    scale,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESIZE: tl.constexpr,
    ROUND: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    pdl_wait(USE_PDL)
    place = tl.program_id(0) % cells
    image = (tl.program_id(0) // cells).to(tl.int64)
    cell = tl.load(order_ptr + place).to(tl.int32)
    area: tl.constexpr = PATCH * PATCH
    side: tl.constexpr = PATCH * MERGE
    index = tl.arange(0, BLOCK)  # a pixel of the cell: patch, then row, then column
    inside = index < MERGE * MERGE * area
    patch = index // area
    y = (cell // cells_wide) * side + (patch // MERGE) * PATCH + (index % area) // PATCH
    x = (cell % cells_wide) * side + (patch % MERGE) * PATCH + index % PATCH
    values: tl.constexpr = 3 * REPEAT * area
    out = (image * cells + place) * (MERGE * MERGE * values) + patch * values + index % area
    if RESIZE:
        start = tl.load(starts_ptr + y, mask=inside, other=0)
    for channel in tl.static_range(3):
        plane = pixels_ptr + (image * 3 + channel) * height_in * width
        if RESIZE:
            value = tl.zeros((BLOCK,), dtype=tl.float32)
            pixels = plane + start * width + x
            if UNROLL:
                for tap in tl.static_range(TAPS):
                    value = _add_tap(value, pixels + tap * width, weights_ptr + tap * height + y, inside)
            else:
                for tap in range(TAPS):
                    value = _add_tap(value, pixels + tap * width, weights_ptr + tap * height + y, inside)
            if ROUND:
                # Halves to even, as torch.round and torchvision: adding 1.5 * 2**23 leaves no fraction bits.
                value = tl.minimum(tl.maximum((value + 12582912.0) - 12582912.0, 0.0), 255.0)
        else:
            value = tl.load(plane + y * width + x, mask=inside, other=0).to(tl.float32)
        value = tl.div_rn(value * scale - tl.load(mean_ptr + channel), tl.load(std_ptr + channel))
        for copy in tl.static_range(REPEAT):
            offset = (channel * REPEAT + copy) * area
            tl.store(out_ptr + out + offset, value.to(out_ptr.dtype.element_ty), mask=inside)


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
    """(I, 3, H, W) to (I, P, 3 * repeat * patch_size**2).

    Resizes by tables: of each axis the first source of each output (int32) and the weights (taps, outputs) of the
    sources from there.
    """
    frames = frames.contiguous()
    images, _, height_in, _ = frames.shape
    cells = window_order.numel()
    out = torch.empty(images, cells * merge**2, 3 * repeat * patch_size**2, dtype=dtype, device=frames.device)
    if out.numel() == 0:
        return out
    resizes = resize_tables is not None
    pixels = _at_new_width(frames, *resize_tables[:2]) if resizes else frames
    # Without a resize, stand-ins that the kernel does not read.
    starts, weights = resize_tables[2:] if resizes else (window_order, mean)
    launch(
        _resize_height_and_cut_kernel,
        (images * cells,),
        (pixels, starts, weights, window_order, mean, std, out),
        (cells, width // (patch_size * merge), height_in, height, width, scale),
        TAPS=weights.shape[0] if resizes else 0,
        UNROLL=not resizes or weights.shape[0] <= MAX_UNROLLED_TAPS,
        RESIZE=resizes,
        ROUND=frames.dtype == torch.uint8,
        PATCH=patch_size,
        MERGE=merge,
        REPEAT=repeat,
        BLOCK=next_power_of_2((patch_size * merge) ** 2),
        num_warps=CELL_WARPS,
    )
    return out


def _at_new_width(frames: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """(I, 3, H, W) to float32 (I, 3, H, starts.numel())."""
    images, channels, height, width = frames.shape
    taps, new_width = weights.shape
    pixels = torch.empty(images, channels, height, new_width, dtype=torch.float32, device=frames.device)
    rows = images * channels * height
    launch(
        _resize_width_kernel,
        (cdiv(rows, WIDTH_ROWS), cdiv(new_width, WIDTH_BLOCK)),
        (frames, starts, weights, pixels),
        (rows, width, new_width),
        TAPS=taps,
        UNROLL=taps <= MAX_UNROLLED_TAPS,
        ROWS=WIDTH_ROWS,
        BLOCK=WIDTH_BLOCK,
        num_warps=WIDTH_WARPS,
    )
    return pixels

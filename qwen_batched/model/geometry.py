"""Everything about an image that follows from its size alone: pure functions of ints.

In: heights and widths. Out: the resized size, and the `VisionPlan` of a size: the order of its patches, its attention
windows and its rotary tables, as tensors ready on a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qwen_batched.checkpoint.config import MAX_FRAME_PIXELS, TextConfig, VisionConfig, Yarn
from qwen_batched.inputs.checks import MAX_ASPECT_RATIO
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.runtime.lru_cache import LRUCache

IMAGE, WINDOWS = "image", "windows"  # what a block of the vision transformer attends within
MAX_REDUCTION_ON_GPU = 64
MAX_PLANS = 64
# H200, bf16: products over 16384 rows take 0.85 to 0.96 of the time per row of those over 65536, and memory is bounded.
PATCHES_PER_PASS = 16384


@dataclass(frozen=True)
class VisionPlan:
    """Geometry of one image of h x w merged cells (P patches, M = h * w cells) on one device.

    Patches stand in window order: windows of equal shape back to back, full ones first; inside a window, cells in
    raster order; inside a cell, patches in raster order. So every shape of window is one dense batch.

    Where the vision transformer has leading tokens, an image has as many more tokens in front of its patches.
    """

    window_order: Tensor  # (M,) int64, the raster index of the cell at each place of the window order
    raster_order: Tensor  # (h, w) int64, the place in window order of each cell; the inverse of `window_order`
    # By name, what a block may attend within: the whole image as one segment (`IMAGE`); and the attention windows
    # (`WINDOWS`), at most four runs (full, right edge, bottom edge, corner), where there are any.
    segments: Mapping[str, Segments]
    # (P, head_dim / 2) float32, rotary table in window order: rows, then columns. Those of no rotation without rotary
    # embedding, and for leading tokens.
    cos: Tensor
    sin: Tensor  # (P, head_dim / 2) float32
    taps: Taps | None  # where the tokens are in the learned position table; None where there is none
    leading: int  # how many leading tokens an image has


@dataclass(frozen=True)
class Taps:
    """Rows of a position table and their weights: token `t` gets the sum of `table[rows[t]] * weights[t]`."""

    rows: Tensor  # int64 (P, 4)
    weights: Tensor  # float32 (P, 4)


def look_up(taps: Taps, table: Tensor) -> Tensor:
    """(P, C) of a table (rows, C), in its dtype; summed in float32."""
    # No method: torch.compile takes plans as constants, and calls no methods of these.
    return (table[taps.rows] * taps.weights[..., None]).sum(dim=1).to(table.dtype)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to which transformers' Qwen2-VL image processor resizes: multiples of `factor` near the same aspect.

    Python's `round` rounds halves to even, which is part of the rule (transformers, image_processing_qwen2_vl.py).
    Raises `ValueError` where a side is below `factor`, the aspect ratio is above 200, or `min_pixels` asks for a larger
    frame than `MAX_FRAME_PIXELS`.
    """
    if min(height, width) < factor:
        raise ValueError(f"images must be at least {factor} x {factor} pixels, got {height} x {width}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"images must have an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}")
    rounded_height, rounded_width = round(height / factor) * factor, round(width / factor) * factor
    if rounded_height * rounded_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    if rounded_height * rounded_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
        if rows * columns > MAX_FRAME_PIXELS:  # rounding up may take it past min_pixels
            given = f"{height} x {width} for min_pixels={min_pixels}"
            raise ValueError(f"a frame must be resized to at most {MAX_FRAME_PIXELS} pixels, got {given}")
        return rows, columns
    return rounded_height, rounded_width


def resize_axis(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One axis of PyTorch's antialiased bicubic resize, as a table for a kernel.

    Returns int32 (target,), the first source pixel of each target pixel, and float32 (taps, target), the weights of the
    source pixels from there. All of them exist: a kernel needs no mask.
    """
    weights = bicubic_weights(source, target, device)
    used = (weights != 0).to(torch.uint8)
    starts = used.argmax(dim=0)
    taps = int((source - used.flip(0).argmax(dim=0) - starts).max())
    starts = starts.clamp(max=source - taps)
    pixels = starts + torch.arange(taps, device=device)[:, None]
    return starts.int(), weights.gather(0, pixels).contiguous()


def bicubic_weights(source: int, target: int, device: torch.device) -> Tensor:
    """One axis of PyTorch's antialiased bicubic resize as a matrix, float32 (source, target).

    Read off PyTorch itself, by resizing an identity, so that the weights are PyTorch's to the last bit.
    """
    # PyTorch's GPU kernel has no room for the weights of a stronger reduction.
    where = device if source <= MAX_REDUCTION_ON_GPU * target else torch.device("cpu")
    identity = torch.eye(source, dtype=torch.float32, device=where)[None, None]
    return F.interpolate(identity, size=(source, target), mode="bicubic", antialias=True)[0, 0].to(device)


def vision_plan(cache: LRUCache, config: VisionConfig, h: int, w: int, device: torch.device) -> VisionPlan:
    """The plan of an image of `h` x `w` merged cells, built once per size and device."""
    return cache.get((config, h, w, device), lambda: make_vision_plan(config, h, w, device))


def make_vision_plan(config: VisionConfig, h: int, w: int, device: torch.device) -> VisionPlan:
    """The plan of an image of `h` x `w` merged cells."""
    # Made on the host: the tables are small, and their values do not depend on the GPU's arithmetic.
    with torch.device("cpu"):
        window_order, windows = _window_order(config, h, w)
        raster_order = torch.argsort(window_order).view(h, w)
        places = _patch_places(config.spatial_merge_size, rows=window_order // w, columns=window_order % w)
        cos, sin = _rotary_tables(config, places)
        taps = _position_taps(config, places, [side * config.spatial_merge_size for side in (h, w)])
    leading = config.leading_tokens
    runs = {IMAGE: (Run(start=0, count=1, length=leading + h * w * config.cell_patches),)}
    if config.window_size is not None:
        runs[WINDOWS] = windows
    segments = {name: Segments.of(each, device) for name, each in runs.items()}
    window_order, raster_order, cos, sin = (x.to(device) for x in (window_order, raster_order, cos, sin))
    taps = None if taps is None else Taps(taps.rows.to(device), taps.weights.to(device))
    return VisionPlan(window_order, raster_order, segments, cos, sin, taps, leading)


def _window_order(config: VisionConfig, h: int, w: int) -> tuple[Tensor, tuple[Run, ...]]:
    """Cells (raster index) in window order, and the runs of equal windows, in patches."""
    side = max(h, w) if config.window_size is None else config.window_cells
    cells = torch.arange(h * w).view(h, w)
    full_h, full_w = h - h % side, w - w % side
    # Cells, window height and width of the full, right edge, bottom edge and corner windows.
    areas = (
        (cells[:full_h, :full_w], side, side),
        (cells[:full_h, full_w:], side, w - full_w),
        (cells[full_h:, :full_w], h - full_h, side),
        (cells[full_h:, full_w:], h - full_h, w - full_w),
    )
    order, runs, start = [], [], 0
    for area, window_h, window_w in areas:
        if area.numel() == 0:
            continue
        order.append(rearrange(area, "(a y) (b x) -> (a b y x)", y=window_h, x=window_w))
        length = window_h * window_w * config.cell_patches
        run = Run(start, area.numel() * config.cell_patches // length, length)
        runs.append(run)
        start = run.stop
    return torch.cat(order), tuple(runs)


def _patch_places(merge: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each patch (P,), of cells (M,) at `rows` and `columns`."""
    inner_rows, inner_columns = torch.arange(merge).repeat_interleave(merge), torch.arange(merge).repeat(merge)
    return (rows[:, None] * merge + inner_rows).flatten(), (columns[:, None] * merge + inner_columns).flatten()


def _rotary_tables(config: VisionConfig, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin (P, head_dim / 2): a quarter of the head turns with the patch's row, the next with its column."""
    if config.rope_theta is None:
        inv_freq = torch.zeros(config.head_dim // 4, dtype=torch.float32)
    else:
        inv_freq = inverse_frequencies(config.head_dim // 2, config.rope_theta)
    angles = torch.cat([x[:, None].float() * inv_freq for x in places], dim=1)
    angles = F.pad(angles, (0, 0, config.leading_tokens, 0))
    return angles.cos(), angles.sin()


def _position_taps(config: VisionConfig, places: tuple[Tensor, Tensor], sizes: Sequence[int]) -> Taps | None:
    """Bilinear interpolation with aligned corners, of the table's sides to the image's `sizes` in patches.

    In the order of transformers' operations (`get_vision_interpolation_indices_and_weights`), float32. The table's
    first rows are those of leading tokens.
    """
    if config.num_position_embeddings is None:
        return None
    leading = config.leading_tokens
    side = math.isqrt(config.num_position_embeddings - leading)
    lows, highs, shares = [], [], []
    for place_P, size in zip(places, sizes, strict=True):
        at_P = place_P.float() * (side - 1) / max(size - 1, 1)
        low_P = at_P.long()
        lows.append(low_P)
        highs.append((low_P + 1).clamp(max=side - 1))
        shares.append(at_P - low_P)
    (top, left), (bottom, right), (down, across) = lows, highs, shares
    rows = torch.stack([row * side + column for row in (top, bottom) for column in (left, right)], dim=1)
    weights = torch.stack([y * x for y in (1 - down, down) for x in (1 - across, across)], dim=1)
    first_rows = torch.arange(leading)[:, None].expand(-1, 4)
    first_weights = torch.eye(1, 4, dtype=torch.float32).expand(leading, -1)
    return Taps(torch.cat((first_rows, rows + leading)), torch.cat((first_weights, weights)))


def split_into_passes(counts: Sequence[int], patches: Sequence[int], chunk_size: int | None) -> list[dict[int, slice]]:
    """Which images go through the vision tower at once: consecutive ones, in passes of about equal length.

    Of each size there are `counts` images of `patches`. A pass has at most `chunk_size` images, or about
    `PATCHES_PER_PASS` patches. Returns for each pass, by size, the images of that size in it.
    """
    total = done = 0
    for count, cost in zip(counts, patches, strict=True):
        total += count * (cost if chunk_size is None else 1)
    number = -(-total // (chunk_size or PATCHES_PER_PASS))
    if number == 1:
        return [{size: slice(0, count) for size, count in enumerate(counts) if count}]
    images = [(size, image) for size, count in enumerate(counts) for image in range(count)]
    costs = [patches[size] if chunk_size is None else 1 for size, _ in images]
    passes: list[dict[int, slice]] = [{} for _ in range(number)]
    for (size, image), cost in zip(images, costs, strict=True):
        rows = passes[done * number // total]
        rows[size] = slice(rows[size].start if size in rows else image, image + 1)
        done += cost
    return [rows for rows in passes if rows]


def inverse_frequencies(dim: int, theta: float) -> Tensor:
    """Rotary inverse frequencies (dim / 2,), float32 on the host whatever the model's dtype (arXiv:2104.09864)."""
    with torch.device("cpu"):
        return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def decoder_frequencies(config: TextConfig) -> Tensor:
    """The decoder's rotary inverse frequencies (head_dim / 2,), float32 on the host."""
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta)
    return inv_freq if config.yarn is None else _scaled_frequencies(inv_freq, config, config.yarn)


def _scaled_frequencies(inv_freq: Tensor, config: TextConfig, yarn: Yarn) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2), in the order of transformers' operations (modeling_rope_utils.py)."""
    dim = config.head_dim

    def place(turns: float) -> float:
        """The index of the frequency that makes so many turns within the original length."""
        wave = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wave) / (2 * math.log(config.rope_theta))

    low, high = place(yarn.beta_fast), place(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    with torch.device("cpu"):
        kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        powers = config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return 1.0 / (yarn.factor * powers) * (1 - kept) + inv_freq * kept

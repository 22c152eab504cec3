"""Frames and their feature maps -> a picture to look at, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from qwen_batched.arguments import as_int, shown
from qwen_batched.inputs.checks import check_float_range, check_frames, check_plain

PANEL = (448, 336)  # the most pixels that a frame is drawn with, width and height
MARGIN, LINE, FONT_SIZE = 16, 24, 14
WINDOW_EDGES = "Straight edges in the maps are window borders: most vision blocks attend within windows."


def draw_feature_maps(
    images: Tensor | Sequence[Tensor], features: Tensor | Sequence[Tensor], sample: int = 0, caption: str = ""
) -> Image.Image:
    """Draws a sample's frames beside its feature maps, one row for each camera.

    The first three principal components of the features, computed over all cameras of the sample, become red, green and
    blue: similar features have similar colours, within a camera and between cameras. A map of zeros, which is what an
    absent camera has, is drawn black. The line below the maps says where their straight edges come from.

    Args:
        images: The model's input: (B, V, 3, H, W), RGB, uint8 in 0..255 or floating in 0..1; or V tensors
            (B, 3, H_i, W_i).
        features: `out.image_features`, or what `encode_images` returns (with `layers`, one item of it):
            (B, V, h, w, D), or V tensors (B, h_i, w_i, D), of a floating dtype, on any device.
        sample: Which of the B samples.
        caption: A line of text below the maps.

    Returns:
        An RGB image of 944 pixels width; `.save("features.png")` writes it.

    Raises:
        TypeError, ValueError: An argument is not as described, the two do not fit together, or features are not finite.
            Raised before anything is drawn.
    """
    groups = check_frames(images, min_side=1)
    check_float_range(groups, None)
    frames = [group[:, camera] for group in groups for camera in range(group.shape[1])]
    maps = _as_cameras(features)
    shapes = [(len(camera), len(features)) for camera, features in zip(frames, maps, strict=False)]
    if len(frames) != len(maps) or any(theirs != ours for ours, theirs in shapes):
        expected = f"the {len(frames[0])} samples and {len(frames)} cameras of images"
        raise ValueError(f"features must be of {expected}, got {[tuple(camera.shape) for camera in maps]}")
    sample = as_int("sample", sample, 0)
    if sample >= len(frames[0]):
        raise ValueError(f"sample must be below {len(frames[0])}, the number of samples, got {sample}")
    if not isinstance(caption, str):
        raise TypeError(f"caption must be a str, got {shown(caption)}")
    maps = [camera[sample].detach().float().cpu() for camera in maps]
    if not all(bool(features.isfinite().all()) for features in maps):
        raise ValueError(f"features must be finite, those of sample {sample} are not")
    return _draw([_as_picture(camera[sample]) for camera in frames], colour_maps(maps), caption)


def _as_cameras(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One (B, h, w, D) for each camera."""
    is_list = isinstance(features, (list, tuple))
    if not (isinstance(features, Tensor) or (is_list and all(isinstance(camera, Tensor) for camera in features))):
        raise TypeError(f"features must be a tensor or a list of tensors, got {shown(features)}")
    for camera in features if is_list else [features]:
        check_plain("features", camera)
        expected = "(B, h, w, D) for each camera" if is_list else "(B, n_cameras, h, w, D)"
        if camera.ndim != 5 - is_list or 0 in camera.shape or not camera.dtype.is_floating_point:
            raise ValueError(f"features must be floating {expected}, got {camera.dtype} {tuple(camera.shape)}")
    cameras = list(features) if is_list else list(features.unbind(1))
    if len({camera.shape[-1] for camera in cameras}) != 1:
        raise ValueError(f"features must have one width, got {[camera.shape[-1] for camera in cameras]}")
    return cameras


def colour_maps(maps: Sequence[Tensor]) -> list[Image.Image]:
    """Feature maps (h, w, D) of one width, floating and on the host, as pictures of h x w pixels.

    The first three principal components of all of them become red, green and blue; maps of zeros are black.
    """
    cells = torch.cat([features.flatten(0, 1) for features in maps])  # (M, D)
    is_present = torch.cat([features.any().expand(features[..., 0].numel()) for features in maps])
    present = cells[is_present]
    colours = torch.zeros(len(cells), 3)
    if len(present):
        present = present - present.mean(dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # pca_lowrank starts from random vectors
            _, _, directions = torch.pca_lowrank(present, q=min(6, *present.shape), center=False)
        components = present @ directions[:, :3]
        low, high = components.quantile(torch.tensor([0.02, 0.98]), dim=0)  # a few outliers must not grey out the rest
        scaled = ((components - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
        colours[is_present, : scaled.shape[1]] = scaled  # fewer than three where there are fewer cells
    sizes = [features.shape[:2] for features in maps]
    chunks = colours.split([height * width for height, width in sizes])
    return [_as_picture(chunk.view(*size, 3).permute(2, 0, 1)) for chunk, size in zip(chunks, sizes, strict=True)]


def _as_picture(pixels: Tensor) -> Image.Image:
    """A frame (3, H, W), as the model takes it."""
    if pixels.dtype != torch.uint8:
        pixels = pixels.detach().float().nan_to_num().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def _draw(frames: Sequence[Image.Image], maps: Sequence[Image.Image], caption: str) -> Image.Image:
    panels = [ImageOps.contain(frame, PANEL) for frame in frames]
    lines = [*caption.splitlines(), WINDOW_EDGES]
    height = MARGIN + sum(panel.height + LINE + MARGIN for panel in panels) + len(lines) * LINE
    picture = Image.new("RGB", (3 * MARGIN + 2 * PANEL[0], height + MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    left, right, top = MARGIN, 2 * MARGIN + PANEL[0], MARGIN
    for index, (frame, panel, features) in enumerate(zip(frames, panels, maps, strict=True)):
        draw.text((left, top), f"camera {index}: {frame.width} x {frame.height} pixels", "black", font)
        draw.text((right, top), f"its features: {features.width} x {features.height} cells, PCA as RGB", "black", font)
        picture.paste(panel, (left, top + LINE))
        picture.paste(features.resize(panel.size, Image.Resampling.NEAREST), (right, top + LINE))
        top += panel.height + LINE + MARGIN
    for line in lines:
        draw.text((left, top), line, "black", font)
        top += LINE
    return picture

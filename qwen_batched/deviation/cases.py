"""The frames and texts that are compared on: files or made up, one case for each size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # height and width in pixels

# Of different lengths: a batch is padded.
TEXTS = (
    "pick up the red cube and put it into the box on the left",
    "stop",
    "What is the robot doing in this picture? Describe the table and everything on it.",
    "把红色的积木放在盘子上",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of samples."""

    label: str  # what tables call it: the cameras' sizes
    cameras: tuple[Tensor, ...]  # for each camera uint8 frames (B, 3, H, W)
    texts: tuple[str, ...]  # B of them

    @property
    def images(self) -> Tensor | list[Tensor]:
        """As the model takes them."""
        if len({frames.shape for frames in self.cameras}) == 1:
            return torch.stack(self.cameras, dim=1)
        return list(self.cameras)

    @property
    def pixels(self) -> int:
        """Of all frames: about what the case costs."""
        return sum(frames[:, 0].numel() for frames in self.cameras)

    def frames(self, sample: int) -> list[Tensor]:
        """The frames (3, H, W) of one sample."""
        return [frames[sample] for frames in self.cameras]

    def part(self, samples: Sequence[int]) -> Case:
        """A batch of some of the samples, each as often as it is named."""
        index = list(samples)
        return Case(self.label, tuple(frames[index] for frames in self.cameras), tuple(self.texts[i] for i in index))


def made_up(size: Size, batch: int, cameras: int, texts: Sequence[str], seed: int = 0) -> Case:
    """Soft shapes with some noise, the same at every call; texts in turns."""
    height, width = size
    generator = torch.Generator().manual_seed(height * width + seed)
    count = batch * cameras
    shapes = F.interpolate(torch.rand(count, 3, 8, 8, generator=generator), size=size, mode="bicubic")
    noise = torch.randn(count, 3, height, width, generator=generator)
    frames = (shapes * 255 + noise * 6).round().clamp(0, 255).to(torch.uint8).unflatten(0, (batch, cameras))
    return Case(f"{height}x{width}", frames.unbind(1), _in_turns(texts, batch))


def of_files(images: Sequence[Image.Image], size: Size | None, batch: int, cameras: int, texts: Sequence[str]) -> Case:
    """Pictures as frames, in turns: those of the first sample's cameras, then the next sample's; texts in turns.

    They are scaled to `size` beforehand, unless it is None. Raises `ValueError` where a camera would see several sizes.
    """
    frames = [_frame(image, size) for image in itertools.islice(itertools.cycle(images), batch * cameras)]
    by_camera = [frames[camera::cameras] for camera in range(cameras)]
    for camera, seen in enumerate(by_camera):
        sizes = sorted({tuple(frame.shape[1:]) for frame in seen})
        if len(sizes) > 1:
            named = " and ".join(map(_label, sizes))
            raise ValueError(f"the images of camera {camera} must have the same size in all samples, got {named}")
    labels = dict.fromkeys(_label(tuple(seen[0].shape[1:])) for seen in by_camera)
    return Case("+".join(labels), tuple(map(torch.stack, by_camera)), _in_turns(texts, batch))


def read_images(paths: Sequence[Path]) -> Iterator[Image.Image]:
    """Opens files as RGB. Raises `ValueError` where one is not there, or no picture."""
    for path in paths:
        try:
            with Image.open(path) as image:
                yield image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _frame(image: Image.Image, size: Size | None) -> Tensor:
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _in_turns(texts: Sequence[str], batch: int) -> tuple[str, ...]:
    return tuple(itertools.islice(itertools.cycle(texts), batch))


def _label(size: Size) -> str:
    return f"{size[0]}x{size[1]}"

"""What tests share: frames, sizes, and the measure of equality."""

import functools

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

# Float32 sums of a few thousand terms in another order differ by about 1e-6; a wrong index differs by 1e-2 and more.
FLOAT32_TOLERANCE = 1e-5

# Sizes at which the model sees images (trap 01): 224 and 448 have only full windows, the others have partial ones.
SIZES = [
    *((28, 28), (56, 56), (56, 308), (308, 56), (140, 140), (224, 224), (252, 252), (252, 308), (280, 280), (364, 364)),
    *((392, 392), (448, 448), (476, 644), (728, 1288)),
]


def photo(height: int, width: int, index: int = 0) -> Tensor:
    """A natural photograph as a uint8 frame (3, height, width); `index` chooses which."""
    return _resized(height, width, index % 3).clone()


def photos(batch: int, cameras: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Different photographs and crops as uint8 frames (batch, cameras, 3, height, width)."""
    frames = [photo(height, width, seed + i).roll(7 * (seed + i), dims=-1) for i in range(batch * cameras)]
    return torch.stack(frames).unflatten(0, (batch, cameras))


def noise(batch: int, cameras: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Uniform noise as uint8 frames (batch, cameras, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, cameras, 3, height, width), dtype=torch.uint8, generator=generator)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, in float64."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    assert bool(ours.isfinite().all()), "not finite"
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def assert_equal_to(ours: Tensor, theirs: Tensor, tolerance: float = FLOAT32_TOLERANCE) -> None:
    """Fails where the relative L2 distance is above `tolerance`."""
    error = relative_error(ours, theirs)
    assert error <= tolerance, f"relative L2 {error:.2e} is above {tolerance:.0e}"


def own_tokens(values_BS: Tensor, attention_mask: Tensor, sample: int) -> Tensor:
    """A sample's values on its own tokens, without padding."""
    return values_BS[sample][attention_mask[sample]]


@functools.cache
def _resized(height: int, width: int, index: int) -> Tensor:
    image = Image.fromarray(_photographs()[index]).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


@functools.cache
def _photographs() -> list[np.ndarray]:
    return [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]


class Scaled(nn.Module):
    """As an adapter: wraps a layer, with a state of its own in Python."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.enabled = layer, True

    def forward(self, x):
        return self.layer(x) * (1.5 if self.enabled else 1.0)

"""Camera frames of one size -> patches, as a module whose resize is two products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.model.geometry import bicubic_weights, vision_plan
from qwen_batched.model.tensor_processor import TensorProcessor

Size = tuple[int, int]  # height and width in pixels


class FramesToPatches(nn.Module):
    """Frames (I, 3, H, W) of one size and dtype to float32 patches (I, P, patch_dim) in window order, normalised.

    No target of an export has an antialiased resize that would equal the live one. uint8 frames on a CPU are resized in
    Pillow's whole numbers, to the last bit; others by the weights of PyTorch's bicubic resize, as on a GPU.
    """

    def __init__(
        self, processor: TensorProcessor, source: Size, target: Size, frames: torch.dtype, device: torch.device
    ) -> None:
        """Takes the sizes of frames before and after the resize, and their dtype."""
        super().__init__()
        vision, image = processor.config.vision, processor.image
        self.sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.is_uint8 = frames == torch.uint8
        self.scale = image.rescale_factor if self.is_uint8 else 1.0
        self.follows_pillow = self.is_uint8 and device.type == "cpu"
        factor = vision.cell_size
        self.grid = (target[0] // factor, target[1] // factor)  # in merged cells
        plan = vision_plan(processor.plans, vision, *self.grid, device)
        self.register_buffer("window_order", plan.window_order, persistent=False)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(image, f"image_{name}"), dtype=torch.float32, device=device).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        steps = ops.pillow_matrices(source, target) if self.follows_pillow else _bicubic_matrices(source, target)
        self.dims = [dim for dim, _ in steps]
        for dim, weights in steps:
            self.register_buffer(_NAMES[dim], weights.to(device), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        pixels = frames
        for dim in self.dims:
            weights = getattr(self, _NAMES[dim])
            pixels = pixels.to(weights.dtype)
            pixels = weights @ pixels if dim == -2 else pixels @ weights.t()
            if self.follows_pillow:
                pixels = ops.round_pillow(pixels)
        pixels = pixels.float()
        if self.dims and self.is_uint8 and not self.follows_pillow:
            pixels = pixels.round().clamp(0, 255)
        return ops.patchify(pixels, self.scale, self.mean, self.std, self.window_order, *self.sizes)


_NAMES = {-2: "row_weights", -1: "column_weights"}


def _bicubic_matrices(source: Size, target: Size) -> list[tuple[int, Tensor]]:
    """PyTorch's antialiased bicubic resize as products: of each axis its dimension and float32 (target, source)."""
    host = torch.device("cpu")
    changed = [dim for dim in (-1, -2) if source[dim] != target[dim]]
    return [(dim, bicubic_weights(source[dim], target[dim], host).t().contiguous()) for dim in changed]

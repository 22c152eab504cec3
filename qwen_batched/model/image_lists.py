"""Features of images of any sizes, one after the other in and out, batched by grid in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen_batched.arguments import shown
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import Batch, Grid
from qwen_batched.inputs.checks import Resize
from qwen_batched.model.image_features import image_features
from qwen_batched.runtime.idle_autocast import without_idle_autocast
from qwen_batched.training.api import Trainable


class WithImageLists(Trainable):
    """A model whose vision transformer takes lists of images."""

    @without_idle_autocast
    def encode_image_list(
        self, images: Sequence[Tensor], resize: Resize = "hf", chunk_size: int | None = None
    ) -> list[Tensor]:
        """Features of images that belong together in no way: any number of any sizes.

        Args:
            images: (3, H, W) each, RGB, uint8 in 0..255 or floating in 0..1, all on the host or on one device.
            resize, chunk_size: As for `encode_images`.

        Returns:
            For each image its features (h, w, D), row-major, of the grid that its size leads to.

        Raises:
            TypeError, ValueError: An argument is not as described. Raised before any work.
        """
        if not isinstance(images, (list, tuple)):
            raise TypeError(f"images must be a list of tensors (3, H, W), got {shown(images)}")
        chunk_size = checks.check_chunk_size(chunk_size)
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for index, image in enumerate(images):
            if not isinstance(image, Tensor):
                raise TypeError(f"images[{index}] must be a tensor (3, H, W), got {shown(image)}")
            if image.ndim != 3:
                raise ValueError(f"images[{index}] must be (3, H, W), got {checks.describe_tensor(image)}")
            alike.setdefault((image.shape, image.dtype), []).append(index)
        if not images:
            return []
        stacks = [torch.stack([images[index] for index in indices])[:, None] for indices in alike.values()]
        requests = [self.processor.request(stack, resize=resize, device=self.device) for stack in stacks]
        pixels: dict[Grid, list[Tensor]] = {}
        places: dict[Grid, list[int]] = {}
        for request, indices in zip(requests, alike.values(), strict=True):
            grid = request.grids[0]
            pixels.setdefault(grid, []).append(self.processor.batch(request, self.dtype).pixel_values[:, 0])
            places.setdefault(grid, []).extend(indices)
        batch = Batch(pixel_values=[torch.cat(parts) for parts in pixels.values()], grids=tuple(pixels))
        maps = image_features(self.visual, batch, chunk_size).main
        features = [x for group in maps for x in group]
        order = [index for indices in places.values() for index in indices]
        return [x for _, x in sorted(zip(order, features, strict=True), key=lambda pair: pair[0])]

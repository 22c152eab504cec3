"""Methods by which code for transformers' models asks for rope positions, image features, sizes and shared weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.utils import ModelOutput

from qwen_batched.inputs.batch import Grid
from qwen_batched.inputs.checks import describe_tensor
from qwen_batched.inputs.transformers_batch import (
    IMAGE_TYPE,
    check_patches,
    group_by_grid,
    image_places,
    read_grids,
)
from qwen_batched.model.shared_weights import share_weights
from qwen_batched.training.api import Trainable

if TYPE_CHECKING:  # which imports torchvision, where it is broken too
    from transformers import ProcessorMixin

# Since 5, `get_rope_index` takes the tokens' types second, and counts tokens without padding; image features come in an
# output with fields.
_IS_5 = Version(transformers.__version__).release >= (5,)


@dataclass
class ImageFeatures(ModelOutput):
    """What `get_image_features` returns beside transformers 5.

    Attributes:
        pooler_output: One (h * w, D) for each image, row-major.
        deepstack_features: One such tuple for each index of the config's `deepstack_visual_indexes`; None where there
            are none.
    """

    pooler_output: tuple[Tensor, ...] | None = None
    deepstack_features: list[tuple[Tensor, ...]] | None = None


class ClientMethods(Trainable):
    """A model's methods by transformers' names that are not about training."""

    @classmethod
    def from_transformers(
        cls,
        model: nn.Module,
        processor: ProcessorMixin | str | Path,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resample_backend: str | None = None,
        added_tokens: Sequence[str] | None = None,
    ) -> ClientMethods:
        """A model that shares the parameters of one that transformers or peft has loaded; nothing is copied.

        The two have the same `nn.Parameter`s, so that a step of either's optimizer, a freeze and `.to()` are seen by
        both. Layers that peft has wrapped are shared whole, with their adapters.

        Args:
            model: transformers' model of one of the families, or peft's of one.
            processor: Its processor, or the folder or hub id to read the tokenizer and the image settings from.
            padding_side, min_pixels, max_pixels, resample_backend, added_tokens: As for `from_pretrained`.

        Raises:
            TypeError: `model` or `processor` is none of these.
            ValueError: The model is not implemented here, quantised, sharded, or changed beyond what can be shared.
        """
        options = {"min_pixels": min_pixels, "max_pixels": max_pixels, "resample_backend": resample_backend}
        return share_weights(cls, model, processor, padding_side=padding_side, added_tokens=added_tokens, **options)

    @property
    def language_model(self) -> nn.Module:
        """The decoder, by the name that it has in transformers."""
        return self.model

    def get_decoder(self) -> nn.Module:
        """The decoder."""
        return self.model

    @classmethod
    def can_generate(cls) -> bool:
        """True: there is `generate`."""
        return True

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are; a tied head's are the embedding's."""
        tables = {id(x) for m in self.modules() if isinstance(m, nn.Embedding) for x in m.parameters()}
        return sum(
            x.numel()
            for x in self.parameters()
            if (x.requires_grad or not only_trainable) and not (exclude_embeddings and id(x) in tables)
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **arguments: Any) -> dict[str, Any]:
        """The arguments of one `forward` over `input_ids` (B, S): those given, without what is None.

        transformers' own `generate` calls this for each token, which this package's does not; wrappers call it.
        """
        return {"input_ids": input_ids, **{name: value for name, value in arguments.items() if value is not None}}

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rope positions (3, B, S), 0 on padding, and (B, 1) by how much a next token's differs from its index.

        Reads its arguments on the host; on a GPU that waits. The second argument may be `image_grid_thw`, as before
        transformers 5; the others then follow. Token indices count padding as in the installed transformers.

        Args:
            input_ids: Int64 (B, S).
            mm_token_type_ids: (B, S), 1 on image tokens; None for the tokens that are the config's `image_token_id`.
            image_grid_thw: Int64 (N, 3), the patches of each image: 1, height, width. None without images.
            video_grid_thw, second_per_grid_ts: Must be None.
            attention_mask: (B, S), 0 on padding; None where there is none.

        Raises:
            ValueError: Shapes, image tokens and grids do not fit together, or there is a video.
        """
        types = mm_token_type_ids
        if types is not None and types.shape != input_ids.shape and types.shape[-1:] == (3,):
            types, image_grid_thw, video_grid_thw = None, types, image_grid_thw
        if video_grid_thw is not None or second_per_grid_ts is not None:
            raise ValueError("videos are not supported: video_grid_thw and second_per_grid_ts must be None")
        for name, value in (("mm_token_type_ids", types), ("attention_mask", attention_mask)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"{name} must be of the shape of input_ids, got {describe_tensor(value)}")
        merge = self.config.vision.spatial_merge_size
        grids = () if image_grid_thw is None else read_grids(image_grid_thw, merge)
        is_image = input_ids == self.config.image_token_id if types is None else types == IMAGE_TYPE
        if types is not None and bool((types > IMAGE_TYPE).any()):
            raise ValueError("videos are not supported: mm_token_type_ids must be 0 and 1")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(is_image.tolist(), mask.bool().tolist(), strict=True)
        positions, deltas, left = [], [], list(grids)
        for row, visible in rows:
            own = _sample_positions([image for image, seen in zip(row, visible, strict=True) if seen], left)
            places = iter(own)
            positions.append([next(places) if seen else (0, 0, 0) for seen in visible])
            length = len(own) if _IS_5 else len(row)
            deltas.append([max(map(max, own), default=-1) + 1 - length])
        if left:
            raise ValueError(f"image_grid_thw holds {len(left)} images more than input_ids")
        table = torch.tensor(positions, dtype=input_ids.dtype, device=input_ids.device)
        return table.permute(2, 0, 1), torch.tensor(deltas, dtype=input_ids.dtype, device=input_ids.device)

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor
    ) -> ImageFeatures | tuple[Tensor, ...] | tuple[tuple[Tensor, ...], list[Tensor]]:
        """Merged features of images as transformers' processor gives them.

        Reads the grids on the host; on a GPU that waits.

        Args:
            pixel_values: Floating (patches, patch_dim), image after image, in transformers' order.
            image_grid_thw: Int64 (N, 3), the patches of each image: 1, height, width.

        Returns:
            What the method returns in the installed transformers: since 5 an output with `pooler_output`, a tuple of
            (h * w, D), one for each image, and `deepstack_features`; before, the tuple, and for models with deep
            features the tuple and a list of those of all images.

        Raises:
            ValueError: Patches and grids do not fit together.
        """
        vision = self.config.vision
        grids = read_grids(image_grid_thw, vision.spatial_merge_size)
        check_patches(pixel_values, grids, vision)
        groups, has_deep = group_by_grid(grids), vision.deepstack_visual_indexes is not None
        patches = pixel_values.to(self.device, self.visual.patch_embed.proj.weight.dtype)
        result = self.visual(self.processor.window_order(patches, groups), tuple(groups), deepstack=has_deep)
        maps = [result.main, *result.deep] if has_deep else [result]
        places = image_places(groups)
        main, *deep = (tuple(each[group][row].flatten(0, 1) for group, row in places) for each in maps)
        if _IS_5:
            return ImageFeatures(main, deep or None)
        return (main, [torch.cat(features) for features in deep]) if has_deep else main


def _sample_positions(is_image: Sequence[bool], grids: list[Grid]) -> list[tuple[int, int, int]]:
    """Time, row and column of each token; takes the sample's images off the front of `grids`."""
    places: list[tuple[int, int, int]] = []
    start = index = 0
    while index < len(is_image):
        if not is_image[index]:
            places.append((start, start, start))
            index, start = index + 1, start + 1
            continue
        if not grids:
            raise ValueError("input_ids has more images than image_grid_thw")
        h, w = grids.pop(0)
        if not all(is_image[index : index + h * w]) or index + h * w > len(is_image):
            raise ValueError(f"an image of {h} x {w} cells needs as many image tokens in a row in input_ids")
        places += [(start, start + row, start + column) for row in range(h) for column in range(w)]
        index, start = index + h * w, start + max(h, w)
    return places

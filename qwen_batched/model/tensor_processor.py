"""Camera frames and texts -> everything the model needs, as tensors on the frames' device.

frames (B, V, 3, H, W) -> resize -> normalise -> patches in window order (B, V, P, patch_dim)
texts, targets -> token ids -> sequences with a place for each image cell and labels (B, S), rope positions (3, B, S)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen_batched.arguments import shown
from qwen_batched.cache import LRUCache
from qwen_batched.checkpoint import Checkpoint, naming
from qwen_batched.config import ImageConfig, QwenVLConfig
from qwen_batched.kernels import ops
from qwen_batched.loading import ProcessorOptions, read_options
from qwen_batched.model.geometry import make_patch_order, resize_axis, smart_resize
from qwen_batched.model.inputs import (
    Resize,
    check_camera_mask,
    check_device,
    check_frames,
    check_resize,
    check_targets,
    check_texts,
)
from qwen_batched.model.prompt import PromptEncoder, load_tokenizer
from qwen_batched.model.request import Grid, Prompts, Request
from qwen_batched.model.sequence import Sequences, expand_prompts, label_answers
from qwen_batched.weights import resolve_device

MAX_CACHED_TEXTS, MAX_CACHED_TABLES, MAX_CACHED_MASKS = 4096, 256, 256
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TokenRow:
    """A prompt's tokens (U,) on a device; the last `answer_tokens`, there also as `count` (1,), are its answer's."""

    ids: Tensor
    count: Tensor
    answer_tokens: int


class TensorProcessor:
    """Prepares batches on the frames' device: no PIL, no numpy, no loop over images, no value read back."""

    def __init__(
        self, config: QwenVLConfig, image: ImageConfig, prompts: PromptEncoder, padding_side: str = "left"
    ) -> None:
        """Takes what the checkpoint says of its model, its images and its prompts.

        Raises:
            ValueError: The two configurations disagree on the patches, or `padding_side` is unknown.
        """
        image.check_patches(config.vision)
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {shown(padding_side)}")
        self.config = config
        self.image = image
        self.prompts = prompts
        self.padding_side = padding_side
        self._rows = LRUCache(MAX_CACHED_TEXTS)
        self._tables = LRUCache(MAX_CACHED_TABLES)
        self._masks = LRUCache(MAX_CACHED_MASKS)  # apart: many masks must not drive out the tables

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> TensorProcessor:
        """The processor of a checkpoint; reads no weights. Arguments as in `QwenBatchedVL.from_pretrained`."""
        checkpoint = Checkpoint.open(name, weights=False, hub=read_options(ProcessorOptions, options))
        return cls.from_checkpoint(checkpoint, padding_side, min_pixels, max_pixels)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> TensorProcessor:
        """The processor of an opened checkpoint.

        Raises:
            ValueError: The folder lacks a file, or says something that this package does not implement.
        """
        config = checkpoint.model_config()
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        image = replace(checkpoint.image_config(config.vision), **{k: v for k, v in given.items() if v is not None})
        tokenizer = load_tokenizer(checkpoint.folder)
        with naming(checkpoint.folder):
            prompts = PromptEncoder(tokenizer, checkpoint.chat_template, config.image_token_id)
            config.check_embedded("the ids of images, padding and ends", *prompts.written_ids())
            config.check_embedded("eos_token_id", *checkpoint.generation_config().eos_token_ids)
        return cls(config, image, prompts, padding_side)

    def __call__(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str] | None = None,
        camera_mask: Tensor | None = None,
        *,
        targets: Sequence[str] | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        max_new_tokens: int = 0,
    ) -> dict[str, Tensor | list[Tensor]]:
        """A batch for `QwenBatchedVL.forward(**batch)`.

        Args:
            images: (B, V, 3, H, W), RGB, uint8 in 0..255 or floating in 0..1; or V tensors (B, 3, H_i, W_i); or None.
            texts: B strings; None for images alone.
            camera_mask: Bool (B, V), False where a camera is absent; None where none is.
            targets: B strings, the answers to train on; each follows its prompt, with its end token. None for no loss.
            template: "chat", "plain", or a layout with `{images}` and `{text}`.
            resize: "hf" for the checkpoint's own rule, (height, width) for an exact size, None where the frames
                already have a size that the model takes.
            device: Where the batch goes; None for the frames' device, or the CPU without frames.
            dtype: Of the pixels.
            max_new_tokens: How many tokens must find room behind each prompt.

        Returns:
            With images: `pixel_values` (B, V, P, patch_dim) in window order and `raster_order` (V, h, w), see
            `BatchedVisionTransformer.forward`; both are lists of one per camera when the feature grids differ.
            `camera_present` (B, V), where a camera mask was given. With texts: the fields of `Sequences`. With targets:
            `labels` (B, S) and `answer_index` (A,), see `label_answers`.

        Raises:
            TypeError, ValueError: An argument is not as described, or a prompt with its new tokens is longer than the
                model's maximum.
        """
        request = self.request(
            images,
            texts,
            camera_mask,
            targets=targets,
            template=template,
            resize=resize,
            device=device,
            max_new_tokens=max_new_tokens,
        )
        return self.batch(request, dtype)

    @torch.compiler.disable  # work of the host, different at every call
    def request(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str] | None = None,
        camera_mask: Tensor | None = None,
        *,
        targets: Sequence[str] | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        device: torch.device | None = None,
        max_new_tokens: int = 0,
    ) -> Request:
        """Checks a call and does what the host has to do of it; arguments and errors as of `__call__`."""
        groups, device = self._check_images(images, camera_mask, resize, device)
        if groups is None and texts is None:
            raise ValueError("there must be images or texts, got neither")
        if texts is not None:
            check_texts(texts, groups[0].shape[0] if groups else None)
            self.prompts.check_template(template)
        if targets is not None:
            check_targets(targets, texts)
            self.prompts.end_token(template)
        sizes = [self._target_size(group, resize) for group in groups or () for _ in range(group.shape[1])]
        factor = self.config.vision.cell_size
        grids = tuple((height // factor, width // factor) for height, width in sizes)
        prompts = None
        if texts is not None:
            prompts = self._prompts(texts, targets, template, grids, camera_mask, device)
            self._check_length(prompts.length, max_new_tokens)
        return Request(
            frames=tuple(groups or ()),
            camera_mask=self._mask_on_device(camera_mask, device),
            prompts=prompts,
            grids=grids,
            device=device,
        )

    @torch.compiler.disable
    def batch(self, request: Request, dtype: torch.dtype) -> dict[str, Tensor | list[Tensor]]:
        """The batch of a request, computed on its device without a look at any value."""
        batch: dict[str, Tensor | list[Tensor]] = {}
        if request.frames:
            batch.update(self._pixels(request, dtype))
        if request.camera_mask is not None:
            batch["camera_present"] = request.camera_mask
        if request.prompts is not None:
            sequences, prompts = self._sequences(request), request.prompts
            batch.update(vars(sequences))
            if prompts.answers is not None:
                labels = label_answers(sequences, prompts.answers, prompts.answer_tokens)
                batch["labels"], batch["answer_index"] = labels
        return batch

    def _check_images(
        self,
        images: Tensor | Sequence[Tensor] | None,
        camera_mask: Tensor | None,
        resize: Resize,
        device: torch.device | None,
    ) -> tuple[list[Tensor] | None, torch.device]:
        """The cameras' frames by size, and the device of the batch."""
        factor = self.config.vision.cell_size
        check_resize(resize, factor)
        if images is None:
            if camera_mask is not None:
                raise ValueError("camera_mask needs images, got images=None")
            return None, resolve_device(device or "cpu")
        groups = check_frames(images, min_side=factor)
        device = groups[0].device if device is None else resolve_device(device)
        check_device("images", groups[0], device)
        if camera_mask is not None:
            cameras = sum(group.shape[1] for group in groups)
            check_camera_mask(camera_mask, groups[0].shape[0], cameras, device)
        return groups, device

    def _target_size(self, frames: Tensor, resize: Resize) -> tuple[int, int]:
        """The size in pixels at which the vision transformer sees these frames."""
        height, width = frames.shape[-2:]
        factor = self.config.vision.cell_size
        if resize is None:
            if height % factor or width % factor:
                raise ValueError(f"resize=None needs frames in multiples of {factor} pixels, got {height} x {width}")
            return height, width
        if resize == "hf":
            return smart_resize(height, width, factor, self.image.min_pixels, self.image.max_pixels)
        return tuple(map(int, resize))  # NumPy's integers are allowed

    def _pixels(self, request: Request, dtype: torch.dtype) -> dict[str, Tensor | list[Tensor]]:
        """`pixel_values` and `raster_order`."""
        patches, camera = [], 0
        for frames in request.frames:
            cameras = slice(camera, camera + frames.shape[1])
            mask = None if request.camera_mask is None else request.camera_mask[:, cameras]
            frames = frames.to(request.device, non_blocking=True)
            patches.append(self._patches(frames, request.grids[camera], mask, dtype))
            camera = cameras.stop
        orders = [self._patch_order(grid, request.device)[1] for grid in request.grids]
        if len(set(request.grids)) == 1:
            pixel_values = patches[0] if len(patches) == 1 else torch.cat(patches, dim=1)
            return {"pixel_values": pixel_values, "raster_order": torch.stack(orders)}
        return {
            "pixel_values": [part[:, 0] for part in patches],
            "raster_order": [order.clone() for order in orders],
        }

    def _patches(self, frames: Tensor, grid: Grid, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Frames (B, V, 3, H, W) to patches (B, V, P, patch_dim); an absent camera's are zero whatever it shows."""
        vision = self.config.vision
        height, width = (side * vision.cell_size for side in grid)
        mean, std = self._normalisation(frames.device)
        patches = ops.frames_to_patches(
            frames.flatten(0, 1),
            height,
            width,
            self._resize_tables(frames.shape[-2:], (height, width), frames.device),
            scale=self.image.rescale_factor if frames.dtype == torch.uint8 else 1.0,
            mean=mean,
            std=std,
            window_order=self._patch_order(grid, frames.device)[0],
            patch_size=vision.patch_size,
            merge=vision.spatial_merge_size,
            repeat=vision.temporal_patch_size,
            dtype=dtype,
        ).unflatten(0, frames.shape[:2])
        return patches if mask is None else patches.masked_fill(~mask[:, :, None, None], 0)

    def _prompts(
        self,
        texts: Sequence[str],
        targets: Sequence[str] | None,
        template: str,
        grids: tuple[Grid, ...],
        camera_mask: Tensor | None,
        device: torch.device,
    ) -> Prompts:
        cells = [h * w for h, w in grids]
        if camera_mask is not None and camera_mask.device.type != "cpu":
            return self._prompts_by_device_mask(texts, targets, template, cells, camera_mask)
        present = [[True] * len(grids)] * len(texts) if camera_mask is None else camera_mask.tolist()
        rows = [
            self._row(text, target, template, sum(here), device)
            for text, target, here in zip(texts, targets or [None] * len(texts), present, strict=True)
        ]
        spans = [sum(n for n, is_here in zip(cells, here, strict=True) if is_here) - sum(here) for here in present]
        lengths = [len(row.ids) + span for row, span in zip(rows, spans, strict=True)]
        before = [length - row.answer_tokens for length, row in zip(lengths, rows, strict=True)]
        if min(before) == 0:
            raise ValueError(f"a prompt must have at least one token, got none for sample {before.index(0)}")
        answers = None if targets is None else torch.cat([row.count for row in rows])
        answer_tokens = sum(row.answer_tokens for row in rows)
        return Prompts(_as_one([row.ids for row in rows]), max(lengths), sum(lengths), answers, answer_tokens)

    def _check_length(self, length: int, max_new_tokens: int) -> None:
        limit = self.config.text.max_position_embeddings
        if length > limit:
            raise ValueError(f"a prompt must have at most {limit} tokens, images included, got {length}")
        if length + max_new_tokens > limit:
            raise ValueError(
                f"prompt and new tokens must fit into {limit} tokens, got {length} and max_new_tokens={max_new_tokens}"
            )

    def _prompts_by_device_mask(
        self,
        texts: Sequence[str],
        targets: Sequence[str] | None,
        template: str,
        cells: list[int],
        camera_mask: Tensor,
    ) -> Prompts:
        """The same where only the device knows the mask: every number of cameras is laid out, the device chooses."""
        counts = range(len(cells) + 1)
        rows = [
            [self._row(text, target, template, count, camera_mask.device) for count in counts]
            for text, target in zip(texts, targets or [None] * len(texts), strict=True)
        ]
        largest = sorted(cells, reverse=True)
        spans = [sum(largest[:count]) - count for count in counts]
        length = max(len(row.ids) + span for options in rows for row, span in zip(options, spans, strict=True))
        chosen = camera_mask.sum(dim=1, keepdim=True)
        ids = _as_one([row.ids for options in rows for row in options]).unflatten(0, (len(texts), len(counts)))
        ids = ids.gather(1, chosen[..., None].expand(-1, 1, ids.shape[-1]))[:, 0]
        if targets is None:
            return Prompts(ids, length, tokens=None)
        answers = torch.cat([row.count for options in rows for row in options]).view(len(texts), len(counts))
        answer_tokens = sum(max(row.answer_tokens for row in options) for options in rows)
        return Prompts(ids, length, None, answers.gather(1, chosen)[:, 0], answer_tokens)

    def _sequences(self, request: Request) -> Sequences:
        grids, prompts, device = request.grids, request.prompts, request.device
        table = self._tables.get(
            ("grids", grids, device),
            lambda: torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 2).to(device),
        )
        return expand_prompts(
            prompts.ids,
            table,
            request.camera_mask,
            image_token_id=self.config.image_token_id,
            pad_token_id=self.prompts.pad_token_id,
            length=prompts.length,
            tokens=prompts.tokens,
            padding_side=self.padding_side,
        )

    def _row(self, text: str, target: str | None, template: str, cameras: int, device: torch.device) -> TokenRow:
        """Tokens on the device, copied there the first time only."""

        def make() -> TokenRow:
            if target is None:
                ids, answer_tokens = self.prompts.encode(text, template, cameras), 0
            else:
                ids, answer_tokens = self.prompts.encode_with_answer(text, target, template, cameras)
            both = _copy_to(device, torch.tensor([*ids, answer_tokens], dtype=torch.int64, device="cpu"))
            return TokenRow(both[:-1], both[-1:], answer_tokens)

        return _copied(self._rows, (text, target, template, cameras, device), make)

    def _mask_on_device(self, camera_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """A host mask on the device, copied there the first time only."""
        if camera_mask is None or camera_mask.device == device:
            return camera_mask
        rows = tuple(map(tuple, camera_mask.tolist()))
        return _copied(self._masks, (rows, device), lambda: _copy_to(device, camera_mask.clone())).clone()

    def _patch_order(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Window order and raster order of the cells of an image."""
        key = ("patch order", grid, device)
        return self._tables.get(key, lambda: make_patch_order(self.config.vision, *grid, device))

    def _resize_tables(
        self, source: tuple[int, int], target: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The width's and the height's tables for the GPU's kernel; None where it needs none."""
        if device.type != "cuda" or tuple(source) == target:
            return None

        def axis(index: int) -> tuple[Tensor, Tensor]:
            key = ("axis", source[index], target[index], device)
            return self._tables.get(key, lambda: resize_axis(source[index], target[index], device))

        return (*axis(1), *axis(0))

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            values = (self.image.image_mean, self.image.image_std)
            mean, std = (torch.tensor(x, dtype=torch.float32, device="cpu").to(device) for x in values)
            return mean.view(3, 1, 1), std.view(3, 1, 1)

        return self._tables.get(("normalisation", device), make)


def to_device(batch: Mapping[str, Tensor | Sequence[Tensor]], device: torch.device) -> dict[str, Tensor | list[Tensor]]:
    """A processor's batch on `device`; from pinned memory without a wait."""

    def moved(value: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else [moved(item) for item in value]

    return {name: moved(value) for name, value in batch.items()}


def _copied(cache: LRUCache, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What `make` copies to the device without a wait, once for each stream: others may not read it yet.

    A capture takes what was copied on any stream: it reads nothing before a replay.
    """
    device = key[-1]
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return cache.get(key, make)

    def make_for_all() -> T:
        value = make()
        cache.get(key, lambda: value)
        return value

    return cache.get((*key, torch.cuda.current_stream(device).cuda_stream), make_for_all)


def _copy_to(device: torch.device, value: Tensor) -> Tensor:
    """`value`, which lies in pageable memory of our own, without a wait; in a capture with one, which is refused."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return value.to(device, non_blocking=not capturing)


def _as_one(rows: list[Tensor]) -> Tensor:
    """Rows of ids as a tensor (rows, longest), filled up with `NO_TOKEN`."""
    if len(rows) == 1:
        return rows[0][None]  # a control loop's only prompt: two launches less
    return pad_sequence(rows, batch_first=True, padding_value=ops.NO_TOKEN)

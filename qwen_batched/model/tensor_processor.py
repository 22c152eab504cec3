"""Camera frames and texts -> everything the model needs, as tensors on the frames' device.

frames (B, V, 3, H, W) -> resize -> normalise -> patches in window order (B, V, P, patch_dim)
texts, targets -> token ids -> sequences with a place for each image cell and labels (B, S), rope positions (B, 3, S)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from qwen_batched import ops
from qwen_batched.arguments import as_int, shown
from qwen_batched.checkpoint.config import ImageConfig, QwenVLConfig
from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.checkpoint.folder import Checkpoint, naming
from qwen_batched.checkpoint.options import ProcessorOptions, read_options
from qwen_batched.families import family_of, read_config
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import Batch, FeatureMaps, Features, Grid
from qwen_batched.inputs.checks import Resize
from qwen_batched.inputs.faults import find_label_faults, make_safe
from qwen_batched.inputs.given_features import batch_size, grids_of, hide_absent, read_features, stack_by_grid
from qwen_batched.inputs.prepared import HostFacts, prepare
from qwen_batched.inputs.prompt import PromptEncoder, load_tokenizer
from qwen_batched.inputs.prompt_rows import PromptRows, TextCall
from qwen_batched.inputs.request import Request
from qwen_batched.inputs.resample_backend import resolve_resample_backend
from qwen_batched.inputs.sequence import Sequences, expand_prompts, label_answers
from qwen_batched.inputs.transformers_batch import (
    TransformersBatch,
    faults,
    group_by_grid,
    image_places,
    image_table,
    lay_out,
)
from qwen_batched.model.geometry import MAX_PLANS, VisionPlan, resize_axis, smart_resize, vision_plan
from qwen_batched.runtime.host_copies import cached_h2d, h2d, to_device
from qwen_batched.runtime.lru_cache import LRUCache

Images = Tensor | Sequence[Tensor] | None
MAX_CACHED_TABLES, MAX_CACHED_MASKS = 256, 256


class TensorProcessor:
    """Prepares batches on the frames' device: no PIL, no numpy, no loop over images, no value read back."""

    def __init__(
        self,
        config: QwenVLConfig,
        image: ImageConfig,
        prompts: PromptEncoder,
        padding_side: str = "left",
        resample_backend: str | None = None,
    ) -> None:
        """Raises `ValueError` where the configs disagree on patches, or a padding side or backend is unknown."""
        image.check_patches(config.vision)
        self.config, self.image, self.prompts = config, image, prompts
        self.padding_side = padding_side
        published = family_of(config.model_type).image_processor
        self.resample_backend = resolve_resample_backend(resample_backend, published, published)
        self._rows = PromptRows()
        self.plans = LRUCache(MAX_PLANS)
        self._tables = LRUCache(MAX_CACHED_TABLES)
        self._masks = LRUCache(MAX_CACHED_MASKS)  # apart: many masks must not drive out the tables

    @property
    def padding_side(self) -> str:
        """ "left" or "right", of shorter prompts."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {shown(side)}")
        self._padding_side = side

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resample_backend: str | None = None,
        added_tokens: Sequence[str] | None = None,
        **options: Any,
    ) -> TensorProcessor:
        """The processor of a checkpoint; reads no weights. Arguments as in `QwenBatchedVL.from_pretrained`."""
        checkpoint = Checkpoint.open(name, weights=False, hub=read_options(ProcessorOptions, options))
        return cls.from_checkpoint(checkpoint, padding_side, min_pixels, max_pixels, resample_backend, added_tokens)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        padding_side: str = "left",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resample_backend: str | None = None,
        added_tokens: Sequence[str] | None = None,
    ) -> TensorProcessor:
        """The same of an opened checkpoint. Raises `ValueError` where a file lacks, or says what is not implemented."""
        config = read_config(checkpoint)
        family = family_of(config.model_type)
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        image = checkpoint.image_config(config.vision, family.image)
        image = replace(image, **{k: v for k, v in given.items() if v is not None})
        tokenizer = load_tokenizer(checkpoint.folder)
        with naming(checkpoint.folder):
            prompts = PromptEncoder(
                tokenizer, checkpoint.chat_template, config.image_token_id, family.prompt, added_tokens=added_tokens
            )
            config.check_embedded("the ids of images, padding and ends", *prompts.written_ids())
            config.check_embedded("eos_token_id", *checkpoint.generation_config().eos_token_ids)
        named = checkpoint.preprocessor.get("image_processor_type")
        backend = resolve_resample_backend(resample_backend, named, family.image_processor)
        return cls(config, image, prompts, padding_side, backend)

    def __call__(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str] | str | None = None,
        camera_mask: Tensor | None = None,
        *,
        targets: Sequence[str] | str | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        max_new_tokens: int = 0,
        system: str | None = None,
        image_features: FeatureMaps | Features | None = None,
    ) -> dict[str, Tensor | list[Tensor] | HostFacts]:
        """A batch for `QwenBatchedVL.forward(**batch)`, of which loaders may take, cut and join rows.

        Args:
            images: (B, V, 3, H, W), RGB, uint8 in 0..255 or floating in 0..1; or V tensors (B, 3, H_i, W_i); or None.
            texts: B strings, or one where B is 1; None for images alone.
            camera_mask: Bool (B, V), False where a camera is absent; None where none is.
            targets: B strings, or one where B is 1, the answers to train on; each follows its prompt, with its end
                token. None for no loss.
            template: "chat", "plain", or a layout with `{text}` and either `{images}` or one `{image}` for each camera.
            resize: "hf" for the checkpoint's own rule, (height, width) for an exact size, None where the frames
                already have a size that the model takes.
            device: Where the batch goes; None for the frames' device, or the CPU without frames.
            dtype: Of the pixels.
            max_new_tokens: How many tokens must find room behind each prompt.
            system: Replaces the chat template's system text; None for its own.
            image_features: In place of images, what `encode_images` gave for them.

        Returns:
            Tensors, each with B first and memory of its own. With images: `pixel_values` (B, V, P, patch_dim) in window
            order and `raster_order` (B, h, w), see `BatchedVisionTransformer.forward`; for a list of cameras both are
            lists of one (B, P, patch_dim) and (B, h, w) each. With image features: `image_features` as given, and of a
            model with L deep ones `deep_features` (B, L, V, h, w, D), or a list of one (B, L, h, w, D) for each camera.
            `camera_present` (B, V), where a camera mask was given.
            With texts: `input_ids`, `attention_mask`, `camera_ids` and `feature_index` (B, S) and `rope_positions`
            (B, 3, S), see `Sequences`, and `prepared`, the host's own counts, by which the model knows such a batch.
            With targets: `labels` (B, S), see `label_answers`.

        Raises:
            TypeError, ValueError: An argument is not as described, or a prompt with its new tokens is longer than the
                model's maximum.
        """
        checks.check_dtype(dtype)
        options = {"template": template, "resize": resize, "max_new_tokens": max_new_tokens, "system": system}
        options["image_features"] = image_features
        request = self.request(images, texts, camera_mask, targets=targets, device=device, **options)
        return self.prepared(request, dtype)

    @torch.compiler.disable  # work of the host, different at every call
    def request(
        self,
        images: Tensor | Sequence[Tensor] | None,
        texts: Sequence[str] | str | None = None,
        camera_mask: Tensor | None = None,
        *,
        targets: Sequence[str] | str | None = None,
        template: str = "chat",
        resize: Resize = "hf",
        device: torch.device | str | None = None,
        max_new_tokens: int = 0,
        system: str | None = None,
        image_features: FeatureMaps | Features | None = None,
        dtype: torch.dtype | None = None,
        images_first: bool = False,
    ) -> Request:
        """Checks a call and does what the host has to do of it; arguments and errors as of `__call__`.

        `dtype` is what image features must have, None for any. With `images_first` texts that cannot be refused are
        tokenised by `Request.laid_out`, so that the device can be at work on the frames by then.
        """
        max_new_tokens = as_int("max_new_tokens", max_new_tokens, 0)
        factor = self.config.vision.cell_size
        resize = checks.check_resize(resize, factor)
        groups, features, samples = [], None, None
        grids: tuple[Grid, ...] = ()
        if image_features is not None:
            features, device = self._check_features(image_features, images, camera_mask, dtype, device)
            grids, samples = grids_of(features), batch_size(features)
            if isinstance(resize, tuple) and any((h * factor, w * factor) != resize for h, w in grids):
                sizes = sorted({(h * factor, w * factor) for h, w in grids})
                raise ValueError(f"image_features must be of frames of the size resize={resize}, got {sizes}")
        elif images is not None or texts is not None:
            groups, device = self._check_images(images, camera_mask, device, factor)
        else:
            raise ValueError("there must be images or texts, got neither")
        for group in groups:
            height, width = self._target_size(group, resize, factor)
            grids += ((height // factor, width // factor),) * group.shape[1]
            samples = len(group)
        if texts is not None:
            texts = checks.check_texts(texts, samples)
            self.prompts.check_template(template, len(grids))
            if not template.isascii():
                checks.check_unicode("template", template)
        if targets is not None:
            targets = checks.check_targets(targets, texts)
            self.prompts.end_token(template)
        if system is not None:
            checks.check_system(system, texts, template)
        prompts = later = None
        if texts is not None:
            text = self.config.text
            call = TextCall(self.prompts, text, texts, targets, template, system, grids, max_new_tokens, device)
            on_host = camera_mask is None or camera_mask.device.type == "cpu"
            lay_out = self._rows.lay_out if on_host else self._rows.lay_out_on_device
            later = functools.partial(lay_out, call, camera_mask)
            if not (images_first and groups and self._rows.surely_lays_out(call, camera_mask)):
                prompts, later = later(), None
        mask = None if camera_mask is None else self._mask_on_device(camera_mask, device)
        as_list = isinstance(images if features is None else features.main, (list, tuple))
        return Request(tuple(groups), mask, prompts, grids, device, as_list, features, lay_out=later)

    @torch.compiler.disable
    def batch(self, request: Request, dtype: torch.dtype) -> Batch:
        """The batch of a request, computed on its device without a look at any value."""
        fields: dict[str, Any] = {}
        if request.frames:
            fields = {"pixel_values": self._pixels(request, dtype), "grids": request.grids}
        elif request.features is not None:
            features = to_device(request.features, request.device)
            fields = {"features": hide_absent(features, request.camera_mask), "grids": request.grids}
        if request.prompts is not None:
            sequences, prompts = self._sequences(request), request.prompts
            fields |= vars(sequences) | {"tokens": prompts.tokens}
            fields["is_padded"] = prompts.tokens != sequences.input_ids.numel()
            fields["rope_positions"] = fields.pop("position_ids").transpose(0, 1)
            if prompts.answers is not None:
                fields["labels"] = label_answers(sequences, prompts.answers)
                fields["answer_tokens"] = prompts.answer_tokens
        if request.inputs_embeds is not None:
            fields["inputs_embeds"] = to_device(request.inputs_embeds, request.device)
        return Batch(camera_present=request.camera_mask, as_list=request.as_list, **fields)

    @torch.compiler.disable
    def arrange(self, given: TransformersBatch) -> Batch:
        """The batch of one of transformers', computed on its device without a look at any value.

        What the host has not checked is made safe, see `make_safe`.
        """
        given = to_device(given, given.device)
        key = "images", given.grids, given.device
        table = self._tables.get(key, lambda: image_table(given.grids, given.device))
        layout = lay_out(given, table, self.config.image_token_id)
        fields: dict[str, Any] = {}
        if given.grids:
            groups = group_by_grid(given.grids)
            fields = {"grids": tuple(groups), "images": image_places(groups)}
            if given.features is None:
                fields["pixel_values"] = self.window_order(given.pixel_values, groups)
            else:
                fields["features"] = stack_by_grid(given.features, groups)
        batch = Batch(
            input_ids=given.input_ids,
            inputs_embeds=given.inputs_embeds,
            attention_mask=layout.mask,
            rope_positions=layout.rope_positions,
            camera_ids=layout.camera_ids,
            feature_index=layout.feature_index,
            labels=given.labels,
            tokens=given.tokens,
            is_padded=given.tokens != layout.mask.numel(),
            answer_tokens=given.answer_tokens,
            **fields,
        )
        if given.is_checked:
            return batch
        rows, labels = self.config.text.vocab_size, given.labels
        of_labels = {} if labels is None else find_label_faults(labels, layout.mask, rows)
        found = faults(given, layout, self.config)
        return make_safe(batch, found, of_labels, rows, sum(h * w for h, w in given.grids))

    def window_order(self, patches: Tensor, groups: Mapping[Grid, Sequence[int]]) -> list[Tensor]:
        """Patches in transformers' order to one (N_g, P_g, patch_dim) for each grid, in window order."""
        cell = self.config.vision.cell_patches
        sizes = {image: h * w * cell for (h, w), each in groups.items() for image in each}
        images = patches.split([sizes[image] for image in range(len(sizes))])
        pixels = []
        for grid, each in groups.items():
            own = patches.unflatten(0, (len(each), -1)) if len(groups) == 1 else torch.stack([images[i] for i in each])
            if self.config.vision.window_size is not None:
                order = self._plan(grid, patches.device).window_order
                own = own.unflatten(1, (-1, cell)).index_select(1, order).flatten(1, 2)
            pixels.append(own)
        return pixels

    def prepared(self, request: Request, dtype: torch.dtype) -> dict[str, Tensor | list[Tensor] | HostFacts]:
        """The same for loaders, see `__call__`."""
        orders = [self._plan(grid, request.device).raster_order for grid in request.grids]
        return prepare(self.batch(request, dtype), orders)

    def _check_images(
        self, images: Images, camera_mask: Tensor | None, device: torch.device | str | None, factor: int
    ) -> tuple[list[Tensor], torch.device]:
        """The cameras' frames by size, and the device of the batch."""
        if images is None:
            if camera_mask is not None:
                raise ValueError("camera_mask needs images, got images=None")
            return [], _with_memory(resolve_device("cpu" if device is None else device))
        groups = checks.check_frames(images, min_side=factor)
        device = groups[0].device if device is None else _with_memory(resolve_device(device))
        checks.check_device("images", groups[0], device)
        if camera_mask is not None:
            cameras = sum(group.shape[1] for group in groups)
            checks.check_camera_mask(camera_mask, groups[0].shape[0], cameras, device)
        checks.check_float_range(groups, camera_mask)
        return groups, device

    def _check_features(
        self,
        image_features: FeatureMaps | Features,
        images: Images,
        camera_mask: Tensor | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> tuple[Features, torch.device]:
        """The cameras' features, and the device of the batch."""
        if images is not None:
            raise ValueError("give either images or image_features, got both")
        if device is None:
            device = next((x.device for x in _pytree.tree_leaves(image_features) if isinstance(x, Tensor)), "cpu")
        device = _with_memory(resolve_device(device))
        features = read_features(image_features, self.config.vision, dtype, device)
        if camera_mask is not None:
            checks.check_camera_mask(camera_mask, batch_size(features), len(grids_of(features)), device)
        return features, device

    def _target_size(self, frames: Tensor, resize: Resize, factor: int) -> tuple[int, int]:
        """The size in pixels at which the vision transformer sees these frames, in multiples of `factor`."""
        height, width = frames.shape[-2:]
        if resize is None:
            if height % factor or width % factor:
                raise ValueError(f"resize=None needs frames in multiples of {factor} pixels, got {height} x {width}")
            return height, width
        if resize == "hf":
            return smart_resize(height, width, factor, self.image.min_pixels, self.image.max_pixels)
        return resize

    def _pixels(self, request: Request, dtype: torch.dtype) -> Tensor | list[Tensor]:
        """`pixel_values` of a batch."""
        patches, camera = [], 0
        for frames in request.frames:
            cameras = slice(camera, camera + frames.shape[1])
            mask = None if request.camera_mask is None else request.camera_mask[:, cameras]
            frames = frames.to(request.device, non_blocking=True)
            patches.append(self._patches(frames, request.grids[camera], mask, dtype))
            camera = cameras.stop
        if len(set(request.grids)) == 1:
            return patches[0] if len(patches) == 1 else torch.cat(patches, dim=1)
        return [part[:, 0] for part in patches]

    def _patches(self, frames: Tensor, grid: Grid, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Frames (B, V, 3, H, W) to patches (B, V, P, patch_dim); an absent camera's are zero whatever it shows."""
        vision, plan = self.config.vision, self._plan(grid, frames.device)
        factor = vision.cell_size
        height, width = grid[0] * factor, grid[1] * factor
        tables = self._resize_tables(frames.shape[-2:], (height, width), frames.device) if frames.is_cuda else None
        scale = self.image.rescale_factor if frames.dtype == torch.uint8 else 1.0
        normalisation = scale, *self._normalisation(frames.device)
        sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        frames_I3HW, order = frames.flatten(0, 1), plan.window_order
        patches = ops.frames_to_patches(
            frames_I3HW, height, width, tables, *normalisation, order, *sizes, dtype, self.resample_backend
        ).unflatten(0, frames.shape[:2])
        return patches if mask is None else patches.masked_fill(~mask[:, :, None, None], 0)

    def _sequences(self, request: Request) -> Sequences:
        grids, prompts, device = request.grids, request.prompts, request.device
        table = self._tables.get(
            ("grids", grids, device),
            lambda: torch.tensor(grids, dtype=torch.int64, device="cpu").reshape(-1, 2).to(device),
        )
        tokens = self.config.image_token_id, self.prompts.pad_token_id
        return expand_prompts(prompts.ids, table, request.camera_mask, *tokens, prompts.length, self._padding_side)

    def _mask_on_device(self, camera_mask: Tensor, device: torch.device) -> Tensor:
        """A host mask on the device, copied there the first time only."""
        if camera_mask.device == device:
            return camera_mask
        rows = tuple(map(tuple, camera_mask.tolist()))
        return cached_h2d(self._masks, (rows, device), lambda: h2d(device, camera_mask.clone())).clone()

    def _plan(self, grid: Grid, device: torch.device) -> VisionPlan:
        return vision_plan(self.plans, self.config.vision, *grid, device)

    def _resize_tables(
        self, source: tuple[int, int], target: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The width's and the height's tables for the GPU's kernel; None where it needs none."""
        if tuple(source) == target:
            return None

        def axis(index: int) -> tuple[Tensor, Tensor]:
            key = ("axis", source[index], target[index], device)
            return self._tables.get(key, lambda: resize_axis(source[index], target[index], device))

        return (*axis(1), *axis(0))

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        values = tuple(self.image.image_mean), tuple(self.image.image_std)

        def make() -> tuple[Tensor, Tensor]:
            mean, std = (torch.tensor(x, dtype=torch.float32, device="cpu").to(device) for x in values)
            return mean.view(3, 1, 1), std.view(3, 1, 1)

        return self._tables.get(("normalisation", values, device), make)


def _with_memory(device: torch.device) -> torch.device:
    if device.type == "meta":
        raise ValueError("a batch must be made on a device with memory, got the meta device")
    return device

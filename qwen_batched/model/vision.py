"""The vision transformer: patches of all images, in window order -> features (B, V, h, w, D), row-major.

Shape letters: B samples, V cameras, I = B * V images, P patches of an image, M = h * w merged cells of an image,
T patches of all images back to back, S tokens of a sequence, C vision width, D text width, N query heads,
K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.checkpoint.folder import CONFIG_FILE, Checkpoint
from qwen_batched.checkpoint.keys import HEAD_NAME, TEXT_PREFIX, VISION_PREFIX
from qwen_batched.checkpoint.options import Device, ModelOptions, read_options
from qwen_batched.checkpoint.weights import build_on_meta, load_weights
from qwen_batched.families import family_of, read_config
from qwen_batched.inputs.batch import Grid
from qwen_batched.inputs.checks import (
    check_camera_mask,
    check_chunk_size,
    check_pixels,
    check_same_device,
    resolve_layers,
)
from qwen_batched.linear.apply import apply_linear
from qwen_batched.linear.fused import pack
from qwen_batched.model.geometry import MAX_PLANS, VisionPlan, split_into_passes, vision_plan
from qwen_batched.model.image_groups import ImageGroup, by_camera, join, to_raster
from qwen_batched.model.parts.mlps import SwiGLU
from qwen_batched.model.parts.norms import AddRMSNorm, stream_of
from qwen_batched.model.parts.patches import VISION_NORM_EPS, PatchEmbed, PatchMerger
from qwen_batched.runtime.fast_path import can_fuse
from qwen_batched.runtime.lru_cache import LRUCache
from qwen_batched.training.checkpointing import CheckpointedBlock, GradientCheckpointing
from qwen_batched.training.process_groups import needs_collective_participation


class BatchedVisionTransformer(GradientCheckpointing):
    """The vision tower: windowed attention in most blocks, attention over each whole image in a few.

    Every image attends to itself only. Linear layers run over the patches of all images at once; attention runs as
    dense batches of equal windows, so memory grows linearly with the number of images.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.plans = LRUCache(MAX_PLANS)  # a processor may share it

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | str = "auto", device: Device = None, **options: Any
    ) -> BatchedVisionTransformer:
        """The vision transformer of a checkpoint; reads no other tensors. Arguments as in `QwenBatchedVL`."""
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        config = read_config(checkpoint)
        model = load_weights(
            build_on_meta(lambda: cls(config.vision), checkpoint.folder / CONFIG_FILE),
            checkpoint,
            family_of(config.model_type).keys,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            prefix=VISION_PREFIX,
            skip=lambda name: name.startswith((TEXT_PREFIX, HEAD_NAME)),
        ).eval()
        pack(model)
        return model

    @torch.compiler.assume_constant_result
    def plan(self, h: int, w: int, device: torch.device) -> VisionPlan:
        """The geometry of an image of `h` x `w` merged cells, made once."""
        return vision_plan(self.plans, self.config, h, w, device)

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        raster_order: Tensor | Sequence[Tensor] | tuple[Grid, ...],
        camera_present: Tensor | None = None,
        layers: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> Tensor | list[Tensor] | list[Tensor | list[Tensor]]:
        """Features of a batch of images, as `TensorProcessor` prepares them.

        Args:
            pixel_values: (B, V, P, patch_dim) in window order, or V tensors (B, P_v, patch_dim) when sizes differ.
            raster_order: Int64 (B, h, w), or V tensors (B, h_v, w_v): the place in window order of each merged cell.
                Its shape is the images' grid, so that geometry is known without reading the device; its values are not
                read. Or the grid (h, w) of each camera, as numbers.
            camera_present: Bool (B, V), False where a camera is absent; those features are zero. None where none is.
            layers: None for the merged features. Or block indices, 0 to depth - 1, negative from the end: the outputs
                of these blocks; later blocks are not run.
            chunk_size: Most images per pass; None for about 16384 patches, or for one pass where other processes wait
                (`needs_collective_participation`). It changes memory and speed, not results.

        Returns:
            (B, V, h, w, D), or V tensors (B, h_v, w_v, D) when sizes differ. With `layers`, a list of one such item
            per layer, of patches: (B, V, 2h, 2w, C).

        Raises:
            TypeError, ValueError: Shapes do not fit together, a layer is out of range, or `chunk_size` is below 1.
                Raised before any work.
        """
        config = self.config
        chunk_size = check_chunk_size(chunk_size)
        wanted = None if layers is None else resolve_layers(layers, config.depth)
        grids = check_pixels(pixel_values, raster_order, config.patch_dim, config.cell_patches)
        uniform = isinstance(pixel_values, Tensor)
        pixels = [pixel_values.flatten(0, 1)] if uniform else list(pixel_values)
        batch, device = pixel_values.shape[0] if uniform else pixels[0].shape[0], pixels[0].device
        check_same_device("pixel_values", pixels, self.patch_embed.proj.weight)
        if camera_present is not None:
            check_camera_mask(camera_present, batch, len(grids), device)
            camera_present = camera_present.to(device, non_blocking=True)
        plans = [self.plan(*grid, device) for grid in (grids[:1] if uniform else grids)]

        images = self._run_in_passes(pixels, plans, wanted, chunk_size)
        features = [by_camera(groups, batch, camera_present, uniform) for groups in images]
        return features[0] if layers is None else features

    def _run_in_passes(
        self, pixels: list[Tensor], plans: list[VisionPlan], wanted: list[int] | None, chunk_size: int | None
    ) -> list[list[Tensor]]:
        """Pixels (count, P, patch_dim) of each size: for each output, (count, rows, columns, width) of each size."""
        collected = [[[] for _ in plans] for _ in wanted or (None,)]
        counts, patches = [len(part) for part in pixels], [len(plan.cos) for plan in plans]
        if chunk_size is None and needs_collective_participation(self):
            chunk_size = sum(counts)  # one pass: as many as the others make, whatever images they have
        for rows in split_into_passes(counts, patches, chunk_size):
            outputs = self._run_pass([(pixels[size][images], plans[size]) for size, images in rows.items()], wanted)
            for sizes, output in zip(collected, outputs, strict=True):
                for size, part in zip(rows, output, strict=True):
                    sizes[size].append(part)
        return [[join(parts) for parts in sizes] for sizes in collected]

    def _run_pass(self, parts: list[tuple[Tensor, VisionPlan]], wanted: list[int] | None) -> list[list[Tensor]]:
        """The same for images that go through the blocks at once, with their plans."""
        groups = tuple(ImageGroup(len(pixels), plan, len(pixels) * len(plan.cos)) for pixels, plan in parts)
        x_TC = self.patch_embed(join([pixels.flatten(0, 1) for pixels, _ in parts]))
        outputs_TC = self._run_blocks(x_TC, groups, wanted)
        if wanted is None:
            return [self._in_raster_order(self.merger(*outputs_TC), groups, patch_rows=1)]
        merge = self.config.spatial_merge_size
        return [self._in_raster_order(x_TC, groups, patch_rows=merge) for x_TC in outputs_TC]

    def _run_blocks(
        self, x_TC: Tensor, groups: tuple[ImageGroup, ...], wanted: list[int] | None
    ) -> list[Tensor] | tuple[Tensor, Tensor]:
        """The `wanted` blocks' outputs; with None, the last block's update and residual stream, for the merger."""
        update, residual = x_TC, None
        outputs = {}
        depth = self.config.depth if wanted is None else max(wanted) + 1
        for index, block in enumerate(self.blocks[:depth]):
            whole_image = index in self.config.fullatt_block_indexes
            if can_fuse(block, VisionBlock):
                update, residual = block.advance(update, residual, groups, whole_image)
            else:
                update, residual = block(stream_of(update, residual), groups, whole_image), None
            if wanted is not None and index in wanted:
                outputs[index] = stream_of(update, residual)
        return (update, residual) if wanted is None else [outputs[index] for index in wanted]

    def _in_raster_order(self, x: Tensor, groups: tuple[ImageGroup, ...], patch_rows: int) -> list[Tensor]:
        """Tokens of all images in window order to one (count, rows, columns, width) per group, row-major.

        A merged cell holds `patch_rows` x `patch_rows` tokens.
        """
        cell = patch_rows**2
        parts = x.split([group.count * group.plan.raster_order.numel() * cell for group in groups])
        return [to_raster(part, group, patch_rows) for part, group in zip(parts, groups, strict=True)]


class VisionBlock(CheckpointedBlock):
    """Attention and MLP: (T, C) to (T, C), patches in window order."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = AddRMSNorm(config.hidden_size, VISION_NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = AddRMSNorm(config.hidden_size, VISION_NORM_EPS)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x_TC: Tensor, groups: tuple[ImageGroup, ...], whole_image: bool) -> Tensor:
        update_TC, residual_TC = self.advance(x_TC, None, groups, whole_image)
        return residual_TC + update_TC

    def advance(
        self, update_TC: Tensor, residual_TC: Tensor | None, groups: tuple[ImageGroup, ...], whole_image: bool
    ) -> tuple[Tensor, Tensor]:
        """The same with the last addition left to the next norm: an update and the residual stream, in and out."""
        return self.run(self._compute, update_TC, residual_TC, groups, whole_image)

    def _compute(
        self, update_TC: Tensor, residual_TC: Tensor | None, groups: tuple[ImageGroup, ...], whole_image: bool
    ) -> tuple[Tensor, Tensor]:
        x_TC, residual_TC = self.norm1(update_TC, residual_TC)
        x_TC, residual_TC = self.norm2(self.attn(x_TC, groups, whole_image), residual_TC)
        return self.mlp(x_TC), residual_TC


class VisionAttention(nn.Module):
    """Attention within windows or whole images."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_TC: Tensor, groups: tuple[ImageGroup, ...], whole_image: bool) -> Tensor:
        parts = apply_linear(self.qkv, x_TC).split([group.patches for group in groups])
        outs = [self._attend(qkv, group, whole_image) for qkv, group in zip(parts, groups, strict=True)]
        return apply_linear(self.proj, join(outs))

    def _attend(self, qkv: Tensor, group: ImageGroup, whole_image: bool) -> Tensor:
        plan = group.plan
        segments = plan.image if whole_image else plan.windows
        qkv_IPC = qkv.unflatten(0, (group.count, -1))
        return ops.rotary_attention(qkv_IPC, plan.cos, plan.sin, segments, self.num_heads).flatten(0, 1)

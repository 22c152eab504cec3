"""The vision transformer: patches of all images, in window order -> features (B, V, h, w, D), row-major.

Shape letters as in CONTRIBUTING.md, and C the vision width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from qwen_batched.inputs import checks
from qwen_batched.inputs.batch import FeatureMaps, Features, Grid
from qwen_batched.linear.apply import apply_linear
from qwen_batched.linear.fused import pack
from qwen_batched.model.geometry import IMAGE, MAX_PLANS, WINDOWS, VisionPlan, look_up, split_into_passes, vision_plan
from qwen_batched.model.image_groups import ImageGroup, by_camera, join, to_raster, without_leading
from qwen_batched.model.parts.norms import AddNorm, stream_of
from qwen_batched.model.parts.patches import PatchEmbed
from qwen_batched.runtime.backend import is_exporting
from qwen_batched.runtime.fast_path import can_fuse
from qwen_batched.runtime.lru_cache import LRUCache
from qwen_batched.training.checkpointing import CheckpointedBlock, GradientCheckpointing
from qwen_batched.training.process_groups import needs_collective_participation


class VisionTransformer(GradientCheckpointing):
    """The vision tower: attention within windows or within each whole image.

    Every image attends to itself only. Linear layers run over the patches of all images at once; attention runs as
    dense batches of equal windows, so memory grows linearly with the number of images.
    """

    def __init__(
        self,
        config: VisionConfig,
        norm: Callable[[int], AddNorm],
        mlp: Callable[[], nn.Module],
        merger: Callable[[], nn.Module],
        deep_merger: Callable[[], nn.Module] | None = None,
        patch_bias: bool = False,
    ) -> None:
        """Builds the modules with fresh weights, of sizes and parts as in `config`.

        `norm` makes a block's norms, of so many channels, `mlp` its MLP; `merger` what joins patches, an update and the
        residual stream, (T, C) each, to (M, D), and `deep_merger` the same for `deepstack_visual_indexes`.
        """
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, patch_bias)
        if config.leading_tokens:
            self.class_embedding = nn.Parameter(torch.zeros(config.leading_tokens, config.hidden_size))
        if config.num_position_embeddings is not None:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, norm, mlp) for _ in range(config.depth))
        self.merger = merger()
        if config.deepstack_visual_indexes is not None:
            self.deepstack_merger_list = nn.ModuleList(deep_merger() for _ in config.deepstack_visual_indexes)
        self.plans = LRUCache(MAX_PLANS)  # a processor may share it

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | str = "auto", device: Device = None, **options: Any
    ) -> VisionTransformer:
        """Loads a checkpoint of any family; reads no other tensors. Arguments as in `QwenBatchedVL`."""
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        config = read_config(checkpoint)
        family = family_of(config.model_type)
        model = load_weights(
            build_on_meta(lambda: family.build_vision(config, cls), checkpoint.folder / CONFIG_FILE),
            checkpoint,
            family.keys,
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
        deepstack: bool = False,
    ) -> FeatureMaps | list[FeatureMaps] | Features:
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
            deepstack: Return `Features`; not with `layers`.

        Returns:
            (B, V, h, w, D), or V tensors (B, h_v, w_v, D) when sizes differ. With `layers`, a list of one such item
            per layer, of patches: (B, V, 2h, 2w, C).

        Raises:
            TypeError, ValueError: Shapes do not fit together, a layer is out of range, or `chunk_size` is below 1.
                Raised before any work.
        """
        config = self.config
        chunk_size = checks.check_chunk_size(chunk_size)
        if deepstack and layers is not None:
            raise ValueError(f"layers must be None with deepstack, got {layers!r:.200}")
        wanted = None if layers is None else checks.resolve_layers(layers, config.depth)
        deep = (config.deepstack_visual_indexes or ()) if deepstack else ()
        grids = checks.check_pixels(pixel_values, raster_order, config.patch_dim, config.cell_patches)
        uniform = isinstance(pixel_values, Tensor)
        pixels = [pixel_values.flatten(0, 1)] if uniform else list(pixel_values)
        batch, device = pixel_values.shape[0] if uniform else pixels[0].shape[0], pixels[0].device
        checks.check_same_device("pixel_values", pixels, self.patch_embed.proj.weight)
        if camera_present is not None:
            checks.check_camera_mask(camera_present, batch, len(grids), device)
            camera_present = camera_present.to(device, non_blocking=True)
        plans = [self.plan(*grid, device) for grid in (grids[:1] if uniform else grids)]

        images = self._run_in_passes(pixels, plans, wanted, deep, chunk_size)
        features = [by_camera(groups, batch, camera_present, uniform) for groups in images]
        if deepstack:
            return Features(features[0], features[1:])
        return features[0] if layers is None else features

    def _run_in_passes(
        self,
        pixels: list[Tensor],
        plans: list[VisionPlan],
        wanted: list[int] | None,
        deep: Sequence[int],
        chunk_size: int | None,
    ) -> list[list[Tensor]]:
        """Pixels (count, P, patch_dim) of each size: for each output, (count, rows, columns, width) of each size."""
        collected = [[[] for _ in plans] for _ in wanted or (None, *deep)]
        counts, tokens = [part.shape[0] for part in pixels], [plan.cos.shape[0] for plan in plans]
        if chunk_size is None and needs_collective_participation(self):
            chunk_size = sum(counts)  # one pass: as many as the others make, whatever images they have
        if is_exporting():  # in one pass, for a batch that may vary
            passes = [{size: slice(None) for size in range(len(pixels))}]
        else:
            passes = split_into_passes(counts, tokens, chunk_size)
        for rows in passes:
            parts = [(pixels[size][images], plans[size]) for size, images in rows.items()]
            outputs = self._run_pass(parts, wanted, deep)
            for sizes, output in zip(collected, outputs, strict=True):
                for size, part in zip(rows, output, strict=True):
                    sizes[size].append(part)
        return [[join(parts) for parts in sizes] for sizes in collected]

    def _run_pass(
        self, parts: list[tuple[Tensor, VisionPlan]], wanted: list[int] | None, deep: Sequence[int]
    ) -> list[list[Tensor]]:
        """The same for images that go through the blocks at once, with their plans."""
        groups = tuple(ImageGroup(part.shape[0], plan, part.shape[0] * plan.cos.shape[0]) for part, plan in parts)
        x_TC = self.patch_embed(join([pixels.flatten(0, 1) for pixels, _ in parts]))
        x_TC = self._with_positions(x_TC, groups)
        depth = self.config.depth if wanted is None else max(wanted) + 1
        *last_TC, outputs_TC = self._run_blocks(x_TC, groups, deep if wanted is None else wanted, depth)
        outputs_TC = [without_leading(x_TC, groups) for x_TC in outputs_TC]
        if wanted is not None:
            merge = self.config.spatial_merge_size
            return [self._in_raster_order(x_TC, groups, patch_rows=merge) for x_TC in outputs_TC]
        merged_MD = [self.merger(*(without_leading(x_TC, groups) for x_TC in last_TC))]
        if deep:
            mergers = zip(self.deepstack_merger_list, outputs_TC, strict=True)
            merged_MD += [merger(x_TC, None) for merger, x_TC in mergers]
        return [self._in_raster_order(x_MD, groups, patch_rows=1) for x_MD in merged_MD]

    def _with_positions(self, x_TC: Tensor, groups: tuple[ImageGroup, ...]) -> Tensor:
        """Embedded patches with leading tokens before each image's, and their rows of the position table added."""
        config = self.config
        if not config.leading_tokens and config.num_position_embeddings is None:
            return x_TC
        parts = []
        sizes = [group.tokens - group.count * config.leading_tokens for group in groups]
        for part, group in zip(x_TC.split(sizes), groups, strict=True):
            x_IPC = part.unflatten(0, (group.count, -1))
            if config.leading_tokens:
                x_IPC = torch.cat((self.class_embedding.expand(group.count, -1, -1), x_IPC), dim=1)
            if group.plan.taps is not None:
                x_IPC = x_IPC + look_up(group.plan.taps, self.pos_embed.weight)
            parts.append(x_IPC.flatten(0, 1))
        return join(parts)

    def _run_blocks(
        self, x_TC: Tensor, groups: tuple[ImageGroup, ...], wanted: Sequence[int], depth: int
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The update and the residual stream of block `depth`, for the merger, and the `wanted` blocks' outputs."""
        config, outputs = self.config, {}
        update, residual = x_TC, None
        for index, block in enumerate(self.blocks[:depth]):
            is_whole = config.window_size is None or index in config.fullatt_block_indexes
            segments = IMAGE if is_whole else WINDOWS
            if can_fuse(block, VisionBlock):
                update, residual = block.advance(update, residual, groups, segments)
            else:
                update, residual = block(stream_of(update, residual), groups, segments), None
            if index in wanted:
                outputs[index] = stream_of(update, residual)
        return update, residual, [outputs[index] for index in wanted]

    def _in_raster_order(self, x: Tensor, groups: tuple[ImageGroup, ...], patch_rows: int) -> list[Tensor]:
        """Tokens of all images, `patch_rows`**2 a cell, to one (count, rows, columns, width) per group, row-major."""
        cell = patch_rows**2
        parts = x.split([group.count * group.plan.raster_order.numel() * cell for group in groups])
        return [to_raster(part, group, patch_rows) for part, group in zip(parts, groups, strict=True)]


class VisionBlock(CheckpointedBlock):
    """Attention and MLP: (T, C) to (T, C), patches in window order."""

    def __init__(self, config: VisionConfig, norm: Callable[[int], AddNorm], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.norm2 = norm(config.hidden_size)
        self.mlp = mlp()

    def forward(self, x_TC: Tensor, groups: tuple[ImageGroup, ...], segments: str) -> Tensor:
        update_TC, residual_TC = self.advance(x_TC, None, groups, segments)
        return residual_TC + update_TC

    def compute(
        self, update_TC: Tensor, residual_TC: Tensor | None, groups: tuple[ImageGroup, ...], segments: str
    ) -> tuple[Tensor, Tensor]:
        x_TC, residual_TC = self.norm1(update_TC, residual_TC)
        x_TC, residual_TC = self.norm2(self.attn(x_TC, groups, segments), residual_TC)
        return self.mlp(x_TC), residual_TC


class VisionAttention(nn.Module):
    """Attention within windows or whole images."""

    attend = staticmethod(ops.rotary_attention)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_TC: Tensor, groups: tuple[ImageGroup, ...], segments: str) -> Tensor:
        qkv_TC = apply_linear(self.qkv, x_TC)
        parts = [qkv_TC] if len(groups) == 1 else qkv_TC.split([group.tokens for group in groups])
        outs = []
        for qkv, group in zip(parts, groups, strict=True):
            plan = group.plan
            qkv_IPC = qkv.view(group.count, plan.cos.shape[0], -1)
            out_IPC = self.attend(qkv_IPC, plan.cos, plan.sin, plan.segments[segments], self.num_heads)
            outs.append(out_IPC.flatten(0, 1))
        return apply_linear(self.proj, join(outs))

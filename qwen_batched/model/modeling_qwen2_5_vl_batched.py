"""Qwen2.5-VL's two networks, batched.

BatchedVisionTransformer: patches of all images, in window order -> features (B, V, h, w, D), row-major.
BatchedDecoder: embeddings (B, S, D) with rope positions -> hidden states (B, S, D) of the layers asked for.

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
from torch.nn.modules.module import _has_any_global_hook

from qwen_batched.cache import LRUCache
from qwen_batched.checkpoint import CONFIG_FILE, Checkpoint
from qwen_batched.config import TextConfig, VisionConfig
from qwen_batched.kernels import ops
from qwen_batched.loading import Device, ModelOptions, read_options
from qwen_batched.model.attention_rows import back_to_back
from qwen_batched.model.contexts import Context, NextTokenContext, PromptContext
from qwen_batched.model.geometry import VisionPlan, decoder_frequencies, make_vision_plan, split_into_passes
from qwen_batched.model.gradient_checkpointing import CheckpointedBlock, GradientCheckpointing
from qwen_batched.model.image_groups import ImageGroup, by_camera, join, to_raster
from qwen_batched.model.inputs import (
    check_camera_mask,
    check_chunk_size,
    check_decoder_inputs,
    check_norm,
    check_pixels,
    check_same_device,
    resolve_layers,
)
from qwen_batched.model.kv_cache import KVCache
from qwen_batched.model.layers import AddRMSNorm, SwiGLU, apply_linear
from qwen_batched.model.packed import PackedParameters, PackingModule
from qwen_batched.model.patch_layers import VISION_NORM_EPS, PatchEmbed, PatchMerger
from qwen_batched.plain_modules import check_has_values, has_lent_parameters, runs_own_code
from qwen_batched.process_group import is_waited_for
from qwen_batched.weights import HEAD_NAME, TEXT_PREFIX, VISION_PREFIX, build_on_meta, load_weights, unread_layers

MAX_PLANS, MAX_DEVICES = 64, 8


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
        self._plans = LRUCache(MAX_PLANS)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype | str = "auto", device: Device = None, **options: Any
    ) -> BatchedVisionTransformer:
        """The vision transformer of a checkpoint; reads no other tensors. Arguments as in `QwenBatchedVL`."""
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        config = checkpoint.model_config()
        return load_weights(
            build_on_meta(lambda: cls(config.vision), checkpoint.folder / CONFIG_FILE),
            checkpoint,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            prefix=VISION_PREFIX,
            skip=lambda name: name.startswith((TEXT_PREFIX, HEAD_NAME)),
        ).eval()

    @torch.compiler.assume_constant_result
    def plan(self, h: int, w: int, device: torch.device) -> VisionPlan:
        """The geometry of an image of `h` x `w` merged cells, made once."""
        config = self.config
        return self._plans.get((config, h, w, device), lambda: make_vision_plan(config, h, w, device))

    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        raster_order: Tensor | Sequence[Tensor],
        camera_present: Tensor | None = None,
        layers: Sequence[int] | None = None,
        chunk_size: int | None = None,
    ) -> Tensor | list[Tensor] | list[Tensor | list[Tensor]]:
        """Features of a batch of images, as `TensorProcessor` prepares them.

        Args:
            pixel_values: (B, V, P, patch_dim) in window order, or V tensors (B, P_v, patch_dim) when sizes differ.
            raster_order: Int64 (B, h, w), or V tensors (B, h_v, w_v): the place in window order of each merged cell.
                Its shape is the images' grid, so that geometry is known without reading the device.
            camera_present: Bool (B, V), False where a camera is absent; those features are zero. None where none is.
            layers: None for the merged features. Or block indices, 0 to depth - 1, negative from the end: the outputs
                of these blocks; later blocks are not run.
            chunk_size: Most images per pass; None for about 16384 patches, or for one pass where other processes wait
                (`is_waited_for`). It changes memory and speed, not results.

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
        if chunk_size is None and is_waited_for(self):
            chunk_size = sum(counts)  # one pass: as many as the others make, whatever images they have
        for rows in split_into_passes(counts, patches, chunk_size):
            outputs = self._run_pass([(pixels[size][images], plans[size]) for size, images in rows.items()], wanted)
            for sizes, output in zip(collected, outputs, strict=True):
                for size, part in zip(rows, output, strict=True):
                    sizes[size].append(part)
        return [[join(parts) for parts in sizes] for sizes in collected]

    def _run_pass(self, parts: list[tuple[Tensor, VisionPlan]], wanted: list[int] | None) -> list[list[Tensor]]:
        """The same for images that go through the blocks at once, with their plans."""
        groups = tuple(ImageGroup(len(pixels), plan) for pixels, plan in parts)
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
        is_watched = _has_any_global_hook()
        for index, block in enumerate(self.blocks[:depth]):
            whole_image = index in self.config.fullatt_block_indexes
            if type(block) is VisionBlock and runs_own_code(block) and not is_watched:
                update, residual = block.advance(update, residual, groups, whole_image)
            else:
                update, residual = block(_stream(update, residual), groups, whole_image), None
            if wanted is not None and index in wanted:
                outputs[index] = _stream(update, residual)
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


class BatchedDecoder(GradientCheckpointing):
    """The language model: causal grouped-query attention with multimodal rope.

    Inside, the tokens of all samples stand back to back, so that padding costs nothing. For attention alone each
    sample gets a row, its tokens first and padding last: causal attention then never sees padding, and needs no mask;
    whichever side the caller pads on, the same numbers come out.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._inv_freq = LRUCache(MAX_DEVICES)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: Device = None,
        num_layers: int | None = None,
        **options: Any,
    ) -> BatchedDecoder:
        """The decoder of a checkpoint; reads no other tensors. Arguments as in `QwenBatchedVL`."""
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        stored = checkpoint.model_config()
        config = stored if num_layers is None else stored.truncated(num_layers)
        model = build_on_meta(lambda: cls(config.text), checkpoint.folder / CONFIG_FILE)
        names = [TEXT_PREFIX + name for name, _ in model.named_parameters()]
        unread = unread_layers(names, config.text.num_hidden_layers, stored.text.num_hidden_layers)
        return load_weights(
            model,
            checkpoint,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            prefix=TEXT_PREFIX,
            skip=lambda name: unread(name) or name.startswith((VISION_PREFIX, HEAD_NAME)),
        ).eval()

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        layers: Sequence[int] = (-1,),
        norm: str = "post",
        cache: KVCache | None = None,
        tokens: int | None = None,
    ) -> list[Tensor]:
        """Hidden states of the `layers` asked for; blocks above the highest are not run.

        Args:
            inputs_embeds: (B, S, D).
            position_ids: Int64 (3, B, S): temporal, height and width positions.
            attention_mask: Bool (B, S), False on padding, which may stand anywhere.
            layers: 0 is `inputs_embeds`, k the output of block k, the number of blocks (or -1) the last output.
            norm: "post" applies the final norm to the last output, "pre" leaves it out.
            cache: Takes the keys and values of the tokens.
            tokens: How many tokens to compute, no fewer than are not padding: the host's count of them, so that padding
                is left out without reading the mask back. None computes padding too.

        Returns:
            One (B, S, D) per layer, in the order of `layers`. Values on padding are finite and mean nothing.

        Raises:
            ValueError: A layer is out of range, `norm` is unknown, or shapes do not fit together.
        """
        wanted = resolve_layers(layers, self.config.num_hidden_layers + 1)
        check_norm(norm)
        check_has_values(self.norm)
        check_decoder_inputs(inputs_embeds, position_ids, attention_mask, tokens, self.embed_tokens.weight)
        tokens = attention_mask.numel() if tokens is None else tokens
        places_T, rows = back_to_back(attention_mask, tokens)
        rope = self._rope(position_ids.flatten(1).index_select(1, places_T))
        context = PromptContext(*rope, places_T, rows, cache)
        hidden_states = self._run_blocks(context.take(inputs_embeds), context, wanted, norm)
        if cache is not None:
            cache.end_prompt(attention_mask.sum(dim=1))
        return [context.place(x_TD) for x_TD in hidden_states]

    def step(self, inputs_embeds: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """Last hidden states (B, D) of the tokens (B, D) at positions (3, B) that follow those in `cache`."""
        context = NextTokenContext(*self._rope(position_ids), cache)
        hidden_states = self._run_blocks(inputs_embeds, context, [self.config.num_hidden_layers], "post")
        cache.end_token()
        return hidden_states[0]

    def _rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        cos, sin = ops.mrope_tables(position_ids, self._inverse_frequencies(position_ids.device), config.mrope_section)
        if config.yarn is None:
            return cos, sin
        return cos * config.yarn.attention_factor, sin * config.yarn.attention_factor

    @torch.compiler.assume_constant_result
    def _inverse_frequencies(self, device: torch.device) -> Tensor:
        config = self.config
        return self._inv_freq.get((config, device), lambda: decoder_frequencies(config).to(device))

    def _run_blocks(self, x_TD: Tensor, context: Context, wanted: list[int], norm: str) -> list[Tensor]:
        last = self.config.num_hidden_layers
        update, residual = x_TD, None
        outputs = {0: x_TD}
        is_watched = _has_any_global_hook()
        for index, block in enumerate(self.layers[: max(wanted)], start=1):
            if type(block) is DecoderBlock and runs_own_code(block) and not is_watched:
                update, residual = block.advance(update, residual, context)
            else:
                stream_TD = _stream(update, residual)
                update, residual = context.take(block(context.place(stream_TD), context)), None
            if index in wanted and index < last:
                outputs[index] = _stream(update, residual)
        if last in wanted:
            normed, stream = self.norm(update, residual)
            outputs[last] = normed if norm == "post" else stream
        return [outputs[index] for index in wanted]


class DecoderBlock(CheckpointedBlock):
    """Attention and MLP: (B, S, D) to (B, S, D)."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, index)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        update_TD, residual_TD = self.advance(context.take(x_BSD), None, context)
        return context.place(residual_TD + update_TD)

    def advance(self, update_TD: Tensor, residual_TD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """The same for tokens back to back, with the last addition left to the next norm: an update and the residual
        stream, in and out."""
        return self.run(self._compute, update_TD, residual_TD, context)

    def _compute(self, update_TD: Tensor, residual_TD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        x_TD, residual_TD = self.input_layernorm(update_TD, residual_TD)
        x_TD, residual_TD = self.post_attention_layernorm(self.self_attn(x_TD, context), residual_TD)
        return self.mlp(x_TD), residual_TD


class DecoderAttention(PackingModule):
    """Causal grouped-query attention with multimodal rope."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.dim, self.num_kv_heads = config.hidden_size, config.num_key_value_heads
        self.kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(self.dim, self.dim)
        self.k_proj = nn.Linear(self.dim, self.kv_dim)
        self.v_proj = nn.Linear(self.dim, self.kv_dim)
        self._qkv, self._qkv_bias = (
            PackedParameters.back_to_back(self.dim, self.kv_dim, self.kv_dim) for _ in ("weight", "bias")
        )
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        return apply_linear(self.o_proj, context.attend(self.index, self._project(x_TD), self.num_kv_heads))

    def _project(self, x_TD: Tensor) -> Tensor:
        """Queries, keys and values, (T, D + 2 * K * E)."""
        packed = self._packed()
        if packed is None:
            return torch.cat((self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)), dim=-1)
        (weight, bias), updates = packed
        return ops.linear(x_TD, weight, bias, self._qkv.placed(*updates))

    def _linears(self) -> list[tuple[nn.Module, int, int, bool]]:
        layers = (self.q_proj, self.dim), (self.k_proj, self.kv_dim), (self.v_proj, self.kv_dim)
        return [(layer, self.dim, width, True) for layer, width in layers]

    def _joining_pays(self, *layers: nn.Linear) -> bool:
        # Autograd would keep the joined weights of all blocks, which FSDP2 takes back one by one.
        return not any(map(has_lent_parameters, layers))

    def _packings(self, *layers: nn.Linear) -> list[tuple[PackedParameters, tuple[nn.Parameter, ...]]]:
        weights, biases = (tuple(getattr(layer, name) for layer in layers) for name in ("weight", "bias"))
        return [(self._qkv, weights), (self._qkv_bias, biases)]


def _stream(update: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream, with the addition done that the blocks leave to the next norm."""
    return update if residual is None else residual + update

"""The decoder: embeddings (B, S, D) with rope positions -> hidden states (B, S, D) of the layers asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.checkpoint.config import TextConfig
from qwen_batched.checkpoint.folder import CONFIG_FILE, Checkpoint
from qwen_batched.checkpoint.keys import HEAD_NAME, TEXT_PREFIX, VISION_PREFIX, unread_layers
from qwen_batched.checkpoint.options import Device, ModelOptions, read_options
from qwen_batched.checkpoint.weights import build_on_meta, load_weights
from qwen_batched.families import family_of, read_config
from qwen_batched.inputs.checks import check_choice, check_decoder_inputs, resolve_layers
from qwen_batched.linear.apply import apply_linear
from qwen_batched.linear.fused import FusedLinear, pack, pack_again
from qwen_batched.model.attention import (
    AttentionRows,
    Context,
    KeysValues,
    KVCache,
    NextTokenContext,
    PromptContext,
    SuffixContext,
    unpad,
)
from qwen_batched.model.geometry import decoder_frequencies
from qwen_batched.model.parts.mlps import SwiGLU
from qwen_batched.model.parts.norms import AddNorm, resolve_norm, resolve_qk_norm, stream_of
from qwen_batched.model.parts.ropes import RopeRule, sectioned
from qwen_batched.runtime.fast_path import can_fuse, check_has_values
from qwen_batched.runtime.lru_cache import LRUCache
from qwen_batched.training.checkpointing import CheckpointedBlock, GradientCheckpointing

MAX_TABLES = 16


class Decoder(GradientCheckpointing):
    """The language model: causal grouped-query attention with multimodal rope.

    Inside, the tokens of all samples stand back to back, so that padding costs nothing. For attention alone each
    sample gets a row, its tokens first and padding last: causal attention then never sees padding, and needs no mask;
    whichever side the caller pads on, the same numbers come out.
    """

    def __init__(
        self,
        config: TextConfig,
        norm: Callable[[int], AddNorm],
        mlp: Callable[[], nn.Module],
        qkv_bias: bool,
        qk_norm: Callable[[int], AddNorm] | None = None,
        rope: RopeRule = sectioned,
    ) -> None:
        """Builds the modules with fresh weights.

        `norm` makes a block's norms and the final one, of so many channels, `mlp` a block's MLP, `qk_norm` the norms of
        a query's and a key's head, before they are rotated; `rope` says by which positions.
        """
        super().__init__()
        self.config = config
        self.rope = rope
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(config, index, norm, mlp, qkv_bias, qk_norm) for index in range(config.num_hidden_layers)
        )
        self.norm = norm(config.hidden_size)
        self._tables = LRUCache(MAX_TABLES)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype | str = "auto",
        device: Device = None,
        num_layers: int | None = None,
        **options: Any,
    ) -> Decoder:
        """Loads a checkpoint of any family; reads no other tensors. Arguments as in `QwenBatchedVL`."""
        chosen = read_options(ModelOptions, options)
        dtype, device = chosen.placement(dtype, device)
        checkpoint = Checkpoint.open(name, hub=chosen)
        stored = read_config(checkpoint)
        config = stored if num_layers is None else stored.truncated(num_layers)
        family = family_of(config.model_type)
        model = build_on_meta(lambda: family.build_decoder(config, cls), checkpoint.folder / CONFIG_FILE)
        names = [TEXT_PREFIX + name for name, _ in model.named_parameters()]
        unread = unread_layers(names, config.text.num_hidden_layers, stored.text.num_hidden_layers)
        load_weights(
            model,
            checkpoint,
            family.keys,
            dtype=config.dtype if dtype == "auto" else dtype,
            device=device,
            prefix=TEXT_PREFIX,
            skip=lambda name: unread(name) or name.startswith((VISION_PREFIX, HEAD_NAME)),
        ).eval()
        pack(model)
        return model

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        layers: Sequence[int] = (-1,),
        norm: str = "post",
        cache: KVCache | KeysValues | None = None,
        tokens: int | None = None,
        deep_features: Sequence[Tensor] = (),
        is_padded: bool = True,
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
            deep_features: Each (B, S, D), zero on tokens of text. The first is added to the output of the first block,
                and so on; a layer's hidden states are those before that, as in transformers.
            is_padded: False where padding, if there is any, stands at the end of rows, and is no reason to move tokens:
                it is computed too, and reaches none of them.

        Returns:
            One (B, S, D) per layer, in the order of `layers`. Values on padding are finite and mean nothing.

        Raises:
            ValueError: A layer is out of range, `norm` is unknown, or shapes do not fit together.
        """
        wanted = resolve_layers(layers, self.config.num_hidden_layers + 1)
        check_choice("norm", norm, "post", "pre")
        check_has_values(self.norm)
        check_decoder_inputs(inputs_embeds, position_ids, attention_mask, tokens, self.embed_tokens.weight, is_padded)
        positions, places_T = position_ids.flatten(1), None
        if is_padded:
            places_T, rows = unpad(attention_mask, attention_mask.numel() if tokens is None else tokens)
            positions = positions.index_select(1, places_T)
        else:
            rows = AttentionRows(*attention_mask.shape)
        rope = self._rope(positions)
        context = PromptContext(*rope, places_T, rows, cache)
        depth = max(*wanted, 0 if cache is None else cache.depth)
        hidden_states = self._run_blocks(context.take(inputs_embeds), context, wanted, norm, depth, deep_features)
        if cache is not None:
            cache.end_prompt(attention_mask.sum(dim=1))
        return [context.place(x_TD) for x_TD in hidden_states]

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings, by the name that clients of transformers' models use."""
        return self.embed_tokens

    def step(self, inputs_embeds: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
        """Last hidden states (B, D) of the tokens (B, D) at positions (3, B) that follow those in `cache`."""
        context = NextTokenContext(*self._rope(position_ids), cache)
        depth = self.config.num_hidden_layers
        hidden_states = self._run_blocks(inputs_embeds, context, [depth], "post", depth)
        cache.end_token()
        return hidden_states[0]

    def extend(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache: KVCache,
        causal: bool = True,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D) of the tokens (B, T, D) at positions (3, B, T) behind those in `cache`.

        The cache stays as it is; `causal` and `visible` are `ops.extend_attention`'s.
        """
        rope = self._rope(position_ids.flatten(1))
        tickets = cache.tickets.new_zeros(inputs_embeds.shape[:2].numel() * self.config.num_attention_heads)
        context = SuffixContext(*rope, cache, tickets, causal, visible)
        depth = self.config.num_hidden_layers
        return context.place(self._run_blocks(context.take(inputs_embeds), context, [depth], "post", depth)[0])

    def _rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        device, yarn = position_ids.device, self.config.yarn
        cos, sin = ops.mrope_tables(position_ids, self._inverse_frequencies(device), self._rope_axes(device))
        return (cos, sin) if yarn is None else (cos * yarn.attention_factor, sin * yarn.attention_factor)

    @torch.compiler.assume_constant_result
    def _inverse_frequencies(self, device: torch.device) -> Tensor:
        config = self.config
        return self._tables.get((config, device), lambda: decoder_frequencies(config).to(device))

    @torch.compiler.assume_constant_result
    def _rope_axes(self, device: torch.device) -> Tensor:
        axes = tuple(self.rope(self.config.mrope_section))
        return self._tables.get((axes, device), lambda: torch.tensor(axes, device="cpu").to(device))

    def _run_blocks(
        self,
        x_TD: Tensor,
        context: Context,
        wanted: list[int],
        norm: str,
        depth: int,
        deep_features: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The outputs of the `wanted` blocks, of the first `depth` that are run."""
        last = self.config.num_hidden_layers
        update, residual = x_TD, None
        outputs = {0: x_TD}
        for index, block in enumerate(self.layers[:depth], start=1):
            if can_fuse(block, DecoderBlock):
                update, residual = block.advance(update, residual, context)
            else:
                stream_TD = stream_of(update, residual)
                update, residual = context.take(block(context.place(stream_TD), context)), None
            if index in wanted and index < last:
                outputs[index] = stream_of(update, residual)
            if index <= len(deep_features):
                update, residual = stream_of(update, residual) + context.take(deep_features[index - 1]), None
        if last in wanted:
            normed, stream = self.norm(update, residual)
            outputs[last] = normed if norm == "post" else stream
        return [outputs[index] for index in wanted]


def run_in_context(
    decoder: Decoder,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    make_context: Callable[[Tensor, Tensor], Context],
    deep_features: Sequence[Tensor] = (),
) -> Tensor:
    """Last hidden states (B, T, D) of the tokens (B, T, D) at positions (3, B, T) in a context of the caller's own.

    `make_context` makes it of the tokens' rotation, cosine and sine.
    """
    context, depth = make_context(*decoder._rope(position_ids.flatten(1))), decoder.config.num_hidden_layers
    hidden = decoder._run_blocks(context.take(inputs_embeds), context, [depth], "post", depth, deep_features)
    return context.place(hidden[0])


class DecoderBlock(CheckpointedBlock):
    """Attention and MLP: (B, S, D) to (B, S, D)."""

    def __init__(
        self,
        config: TextConfig,
        index: int,
        norm: Callable[[int], AddNorm],
        mlp: Callable[[], nn.Module],
        qkv_bias: bool,
        qk_norm: Callable[[int], AddNorm] | None,
    ) -> None:
        super().__init__()
        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = DecoderAttention(config, index, qkv_bias, qk_norm)
        self.post_attention_layernorm = norm(config.hidden_size)
        self.mlp = mlp()

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        update_TD, residual_TD = self.advance(context.take(x_BSD), None, context)
        return context.place(residual_TD + update_TD)

    def compute(self, update_TD: Tensor, residual_TD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        if self._is_step_of_one(update_TD):
            update_TD, residual_TD = self.self_attn.behind_norm(self.input_layernorm, update_TD, residual_TD, context)
            return self.mlp.behind_norm(self.post_attention_layernorm, update_TD, residual_TD)
        x_TD, residual_TD = self.input_layernorm(update_TD, residual_TD)
        x_TD, residual_TD = self.post_attention_layernorm(self.self_attn(x_TD, context), residual_TD)
        return self.mlp(x_TD), residual_TD

    def _is_step_of_one(self, x_TD: Tensor) -> bool:
        """Whether it is one token's, and norms may be left to the products behind them."""
        return (
            not torch.compiler.is_compiling()
            and x_TD.shape[0] == 1
            and can_fuse(self.self_attn, DecoderAttention)
            and can_fuse(self.mlp, SwiGLU)
        )


class DecoderAttention(nn.Module):
    """Causal grouped-query attention with multimodal rope."""

    def __init__(
        self, config: TextConfig, index: int, qkv_bias: bool, qk_norm: Callable[[int], AddNorm] | None
    ) -> None:
        super().__init__()
        self.index, self.has_qk_norm = index, qk_norm is not None
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        dim, kv_dim = config.hidden_size, config.num_key_value_heads * config.head_dim
        q_dim = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(dim, q_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, kv_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(q_dim, dim, bias=False)
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(config.head_dim), qk_norm(config.head_dim)
        self._qkv = FusedLinear(self, ("q_proj", "k_proj", "v_proj"))

    def forward(self, x_TD: Tensor, context: Context) -> Tensor:
        return self._attend(self._qkv(self, x_TD), context)

    def behind_norm(
        self, norm: nn.Module, update_TD: Tensor, residual_TD: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        """This behind a norm, and the residual stream, by as few operations as can be."""
        scale = resolve_norm(norm)
        fused = None if scale is None else self._qkv.behind_norm(self, update_TD, residual_TD, *scale)
        if fused is None:
            x_TD, stream_TD = norm(update_TD, residual_TD)
            return self(x_TD, context), stream_TD
        qkv, stream_TD = fused
        return self._attend(qkv, context), stream_TD

    def _attend(self, qkv: Tensor, context: Context) -> Tensor:
        """(T, (N + 2K) * E) to (T, D)."""
        qk_norm = resolve_qk_norm(self.q_norm, self.k_norm) if self.has_qk_norm else ()
        if qk_norm is None:
            qkv, qk_norm = self._normalise(qkv), ()
        return apply_linear(self.o_proj, context.attend(self.index, qkv, self.num_kv_heads, qk_norm))

    def _normalise(self, qkv: Tensor) -> Tensor:
        """Calls the norm modules, which have hooks or were replaced."""
        heads, num_kv = qkv.unflatten(-1, (-1, self.head_dim)), self.num_kv_heads
        q, k, v = heads.split([heads.shape[-2] - 2 * num_kv, num_kv, num_kv], dim=-2)
        return torch.cat((self.q_norm(q)[0], self.k_norm(k)[0], v), dim=-2).flatten(-2)

    def _apply(self, *arguments: Any, **keywords: Any) -> DecoderAttention:
        super()._apply(*arguments, **keywords)
        pack_again(self)
        return self

"""What is exported: modules of tensors in and tensors out, over the live model's own networks.

Shape letters as in CONTRIBUTING.md. V cameras have frames of one size; an image has T_img = h * w image tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.export.preprocessing import FramesToPatches, Size
from qwen_batched.inputs.batch import Features
from qwen_batched.linear.apply import apply_linear
from qwen_batched.model.decoder import run_in_context
from qwen_batched.model.parts.norms import QKNorm
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL


def detached(model: QwenBatchedVL) -> QwenBatchedVL:
    """A copy that shares the parameters' memory and wants no gradient: tracing it leaves the live model as it is."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval()


class VisionProgram(nn.Module):
    """Frames to image features: the vision transformer with its preprocessing."""

    def __init__(self, model: QwenBatchedVL, source: Size, target: Size, frames: torch.dtype = torch.uint8) -> None:
        """Takes the size of the frames, the size they are resized to, and their dtype, uint8 or floating."""
        super().__init__()
        self.visual = model.visual
        device = model.visual.patch_embed.proj.weight.device
        self.patches = FramesToPatches(model.processor, source, target, frames, device)
        self.has_deep = model.processor.config.vision.deepstack_visual_indexes is not None

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Frames (B, V, 3, H, W) to features (B, V, T_img, D), and of a model with L deep ones (B, L, V, T_img, D)."""
        batch, cameras = frames.shape[:2]
        pixels = self.patches(frames.flatten(0, 1)).unflatten(0, (batch, cameras))
        grids = (self.patches.grid,) * cameras
        if not self.has_deep:
            return (self.visual(pixels, grids).flatten(2, 3),)
        features: Features = self.visual(pixels, grids, deepstack=True)
        return features.main.flatten(2, 3), torch.stack(features.deep, dim=1).flatten(3, 4)


class DecoderProgram(nn.Module):
    """The decoder of the layout contract: ids and features where they belong to logits of every token."""

    def __init__(self, model: QwenBatchedVL, grid: tuple[int, int], hidden_states: bool = False) -> None:
        """Takes the grid (h, w) of every image; `hidden_states` gives the last ones in place of logits."""
        super().__init__()
        self.decoder, self.head = model.model, None if hidden_states else model.lm_head
        self.grid, self.image_token_id = grid, model.processor.config.image_token_id

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor, deep_embeds: Tensor | None = None
    ) -> Tensor:
        """Logits (B, S, vocabulary), or hidden states (B, S, D); values on padding mean nothing.

        Args:
            input_ids: Int64 (B, S): of each image h * w image tokens, side by side.
            attention_mask: Int64 (B, S), 0 on padding, on either side.
            image_embeds: (B, S, D): the features in place of the image tokens, row-major, and zeros elsewhere.
            deep_embeds: (B, L, S, D), likewise, for a model with L deep features.
        """
        mask = attention_mask != 0
        is_image = (input_ids == self.image_token_id) & mask
        positions = rope_positions(is_image, mask, self.grid)
        embeds = embed(self.decoder, input_ids, is_image, image_embeds)
        deep = () if deep_embeds is None else deep_embeds.unbind(1)
        (hidden,) = self.decoder(embeds, positions, mask, deep_features=deep)
        return hidden if self.head is None else apply_linear(self.head, hidden)


class CachedDecoderProgram(nn.Module):
    """The decoder behind a key-value cache: a prompt behind an empty one, or next tokens behind what came before."""

    def __init__(self, model: QwenBatchedVL) -> None:
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head
        self.image_token_id = model.processor.config.image_token_id

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        image_embeds: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        deep_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, vocabulary) of the new tokens, and keys and values of all, (L, B, C + T, K, E).

        Args:
            input_ids: Int64 (B, T).
            attention_mask: Int64 (B, C + T), 0 on padding among the tokens before and the new ones.
            position_ids: Int64 (3, B, T), the new tokens' rope positions in time, height and width.
            image_embeds: (B, T, D), as of `DecoderProgram`; `deep_embeds` likewise.
            past_keys, past_values: (L, B, C, K, E) of the decoder's L blocks, keys rotated.
        """
        is_image = input_ids == self.image_token_id
        embeds = embed(self.decoder, input_ids, is_image, image_embeds)
        deep = () if deep_embeds is None else deep_embeds.unbind(1)
        hidden, keys, values = run_behind_cache(
            self.decoder, embeds, attention_mask != 0, position_ids, past_keys.unbind(0), past_values.unbind(0), deep
        )
        return apply_linear(self.head, hidden), torch.stack(keys), torch.stack(values)


class CallProgram(nn.Module):
    """A whole call: frames and token ids to the last hidden states."""

    def __init__(self, vision: VisionProgram, decoder: DecoderProgram) -> None:
        super().__init__()
        self.vision, self.decoder = vision, decoder

    def forward(self, frames: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states (B, S, D); arguments as of `VisionProgram` and `DecoderProgram`."""
        is_image = (input_ids == self.decoder.image_token_id) & (attention_mask != 0)
        main, *deep = self.vision(frames)
        image_embeds = place(main.flatten(1, 2), is_image)
        if not deep:
            return self.decoder(input_ids, attention_mask, image_embeds)
        placed = [place(each.flatten(1, 2), is_image) for each in deep[0].unbind(1)]
        return self.decoder(input_ids, attention_mask, image_embeds, torch.stack(placed, dim=1))


def run_behind_cache(
    decoder: nn.Module,
    embeds: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    past_keys: Sequence[Tensor],
    past_values: Sequence[Tensor],
    deep: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Last hidden states (B, T, D) of new tokens, and keys and values of all tokens, of each block (B, C + T, K, E).

    `mask` is bool (B, C + T), `position_ids` (3, B, T), `past_keys` and `past_values` are of each block (B, C, K, E).
    """
    batch, tokens = embeds.shape[:2]
    past = past_keys[0].shape[1]
    causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=embeds.device).tril(past)
    # A padded query sees itself, or softmax would have nothing to add up to 1.
    itself = torch.ones(tokens, past + tokens, dtype=torch.bool, device=embeds.device).triu(past) & causal
    visible = (causal & mask[:, None]) | itself
    keys: list[Tensor] = []
    values: list[Tensor] = []
    cache = (past_keys, past_values, keys, values)
    hidden = run_in_context(
        decoder, embeds, position_ids, lambda cos, sin: _BehindCache(cos, sin, batch, tokens, visible, *cache), deep
    )
    return hidden, keys, values


@dataclass(frozen=True)
class _BehindCache:
    """What the decoder's blocks share about new tokens behind a cache, see `model.attention`."""

    cos: Tensor
    sin: Tensor
    batch: int
    tokens: int
    visible: Tensor  # bool (B, T, C + T)
    past_keys: Sequence[Tensor]  # of each block (B, C, K, E)
    past_values: Sequence[Tensor]
    keys: list[Tensor]  # of each block (B, C + T, K, E), as they come
    values: list[Tensor]

    def take(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, 1)

    def place(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(self.batch, self.tokens, x_TD.shape[-1])

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int, qk_norm: QKNorm) -> Tensor:
        turned = ops.mrope(qkv, self.cos, self.sin, num_kv_heads, None, None, *qk_norm)
        heads = turned.view(self.batch, self.tokens, -1, 2 * self.cos.shape[-1])
        q, k, v = heads.split([heads.shape[2] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=2)
        keys, values = torch.cat((self.past_keys[layer], k), dim=1), torch.cat((self.past_values[layer], v), dim=1)
        self.keys.append(keys)
        self.values.append(values)
        return ops.causal_attention(q, keys, values, self.visible).flatten(0, 1)


def embed(decoder: nn.Module, input_ids: Tensor, is_image: Tensor, image_embeds: Tensor) -> Tensor:
    """Input embeddings (B, S, D); an image token without a feature is text, as one that was generated is."""
    embeds = decoder.embed_tokens(input_ids)
    has_feature = is_image & (image_embeds != 0).any(dim=-1)
    return torch.where(has_feature[..., None], image_embeds.to(embeds.dtype), embeds)


def place(features: Tensor, is_image: Tensor) -> Tensor:
    """A sample's features (B, M, D) in the place of its image tokens, (B, S, D), zeros elsewhere."""
    rank = (is_image.long().cumsum(1) - 1).clamp(min=0, max=features.shape[1] - 1)
    placed = features.gather(1, rank[..., None].expand(-1, -1, features.shape[-1]))
    return placed * is_image[..., None]


def rope_positions(is_image: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rope positions (3, B, S) of sequences whose images all have `grid` (h, w); see `reference.expand_prompts`."""
    h, w = grid
    rank = is_image.long().cumsum(1) - 1
    cell = rank % (h * w)
    advance = torch.where(is_image, (cell == h * w - 1).long() * max(h, w), 1) * mask
    first = advance.cumsum(1) - advance
    row, column = (torch.where(is_image, each, 0) for each in (cell // w, cell % w))
    positions = torch.stack((first, first + row, first + column))
    return positions * mask

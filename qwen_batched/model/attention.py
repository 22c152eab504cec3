"""What the decoder's tokens attend to: prompts in rows, and one token or several behind a key-value cache.

In: the packed projections (T, (N + 2K) * E) of a block. Out: (T, N * E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_batched import ops
from qwen_batched.model.parts.norms import QKNorm
from qwen_batched.runtime.backend import is_exporting


@dataclass(frozen=True)
class PromptContext:
    """Prompts back to back, each attending to itself."""

    cos: Tensor  # (T, E / 2), the rotation of each token, with `sin`
    sin: Tensor
    places: Tensor | None  # int64 (T,), the place b * S + s of each token; None where no place is padding
    rows: AttentionRows  # where attention wants the tokens
    cache: KVCache | KeysValues | None = None  # takes the keys and values; None where nobody asked for them

    def take(self, x_BSD: Tensor) -> Tensor:
        """The tokens of (B, S, D), back to back, (T, D)."""
        x_TD = x_BSD.flatten(0, 1)
        return x_TD if self.places is None else x_TD.index_select(0, self.places)

    def place(self, x_TD: Tensor) -> Tensor:
        """Tokens back to back as (B, S, D), with zeros for padding."""
        shape = (self.rows.batch, self.rows.length, x_TD.shape[-1])
        if self.places is None:  # a copy where autograd keeps the tokens: callers may write to what they get
            return (x_TD.clone() if x_TD.requires_grad else x_TD).view(shape)
        return x_TD.new_zeros(shape).flatten(0, 1).index_copy(0, self.places, x_TD).view(shape)

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int, qk_norm: QKNorm) -> Tensor:
        """Normalises, rotates and attends, in block `layer`."""
        rows = self.rows
        placed = ops.mrope(qkv, self.cos, self.sin, num_kv_heads, rows.slots, rows.batch * rows.length, *qk_norm)
        heads_BSHE = placed.view(rows.batch, rows.length, -1, 2 * self.cos.shape[-1])
        num_heads = heads_BSHE.shape[2] - 2 * num_kv_heads
        q_BSNE, k_BSKE, v_BSKE = heads_BSHE.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        if self.cache is not None:
            self.cache.store_prompt(layer, k_BSKE, v_BSKE)
        return rows.take(ops.causal_attention(q_BSNE, k_BSKE, v_BSKE))


@dataclass(frozen=True)
class NextTokenContext:
    """The same of one token of each sample, T = B, attending to those in the cache and itself."""

    cos: Tensor  # (B, E / 2), the rotation of each token, with `sin`
    sin: Tensor
    cache: KVCache  # what came before; takes the new keys and values

    def take(self, x_BSD: Tensor) -> Tensor:
        return x_BSD[:, 0]

    def place(self, x_TD: Tensor) -> Tensor:
        return x_TD[:, None]

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int, qk_norm: QKNorm) -> Tensor:
        cache = self.cache
        keys, values = cache.keys_LBCKE[layer], cache.values_LBCKE[layer]
        return ops.decode_attention(qkv, self.cos, self.sin, keys, values, cache.lengths, cache.tickets, *qk_norm)


@dataclass(frozen=True)
class SuffixContext:
    """The same of T tokens of each sample behind a cached prompt, which stays as it is."""

    cos: Tensor  # (B * T, E / 2), the rotation of each token, with `sin`
    sin: Tensor
    cache: KVCache
    tickets: Tensor  # what `ops.extend_attention` keeps between its programs
    causal: bool  # see `ops.extend_attention`, like `visible`
    visible: Tensor | None

    def take(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.flatten(0, 1)

    def place(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(0, (len(self.cache.lengths), -1))

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int, qk_norm: QKNorm) -> Tensor:
        cache = self.cache
        stored = cache.keys_LBCKE[layer], cache.values_LBCKE[layer], cache.lengths
        return ops.extend_attention(qkv, self.cos, self.sin, *stored, self.tickets, self.causal, self.visible, *qk_norm)


Context = (
    PromptContext | NextTokenContext | SuffixContext
)  # what all blocks share about the tokens that run through them


@dataclass(frozen=True)
class AttentionRows:
    """The rows that attention works on: one of `length` places for each sample, its tokens first."""

    batch: int
    length: int
    slots: Tensor | None = None  # int64 (T,), the place b * length + s of each token; None where tokens fill the rows

    def take(self, x: Tensor) -> Tensor:
        """Rows (batch, length, ...) to tokens back to back, (T, ...)."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


def unpad(attention_mask: Tensor, tokens: int) -> tuple[Tensor, AttentionRows]:
    """How `tokens` tokens of (B, S) stand back to back: all real ones, and padding where there is more room.

    Returns their places b * S + s, (T,), real ones first, and the rows that attention works on.
    """
    batch, length = attention_mask.shape
    padding_BS = (~attention_mask).to(torch.uint8)
    order_BS = _tokens_first(padding_BS)
    first_B1 = torch.arange(batch, device=order_BS.device)[:, None] * length
    if tokens == batch * length:
        return (first_B1 + order_BS).flatten(), AttentionRows(batch, length)
    places_T = torch.argsort(padding_BS.flatten(), stable=True)[:tokens]
    slots_BS = first_B1 + torch.argsort(order_BS, dim=1)
    return places_T, AttentionRows(batch, length, slots_BS.flatten().index_select(0, places_T))


def _tokens_first(padding_BS: Tensor) -> Tensor:
    """Int64 (B, S), the places of a row's tokens, and behind them those of its padding, where `padding_BS` is 1."""
    if not is_exporting():
        return torch.argsort(padding_BS, dim=1, stable=True)
    # The same by cumulative sums: ONNX has no stable sort.
    padding_BS = padding_BS.long()
    tokens_BS = 1 - padding_BS
    behind_BS = tokens_BS.sum(dim=1, keepdim=True) + padding_BS.cumsum(1)
    slots_BS = torch.where(padding_BS == 0, tokens_BS.cumsum(1), behind_BS) - 1
    places_BS = torch.arange(padding_BS.shape[1], device=padding_BS.device).expand(padding_BS.shape)
    return torch.zeros_like(slots_BS).scatter(1, slots_BS, places_BS)


class KeysValues:
    """Keys and values of a prompt in some of the decoder's blocks, as callers get them; autograd sees through it."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = blocks
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self.depth = max(blocks, default=-1) + 1  # how many blocks must run

    def store_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Takes keys and values (B, S, K, E) of block `layer`, padding last; not again where it is recomputed."""
        if layer in self._blocks:
            self._rows.setdefault(layer, (keys, values))

    def end_prompt(self, lengths: Tensor) -> None:
        """The prompt is stored in every block."""

    def in_place(self, attention_mask: Tensor, is_padded: bool = True) -> list[tuple[Tensor, Tensor]]:
        """Of each block asked for, (B, S, K, E) with tokens where `attention_mask` (B, S) has them; 0 on padding."""
        if not is_padded:
            return [tuple(x.clone(memory_format=torch.contiguous_format) for x in self._rows[i]) for i in self._blocks]
        batch, length = attention_mask.shape
        first_B1 = torch.arange(batch, device=attention_mask.device)[:, None] * length
        row_M = (first_B1 + attention_mask.long().cumsum(1).sub(1).clamp(min=0)).flatten()

        def place(x_BSKE: Tensor) -> Tensor:
            moved = x_BSKE.flatten(0, 1).index_select(0, row_M).view(x_BSKE.shape)
            return moved.masked_fill(~attention_mask[:, :, None, None], 0)

        return [tuple(map(place, self._rows[i])) for i in self._blocks]


class KVCache:
    """Holds up to C tokens for each of B samples and each decoder block.

    A sample's tokens stand at 0, 1, 2, ... whatever its neighbours' lengths, so that padding is never attended to.
    First comes the prompt, through `store_prompt` in every block and one `end_prompt`; then single tokens, each stored
    by `ops.decode_attention` in every block and followed by one `end_token`. Keys are rotated.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        shape = (num_layers, batch, capacity, num_heads, head_dim)
        # Zeros, not garbage: the reference multiplies values past a sample's end by 0, which a NaN would survive.
        self.keys_LBCKE, self.values_LBCKE = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)  # tokens that each sample holds
        # What `ops.decode_attention` keeps between its programs.
        self.tickets = torch.zeros(batch * num_heads, dtype=torch.int32, device=like.device)
        self.depth = num_layers  # how many blocks must run

    @classmethod
    def holding(cls, keys_LBCKE: Tensor, values_LBCKE: Tensor, lengths: Tensor) -> KVCache:
        """One of what another has stored."""
        cache = cls.__new__(cls)
        cache.keys_LBCKE, cache.values_LBCKE, cache.lengths = keys_LBCKE, values_LBCKE, lengths
        cache.depth, batch, _, num_heads, _ = keys_LBCKE.shape
        cache.tickets = torch.zeros(batch * num_heads, dtype=torch.int32, device=keys_LBCKE.device)
        return cache

    def store_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values (B, S, K, E) of block `layer`, padding last."""
        length = keys.shape[1]
        self.keys_LBCKE[layer, :, :length], self.values_LBCKE[layer, :, :length] = keys, values

    def end_prompt(self, lengths: Tensor) -> None:
        """The prompt, of `lengths` (B,) tokens, is stored in every block."""
        self.lengths.copy_(lengths)

    def end_token(self) -> None:
        """One more token is stored in every block."""
        self.lengths += 1

"""What the decoder's tokens attend to.

In: the packed projections (T, (N + 2K) * E) of a block. Out: (T, N * E).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qwen_batched.kernels import ops
from qwen_batched.model.attention_rows import AttentionRows
from qwen_batched.model.kv_cache import KVCache


class Context(Protocol):
    """What all blocks share about the tokens that run through them."""

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int) -> Tensor:
        """Rotates and attends, in block `layer`."""
        ...

    def take(self, x_BSD: Tensor) -> Tensor:
        """The tokens of (B, S, D), back to back, (T, D)."""
        ...

    def place(self, x_TD: Tensor) -> Tensor:
        """Tokens back to back as (B, S, D), with zeros for padding."""
        ...


@dataclass(frozen=True)
class PromptContext:
    """Prompts back to back, each attending to itself.

    Attributes:
        cos, sin: (T, E / 2), the rotation of each token.
        places: Int64 (T,), the place b * S + s of each token.
        rows: Where attention wants the tokens.
        cache: Takes the keys and values; None where nothing is decoded afterwards.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor
    rows: AttentionRows
    cache: KVCache | None = None

    def take(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, 1).index_select(0, self.places)

    def place(self, x_TD: Tensor) -> Tensor:
        shape = (self.rows.batch, self.rows.length, x_TD.shape[-1])
        return x_TD.new_zeros(shape).flatten(0, 1).index_copy(0, self.places, x_TD).view(shape)

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int) -> Tensor:
        rows = self.rows
        placed = ops.mrope(qkv, self.cos, self.sin, num_kv_heads, rows.slots, rows.batch * rows.length)
        heads_BSHE = placed.view(rows.batch, rows.length, -1, 2 * self.cos.shape[-1])
        num_heads = heads_BSHE.shape[2] - 2 * num_kv_heads
        q_BSNE, k_BSKE, v_BSKE = heads_BSHE.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        if self.cache is not None:
            self.cache.store_prompt(layer, k_BSKE, v_BSKE)
        return rows.take(ops.causal_attention(q_BSNE, k_BSKE, v_BSKE))


@dataclass(frozen=True)
class NextTokenContext:
    """One token of each sample, T = B, attending to those in the cache and itself.

    Attributes:
        cos, sin: (B, E / 2), the rotation of each token.
        cache: What came before; takes the new keys and values.
    """

    cos: Tensor
    sin: Tensor
    cache: KVCache

    def take(self, x_BSD: Tensor) -> Tensor:
        return x_BSD[:, 0]

    def place(self, x_TD: Tensor) -> Tensor:
        return x_TD[:, None]

    def attend(self, layer: int, qkv: Tensor, num_kv_heads: int) -> Tensor:
        cache = self.cache
        keys, values = cache.keys_LBCKE[layer], cache.values_LBCKE[layer]
        return ops.decode_attention(qkv, self.cos, self.sin, keys, values, cache.lengths, cache.tickets)

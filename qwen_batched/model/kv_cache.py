"""Keys and values of the tokens decoded so far, in buffers whose size and place are fixed at the start."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Holds up to C tokens for each of B samples and each decoder block.

    A sample's tokens stand at 0, 1, 2, ... whatever its neighbours' lengths, so that padding is never attended to.
    First comes the prompt, through `update` in every block and one `end_prompt`; then single tokens, each through
    `update` in every block and one `end_token`.

    Attributes:
        lengths: Int64 (B,), tokens that each sample holds.
        visible: Bool (B, C), keys that the token in flight may see; None while the prompt is written, where attention
            is causal.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        shape = (num_layers, batch, capacity, num_heads, head_dim)
        # Zeros, not garbage: keys past a sample's end are masked, but a NaN would survive the mask.
        self.keys_LBCKE, self.values_LBCKE = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.visible: Tensor | None = None
        self._slots = torch.arange(capacity, device=like.device)
        self._rows = torch.arange(batch, device=like.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, S, K, E) of block `layer`; returns those to attend to."""
        all_keys, all_values = self.keys_LBCKE[layer], self.values_LBCKE[layer]
        if self.visible is None:
            all_keys[:, : keys.shape[1]], all_values[:, : keys.shape[1]] = keys, values
            return keys, values
        # Under autocast keys and values come in another dtype than the embeddings that the cache was made like.
        all_keys[self._rows, self.lengths] = keys[:, 0].to(all_keys.dtype)
        all_values[self._rows, self.lengths] = values[:, 0].to(all_values.dtype)
        return all_keys, all_values

    def end_prompt(self, lengths: Tensor) -> None:
        """The prompt, of `lengths` (B,) tokens, is stored in every block."""
        self.lengths.copy_(lengths)
        self.visible = self._slots <= self.lengths[:, None]

    def end_token(self) -> None:
        """One more token is stored in every block."""
        self.lengths += 1
        torch.le(self._slots, self.lengths[:, None], out=self.visible)

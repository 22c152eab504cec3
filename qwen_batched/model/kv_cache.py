"""Keys and values of the tokens decoded so far, in buffers whose size and place are fixed at the start."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Holds up to C tokens for each of B samples and each decoder block.

    A sample's tokens stand at 0, 1, 2, ... whatever its neighbours' lengths, so that padding is never attended to.
    First comes the prompt, through `store_prompt` in every block and one `end_prompt`; then single tokens, each stored
    by `ops.decode_attention` in every block and followed by one `end_token`.

    Attributes:
        keys_LBCKE: Rotated keys.
        values_LBCKE: Values.
        lengths: Int64 (B,), tokens that each sample holds.
        tickets: What `ops.decode_attention` keeps between its programs.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        shape = (num_layers, batch, capacity, num_heads, head_dim)
        # Zeros, not garbage: the reference multiplies values past a sample's end by 0, which a NaN would survive.
        self.keys_LBCKE, self.values_LBCKE = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.tickets = torch.zeros(batch * num_heads, dtype=torch.int32, device=like.device)

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

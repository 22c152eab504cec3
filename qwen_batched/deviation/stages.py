"""What is compared, by name, in the order in which it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.inputs.checks import resolve_layers

PIXELS, PATCHES, FEATURES = "pixels", "patch embedding", "merger"
TOKENS, POSITIONS, EMBEDDINGS = "token ids", "rope positions", "embeddings"
FINAL, LOGITS, GREEDY = "final hidden states", "logits", "greedy tokens"
EXACT = (TOKENS, POSITIONS)  # integers: equal or wrong


@dataclass(frozen=True)
class Stages:
    """The blocks that are compared, besides everything before, between and after them."""

    vision_blocks: tuple[int, ...]  # indices of the vision transformer's blocks, from 0, as `encode_images` takes them
    # Indices as of transformers' `hidden_states`: 0 is the embeddings, k the output of decoder block k, the last one
    # before the final norm.
    decoder_blocks: tuple[int, ...]

    @classmethod
    def of(
        cls, config: QwenVLConfig, vision_layers: Sequence[int] | None = None, layers: Sequence[int] | None = None
    ) -> Stages:
        """All blocks, or those asked for, negative ones counted from the end. Raises `ValueError` where one is not."""
        depth, blocks = config.vision.depth, config.text.num_hidden_layers
        vision = range(depth) if vision_layers is None else resolve_layers(vision_layers, depth)
        decoder = range(blocks + 1) if layers is None else resolve_layers(layers, blocks + 1)
        return cls(tuple(sorted(set(vision))), tuple(sorted(set(decoder))))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all stages, in order."""
        return (
            *(PIXELS, PATCHES),
            *map(vision_stage, self.vision_blocks),
            *(FEATURES, TOKENS, POSITIONS),
            *map(decoder_stage, self.decoder_blocks),
            *(FINAL, LOGITS, GREEDY),
        )


def vision_stage(block: int) -> str:
    """The output of a vision block."""
    return f"vision block {block}"


def decoder_stage(layer: int) -> str:
    """Hidden states, by transformers' index."""
    return f"decoder block {layer}" if layer else EMBEDDINGS

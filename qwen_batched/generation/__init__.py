"""Prompt embeddings -> new tokens and their text."""

from qwen_batched.generation.decoding import Decoding, DecodingKind
from qwen_batched.generation.loop import STEPS_PER_POLL, generate_texts
from qwen_batched.generation.pool import DecodingPool
from qwen_batched.generation.rules import AllowedTokens, Rules
from qwen_batched.generation.sampling import Sampling

__all__ = [
    "STEPS_PER_POLL",
    "AllowedTokens",
    "Decoding",
    "DecodingKind",
    "DecodingPool",
    "Rules",
    "Sampling",
    "generate_texts",
]

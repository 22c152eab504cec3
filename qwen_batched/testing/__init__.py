"""Checkpoints without a download: folders in the hub's layout with made-up weights and a working tokenizer."""

from qwen_batched.testing.checkpoints import CONFIG_LAYOUTS, KEY_LAYOUTS, WEIGHTS, default_checkpoint, write_checkpoint
from qwen_batched.testing.presets import PRESETS, Preset
from qwen_batched.testing.tokenizer import ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer
from qwen_batched.testing.weights import random_tensor, tensor_shapes

__all__ = [
    "ADDED_TOKENS",
    "CHAT_TEMPLATE",
    "CONFIG_LAYOUTS",
    "KEY_LAYOUTS",
    "PRESETS",
    "SPECIAL_TOKENS",
    "WEIGHTS",
    "Preset",
    "build_tokenizer",
    "default_checkpoint",
    "random_tensor",
    "tensor_shapes",
    "write_checkpoint",
]

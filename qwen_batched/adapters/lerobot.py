"""The public path of `qwen_batched.integrations.lerobot`."""

from qwen_batched.integrations.lerobot import from_lerobot

__all__ = ["from_lerobot"]

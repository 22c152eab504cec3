"""Qwen2.5-VL's two networks, batched."""

from qwen_batched.model.decoder import BatchedDecoder
from qwen_batched.model.vision import BatchedVisionTransformer

__all__ = ["BatchedDecoder", "BatchedVisionTransformer"]

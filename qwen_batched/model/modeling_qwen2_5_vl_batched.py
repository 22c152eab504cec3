"""Qwen2.5-VL's two networks, batched: what their parts are. See `vision` and `decoder` for what goes in and out."""

from __future__ import annotations

from qwen_batched.checkpoint.config import TextConfig, VisionConfig
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.parts.mlps import SwiGLU
from qwen_batched.model.parts.norms import AddRMSNorm
from qwen_batched.model.parts.patches import PatchMerger
from qwen_batched.model.vision import VisionTransformer

__all__ = ["BatchedDecoder", "BatchedVisionTransformer"]

VISION_NORM_EPS = 1e-6  # transformers takes it from no config


class BatchedVisionTransformer(VisionTransformer):
    """The vision tower: windowed attention in most blocks, attention over each whole image in a few."""

    def __init__(self, config: VisionConfig) -> None:
        def norm(dim: int) -> AddRMSNorm:
            return AddRMSNorm(dim, VISION_NORM_EPS)

        super().__init__(
            config,
            norm=norm,
            mlp=lambda: SwiGLU(config.hidden_size, config.intermediate_size, bias=True),
            merger=lambda: PatchMerger(config, norm(config.hidden_size)),
        )


class BatchedDecoder(Decoder):
    """The language model: causal grouped-query attention with multimodal rope."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(
            config,
            norm=lambda dim: AddRMSNorm(dim, config.rms_norm_eps),
            mlp=lambda: SwiGLU(config.hidden_size, config.intermediate_size, bias=False),
            qkv_bias=True,
        )

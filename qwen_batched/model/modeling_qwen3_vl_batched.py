"""Qwen3-VL's two networks, batched: what their parts are. See `vision` and `decoder` for what goes in and out."""

from __future__ import annotations

import functools

from qwen_batched.checkpoint.config import TextConfig, VisionConfig
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.parts.mlps import MLP, SwiGLU
from qwen_batched.model.parts.norms import AddLayerNorm, AddRMSNorm
from qwen_batched.model.parts.patches import FlatPatchMerger
from qwen_batched.model.parts.ropes import interleaved
from qwen_batched.model.vision import VisionTransformer

__all__ = ["BatchedDecoder", "BatchedVisionTransformer"]

VISION_NORM_EPS = 1e-6  # transformers takes it from no config


class BatchedVisionTransformer(VisionTransformer):
    """The vision tower: a position table, attention over each whole image, and features of some blocks in between."""

    def __init__(self, config: VisionConfig) -> None:
        norm = functools.partial(AddLayerNorm, eps=VISION_NORM_EPS)
        names = ("linear_fc1", "linear_fc2")
        super().__init__(
            config,
            norm=norm,
            mlp=lambda: MLP(config.hidden_size, config.intermediate_size, config.hidden_act, names),
            merger=lambda: FlatPatchMerger(config, norm(config.hidden_size)),
            deep_merger=lambda: FlatPatchMerger(config, norm(config.hidden_size * config.cell_patches), True),
            patch_bias=True,
        )


class BatchedDecoder(Decoder):
    """The language model: causal grouped-query attention with normalised heads and interleaved multimodal rope."""

    def __init__(self, config: TextConfig) -> None:
        def norm(dim: int) -> AddRMSNorm:
            return AddRMSNorm(dim, config.rms_norm_eps)

        super().__init__(
            config,
            norm=norm,
            mlp=lambda: SwiGLU(config.hidden_size, config.intermediate_size, bias=False),
            qkv_bias=False,
            qk_norm=norm,
            rope=interleaved,
        )

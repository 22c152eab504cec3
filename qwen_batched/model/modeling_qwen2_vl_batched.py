"""Qwen2-VL's two networks, batched: what their parts are. See `vision` and `decoder` for what goes in and out."""

from __future__ import annotations

import functools

from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.modeling_qwen2_5_vl_batched import VISION_NORM_EPS, BatchedDecoder
from qwen_batched.model.parts.mlps import MLP
from qwen_batched.model.parts.norms import AddLayerNorm
from qwen_batched.model.parts.patches import PatchMerger
from qwen_batched.model.vision import VisionTransformer

__all__ = ["BatchedDecoder", "BatchedVisionTransformer"]


class BatchedVisionTransformer(VisionTransformer):
    """The vision tower: attention over each whole image in every block."""

    def __init__(self, config: VisionConfig) -> None:
        norm = functools.partial(AddLayerNorm, eps=VISION_NORM_EPS)
        super().__init__(
            config,
            norm=norm,
            mlp=lambda: MLP(config.hidden_size, config.intermediate_size, config.hidden_act),
            merger=lambda: PatchMerger(config, norm(config.hidden_size)),
        )

"""Qwen2-VL (arXiv:2409.12191); numbers are the defaults of transformers' configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from packaging.version import Version

from qwen_batched.checkpoint.config import QwenVLConfig, VisionConfig
from qwen_batched.families.family import Family
from qwen_batched.families.qwen import CLIP_IMAGE, NAMED_AS_MODULES, SPECIAL_TOKENS, TEXT, TOKEN_IDS, prompt_style

MLP_RATIO = 4


def vision_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A vision config's fields by the names of `VisionConfig`: here `embed_dim` is the width, `hidden_size` the output.

    Where one is missing or no number, it stays so, for the reader to judge.
    """
    width, ratio = raw.get("embed_dim", VISION.hidden_size), raw.get("mlp_ratio", MLP_RATIO)
    renamed = {"hidden_size": width, "out_hidden_size": raw.get("hidden_size"), "intermediate_size": None}
    if isinstance(width, int) and isinstance(ratio, int | float):
        renamed["intermediate_size"] = int(width * ratio)
    return {**raw, **renamed}


def vision_names(config: VisionConfig) -> dict[str, Any]:
    """The same fields back by the files' names."""
    names = ("depth", "num_heads", "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")
    sizes = {"embed_dim": config.hidden_size, "hidden_size": config.out_hidden_size}
    ratio = config.intermediate_size / config.hidden_size
    return {name: getattr(config, name) for name in (*names, "hidden_act")} | sizes | {"mlp_ratio": ratio}


VISION = VisionConfig(
    depth=32,
    hidden_size=1280,
    intermediate_size=5120,
    num_heads=16,
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=3584,
    hidden_act="quick_gelu",
    rope_theta=10000.0,
)
FAMILY = Family(
    config=QwenVLConfig(model_type="qwen2_vl", vision=VISION, text=TEXT, image_token_id=151655),
    token_ids=TOKEN_IDS,
    image=CLIP_IMAGE,
    image_processor="Qwen2VLImageProcessor",
    keys=NAMED_AS_MODULES,
    prompt=prompt_style(SPECIAL_TOKENS),
    vision_fields=vision_fields,
    vision_names=vision_names,
    # Unlike the others' classes it does not say no, and Trainer takes a `forward` of any keywords for a yes.
    accepts_loss_kwargs=Version(transformers.__version__) >= Version("4.53"),
)

"""Qwen2.5-VL (arXiv:2502.13923); numbers are the defaults of transformers' configuration classes."""

from qwen_batched.checkpoint.config import QwenVLConfig, VisionConfig
from qwen_batched.families.family import Family
from qwen_batched.families.qwen import (
    CLIP_IMAGE,
    CODE_TOKENS,
    NAMED_AS_MODULES,
    SPECIAL_TOKENS,
    TEXT,
    TOKEN_IDS,
    prompt_style,
)

VISION = VisionConfig(
    depth=32,
    hidden_size=3584,
    intermediate_size=3420,
    num_heads=16,
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=3584,
    hidden_act="silu",
    rope_theta=10000.0,
    window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
)
FAMILY = Family(
    config=QwenVLConfig(model_type="qwen2_5_vl", vision=VISION, text=TEXT, image_token_id=151655),
    token_ids=TOKEN_IDS,
    image=CLIP_IMAGE,
    image_processor="Qwen2VLImageProcessor",
    keys=NAMED_AS_MODULES,
    prompt=prompt_style((*SPECIAL_TOKENS, *CODE_TOKENS)),
    genai_type="qwen2_5_vl",
)

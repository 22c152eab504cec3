"""What checkpoints are written from: four presets, and the fields that all published checkpoints share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """What `write_checkpoint` starts from. `text` and `vision` hold config.json's own field names."""

    text: Config
    vision: Config
    tied: bool
    special_token_start: int
    shards: int = 1


_PUBLISHED_VISION: Config = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}

PRESETS: dict[str, Preset] = {
    # Merciless rather than pretty: odd MLP widths, an odd number of vision heads, a full-attention block that is not
    # the last one and a windowed block that is, more embedding rows than tokens, ids far from the published ones.
    "tiny": Preset(
        text={
            "hidden_size": 64,
            "intermediate_size": 150,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 600,
            "max_position_embeddings": 4096,
            "mrope_section": [2, 3, 3],
        },
        vision={
            "depth": 6,
            "hidden_size": 80,
            "intermediate_size": 90,
            "num_heads": 5,
            "fullatt_block_indexes": [1, 4],
        },
        tied=True,
        special_token_start=500,
    ),
    # Real head sizes (80 and 128) and real mrope sections at a size that two CPU cores run in seconds.
    "small": Preset(
        text={
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 32768,
            "mrope_section": [16, 24, 24],
        },
        vision={
            "depth": 6,
            "hidden_size": 320,
            "intermediate_size": 854,
            "num_heads": 4,
            "fullatt_block_indexes": [2, 5],
        },
        tied=True,
        special_token_start=432,  # no gap: what the random model generates are real tokens
    ),
    "3b": Preset(
        text={
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "max_window_layers": 70,
            "mrope_section": [16, 24, 24],
        },
        vision=_PUBLISHED_VISION,
        tied=True,
        special_token_start=151643,
        shards=2,
    ),
    "7b": Preset(
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "mrope_section": [16, 24, 24],
        },
        vision=_PUBLISHED_VISION,
        tied=False,
        special_token_start=151643,
        shards=5,
    ),
}

# Fields that all published checkpoints share.
TEXT_DEFAULTS: Config = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 70,
}
VISION_DEFAULTS: Config = {
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
}
IMAGE_DEFAULTS: Config = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
IMAGE_EXTRA_FIELDS = ("size", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample")
GENERATION_EXTRA_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "max_length")

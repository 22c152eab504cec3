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


_TEXT_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "mrope_section"),
)
_VISION_FIELDS = ("depth", "hidden_size", "intermediate_size", "num_heads", "fullatt_block_indexes")


def _preset(text: tuple, vision: tuple, tied: bool, special_token_start: int, shards: int = 1, **more: Any) -> Preset:
    """A row of the table below: the values of `_TEXT_FIELDS` and `_VISION_FIELDS`, and more text fields."""
    text_config = dict(zip(_TEXT_FIELDS, text, strict=True), **more)
    return Preset(text_config, dict(zip(_VISION_FIELDS, vision, strict=True)), tied, special_token_start, shards)


_PUBLISHED_VISION = (32, 1280, 3420, 16, [7, 15, 23, 31])
PRESETS: dict[str, Preset] = {
    # Merciless rather than pretty: odd MLP widths, an odd number of vision heads, a full-attention block that is not
    # the last one and a windowed block that is, more embedding rows than tokens, ids far from the published ones.
    "tiny": _preset((64, 150, 4, 4, 2, 600, 4096, [2, 3, 3]), (6, 80, 90, 5, [1, 4]), True, 500),
    # Real head sizes (80 and 128) and real mrope sections at a size that two CPU cores run in seconds. No gap below the
    # added tokens: what the random model generates are real tokens.
    "small": _preset((512, 1376, 4, 4, 2, 512, 32768, [16, 24, 24]), (6, 320, 854, 4, [2, 5]), True, 432),
    "3b": _preset((2048, 11008, 36, 16, 2, 151936, 128000, [16, 24, 24]), _PUBLISHED_VISION, True, 151643, 2),
    "7b": _preset(
        *((3584, 18944, 28, 28, 4, 152064, 128000, [16, 24, 24]), _PUBLISHED_VISION, False, 151643, 5),
        max_window_layers=28,
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

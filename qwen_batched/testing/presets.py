"""What checkpoints are written from: presets of each family, and the fields that a family's published ones share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one `model_type` share. `text`, `vision` and `image` hold the files' own field names."""

    architecture: str
    text: Config
    vision: Config
    image: Config


_IMAGE: Config = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
_TEXT: Config = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_cache": True,
}
_SLIDING: Config = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 70}
_VISION: Config = {"in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        text=_TEXT | _SLIDING,
        vision=_VISION | {"hidden_act": "silu", "tokens_per_second": 2, "window_size": 112},
        image=_IMAGE | {"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        text=_TEXT | _SLIDING,
        vision=_VISION | {"hidden_act": "quick_gelu", "mlp_ratio": 4},
        image=_IMAGE | {"processor_class": "Qwen2VLProcessor"},
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        text=_TEXT | {"rope_theta": 5_000_000.0, "attention_bias": False},
        vision=_VISION | {"hidden_act": "gelu_pytorch_tanh", "patch_size": 16},
        image=_IMAGE
        | {"min_pixels": 65536, "max_pixels": 16777216, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
    ),
}


@dataclass(frozen=True)
class Preset:
    """What `write_checkpoint` starts from. `text` and `vision` hold config.json's own field names."""

    text: Config
    vision: Config
    tied: bool
    special_token_start: int
    shards: int = 1
    family: str = "qwen2_5_vl"


_TEXT_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "mrope_section"),
)
_VISION_FIELDS = {
    "qwen2_5_vl": ("depth", "hidden_size", "intermediate_size", "num_heads", "fullatt_block_indexes"),
    "qwen2_vl": ("depth", "embed_dim", "num_heads", "mlp_ratio"),
    "qwen3_vl": (
        *("depth", "hidden_size", "intermediate_size", "num_heads", "num_position_embeddings"),
        "deepstack_visual_indexes",
    ),
}


def _preset(
    text: tuple,
    vision: tuple,
    tied: bool,
    special_token_start: int,
    shards: int = 1,
    family: str = "qwen2_5_vl",
    **more: Any,
) -> Preset:
    """A row of the tables below: the values of `_TEXT_FIELDS` and `_VISION_FIELDS`, and more text fields."""
    text_config = dict(zip(_TEXT_FIELDS, text, strict=True), **more)
    vision_config = dict(zip(_VISION_FIELDS[family], vision, strict=True))
    return Preset(text_config, vision_config, tied, special_token_start, shards, family)


def _qwen2(text: tuple, vision: tuple, *rest: Any, **more: Any) -> Preset:
    return _preset(text, vision, *rest, family="qwen2_vl", **more)


def _qwen3(text: tuple, vision: tuple, *rest: Any, head_dim: int = 128) -> Preset:
    return _preset(text, vision, *rest, family="qwen3_vl", head_dim=head_dim)


_TINY_TEXT = (64, 150, 4, 4, 2, 600, 4096, [2, 3, 3])
_SMALL_TEXT = (512, 1376, 4, 4, 2, 512, 32768, [16, 24, 24])
_PUBLISHED_VISION = (32, 1280, 3420, 16, [7, 15, 23, 31])
_SECTIONS, _SECTIONS3, _FIRST = [16, 24, 24], [24, 20, 20], 151643
_VISION3 = (24, 1024, 4096, 16, 48 * 48, [5, 11, 17])
_QWEN3_2B = _qwen3((2048, 6144, 28, 16, 8, 151936, 262144, _SECTIONS3), _VISION3, True, _FIRST)
PRESETS: dict[str, Preset] = {
    # Merciless rather than pretty: odd MLP widths, an odd number of vision heads, a full-attention block that is not
    # the last one and a windowed block that is, more embedding rows than tokens, ids far from the published ones.
    "tiny": _preset(_TINY_TEXT, (6, 80, 90, 5, [1, 4]), True, 500),
    "qwen2-vl-tiny": _qwen2(_TINY_TEXT, (4, 80, 5, 2), True, 500),
    # Heads that do not fill the width, and more of them than fit into it; two deep blocks side by side and a last one.
    "qwen3-vl-tiny": _qwen3(
        (64, 150, 5, 6, 2, 600, 4096, [6, 3, 3]), (6, 80, 90, 5, 49, [1, 2, 5]), True, 500, head_dim=24
    ),
    # Real head sizes (80 and 128; 72) and real mrope sections at a size that two CPU cores run in seconds. No gap below
    # the added tokens: what the random model generates are real tokens.
    "small": _preset(_SMALL_TEXT, (6, 320, 854, 4, [2, 5]), True, 432),
    "qwen2-vl-small": _qwen2(_SMALL_TEXT, (6, 320, 4, 4), True, 432),
    "qwen3-vl-small": _qwen3(
        (384, 1024, 4, 4, 2, 512, 32768, _SECTIONS3), (6, 288, 700, 4, 48 * 48, [1, 2, 4]), True, 432
    ),
    "3b": _preset((2048, 11008, 36, 16, 2, 151936, 128000, _SECTIONS), _PUBLISHED_VISION, True, _FIRST, 2),
    "7b": _preset(
        *((3584, 18944, 28, 28, 4, 152064, 128000, _SECTIONS), _PUBLISHED_VISION, False, _FIRST, 5),
        max_window_layers=28,
    ),
    "qwen2-vl-2b": _qwen2((1536, 8960, 28, 12, 2, 151936, 32768, _SECTIONS), (32, 1280, 16, 4), True, _FIRST, 2),
    "qwen2-vl-7b": _qwen2((3584, 18944, 28, 28, 4, 152064, 32768, _SECTIONS), (32, 1280, 16, 4), False, _FIRST, 5),
    "qwen3-vl-2b": _QWEN3_2B,
    "qwen3-vl-4b": _qwen3((2560, 9728, 36, 32, 8, 151936, 262144, _SECTIONS3), _VISION3, True, _FIRST, 2),
    "qwen3-vl-8b": _qwen3(
        *((4096, 12288, 36, 32, 8, 151936, 262144, _SECTIONS3), (27, 1152, 4304, 16, 48 * 48, [8, 16, 24])),
        *(False, _FIRST, 4),
    ),
    "cosmos-reason2-2b": _QWEN3_2B,
}

IMAGE_EXTRA_FIELDS = ("size", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample")
GENERATION_EXTRA_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "max_length")

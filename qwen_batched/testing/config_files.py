"""A checkpoint's JSON files, in the layouts in which they are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qwen_batched.testing.presets import IMAGE_DEFAULTS, Config


def write_json(path: Path, content: Config) -> None:
    """Writes a file as the hub has them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_defaults(vision: Config) -> Config:
    """preprocessor_config.json."""
    return IMAGE_DEFAULTS | {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
    }


def generation_defaults(token_ids: Mapping[str, int]) -> Config:
    """generation_config.json."""
    return {
        "bos_token_id": token_ids["<|endoftext|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": [token_ids["<|im_end|>"], token_ids["<|endoftext|>"]],
        "do_sample": False,
    }


def _common_config(token_ids: Mapping[str, int], tied: bool) -> Config:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_token_id": token_ids["<|vision_pad|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "tie_word_embeddings": tied,
    }


def _text_token_ids(token_ids: Mapping[str, int]) -> Config:
    return {"bos_token_id": token_ids["<|endoftext|>"], "eos_token_id": token_ids["<|im_end|>"]}


def flat_config(text: Config, vision: Config, token_ids: Mapping[str, int], tied: bool, dtype: torch.dtype) -> Config:
    """As the published checkpoints have it: text fields at the top, rope in two places, older vision names."""
    text_fields = {field: value for field, value in text.items() if field != "mrope_section"}
    vision_fields = {field: value for field, value in vision.items() if field != "in_channels"}
    vision_fields |= {"in_chans": vision["in_channels"], "spatial_patch_size": vision["patch_size"]}
    return {
        **_common_config(token_ids, tied),
        **_text_token_ids(token_ids),
        **text_fields,
        "rope_scaling": {"type": "mrope", "mrope_section": text["mrope_section"]},
        "torch_dtype": _dtype_name(dtype),
        "vision_config": vision_fields,
    }


def nested_config(text: Config, vision: Config, token_ids: Mapping[str, int], tied: bool, dtype: torch.dtype) -> Config:
    """As transformers 5 saves it: `text_config` and `vision_config`, all of rope in `rope_parameters`."""
    text_fields = {field: value for field, value in text.items() if field not in ("mrope_section", "rope_theta")}
    rope_parameters = {"rope_type": "default", "rope_theta": text["rope_theta"], "mrope_section": text["mrope_section"]}
    return {
        **_common_config(token_ids, tied),
        "dtype": _dtype_name(dtype),
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            **_text_token_ids(token_ids),
            **text_fields,
            "rope_parameters": rope_parameters,
            "dtype": _dtype_name(dtype),
        },
        "vision_config": {"model_type": "qwen2_5_vl_vision", **vision, "dtype": _dtype_name(dtype)},
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

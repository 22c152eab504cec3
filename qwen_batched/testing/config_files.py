"""A checkpoint's JSON files, in the layouts in which they are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qwen_batched.testing.presets import FAMILIES, Config


def write_json(path: Path, content: Config) -> None:
    """Writes a file as the hub has them."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_defaults(vision: Config, family: str) -> Config:
    """preprocessor_config.json."""
    return FAMILIES[family].image | {
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


def config(
    text: Config,
    vision: Config,
    token_ids: Mapping[str, int],
    tied: bool,
    dtype: torch.dtype,
    layout: str,
    family: str = "qwen2_5_vl",
) -> Config:
    """config.json, in one of `CONFIG_LAYOUTS`."""
    common = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "tie_word_embeddings": tied,
    }
    ends = {"bos_token_id": token_ids["<|endoftext|>"], "eos_token_id": token_ids["<|im_end|>"]}
    rope = {"mrope_section": text["mrope_section"]}
    fields = {field: value for field, value in text.items() if field != "mrope_section"}
    named = {"dtype": str(dtype).removeprefix("torch.")}
    if family == "qwen3_vl":
        rope |= {"mrope_interleaved": True, "rope_type": "default"}
    else:
        common["vision_token_id"] = token_ids["<|vision_pad|>"]
    if layout == "flat" and family != "qwen3_vl":
        # Text fields at the top, rope in two places, older vision names.
        vision_fields = {field: value for field, value in vision.items() if field != "in_channels"}
        vision_fields |= {"in_chans": vision["in_channels"], "spatial_patch_size": vision["patch_size"]}
        scaling = {"rope_scaling": {"type": "mrope", **rope}, "torch_dtype": named["dtype"]}
        return {**common, **ends, **fields, **scaling, "vision_config": vision_fields}
    if layout == "flat":
        # Published nested, with rope in two places.
        text_fields = {**fields, "rope_scaling": rope}
    else:
        # As transformers 5 saves it: all of rope in `rope_parameters`.
        theta = fields.pop("rope_theta")
        text_fields = {**fields, "rope_parameters": {"rope_type": "default", "rope_theta": theta, **rope}}
    return {
        **common,
        **named,
        "text_config": {"model_type": f"{family}_text", **ends, **text_fields, **named},
        "vision_config": {"model_type": f"{family}_vision", **vision, **named},
    }

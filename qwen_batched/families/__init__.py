"""The families of models that this package runs, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.checkpoint.folder import CONFIG_FILE, Checkpoint, naming
from qwen_batched.families import qwen2_5_vl
from qwen_batched.families.family import Family, PromptStyle

__all__ = ["FAMILIES", "Family", "PromptStyle", "family_of", "read_config"]

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (qwen2_5_vl.FAMILY,)}


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`. Raises `ValueError` where it is not supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {shown(model_type)}")
    return FAMILIES[model_type]


def read_config(checkpoint: Checkpoint) -> QwenVLConfig:
    """The shape of a checkpoint's model. Raises `ValueError`, naming the file, for what is not implemented here."""
    with naming(checkpoint.folder / CONFIG_FILE):
        return family_of(checkpoint.config.get("model_type")).read_config(checkpoint.config)

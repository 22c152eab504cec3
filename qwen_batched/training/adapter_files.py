"""An adapter's folder, as peft writes it -> settings and tensors, checked before anything is built of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qwen_batched.arguments import cut, shown
from qwen_batched.checkpoint.files import read_json
from qwen_batched.checkpoint.folder import ADAPTER_FILE
from qwen_batched.checkpoint.keys import KeyLayout

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key, before the name of a module
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MATCH_SECONDS = 0.5  # of a pattern with a name; one that backtracks without end is refused


def matches(pattern: str, name: str) -> bool:
    """Whether an adapter's pattern is all of a module's name. Raises `TimeoutError` where matching takes too long."""
    return regex.fullmatch(pattern, name, timeout=MATCH_SECONDS) is not None


def _of(*kinds: type, holds: Callable[[Any], bool] = lambda value: True) -> Callable[[object], bool]:
    return lambda value: type(value) in kinds and holds(value)


_is_flag = _of(bool)
_is_number = _of(int, float, holds=math.isfinite)
_is_count, _is_index = _of(int, holds=lambda value: value >= 1), _of(int, holds=lambda value: value >= 0)
_is_name, _is_path = _of(str, holds=bool), _of(str, holds=lambda value: re.fullmatch(r"[\w.]+", value) is not None)


def _is_pattern(value: object) -> bool:
    try:
        return _is_name(value) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _list_of(item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(item, value))


def _dict_of(key: Callable[[object], bool], item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(item, value.values()))


def _any_of(*kinds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(kind(value) for kind in kinds)


def _is_empty(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


# What a field may be, and how to say so. A field that is not here changes nothing, or is refused.
REQUIRED = {
    "r": (_is_count, "an int of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "target_modules": (_any_of(_is_pattern, _list_of(_is_name)), "a pattern or a list of names"),
}
OPTIONAL = {
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "exclude_modules": (_any_of(_is_empty, _is_pattern, _list_of(_is_name)), "a pattern or a list of names"),
    "layers_to_transform": (_any_of(_is_empty, _is_index, _list_of(_is_index)), "an int or a list of ints"),
    "layers_pattern": (_any_of(_is_empty, _is_path, _list_of(_is_path)), "a name or a list of names"),
    "rank_pattern": (_any_of(_is_empty, _dict_of(_is_pattern, _is_count)), "an object of ints of at least 1"),
    "alpha_pattern": (_any_of(_is_empty, _dict_of(_is_pattern, _is_number)), "an object of numbers"),
    "modules_to_save": (_any_of(_is_empty, _list_of(_is_path)), "a list of names"),
    "trainable_token_indices": (
        _any_of(_is_empty, _list_of(_is_index), _dict_of(_is_name, _list_of(_is_index))),
        "a list of token ids, or an object of such lists",
    ),
    # Some ways to begin change the base weights, and peft does so again wherever it loads the adapter.
    "init_lora_weights": (_any_of(_is_flag, _is_name), "a bool or a name"),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        (_any_of(_is_empty, lambda value: isinstance(value, dict)), "an object"),
    ),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), (_is_flag, "a bool")
    ),
}
# Where the adapter comes from, and what peft does at each place anew.
WITHOUT_EFFECT = (
    *("peft_type", "task_type", "inference_mode", "peft_version", "auto_mapping", "revision"),
    *("base_model_name_or_path", "runtime_config"),
)


def read_settings(folder: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json` that a LoRA adapter depends on.

    Raises `ValueError` where the file is missing or damaged, the adapter is of another kind, or a field is of the wrong
    type, or asks for what is not supported.
    """
    from peft import LoraConfig

    file = folder / ADAPTER_FILE
    raw = read_json(file) if file.is_file() else None
    if raw is None:
        raise ValueError(f"adapter folder {folder} has no {ADAPTER_FILE}")
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{file}: an adapter must be LoRA, got peft_type {shown(raw.get('peft_type'))}")
    missing = [name for name in REQUIRED if name not in raw]
    if missing:
        raise ValueError(f"{file} must have the fields {', '.join(REQUIRED)}, it lacks {', '.join(missing)}")
    for name, (is_right, expected) in (REQUIRED | OPTIONAL).items():
        if name in raw and not is_right(raw[name]):
            raise ValueError(f"{file}: {name} must be {expected}, got {shown(raw[name])}")
    defaults = vars(LoraConfig())
    for name, value in raw.items():
        known = name in REQUIRED or (name in OPTIONAL and name in defaults) or name in WITHOUT_EFFECT
        is_default = _is_empty(value) or (name in defaults and value == defaults[name])
        if not known and not is_default:
            raise ValueError(f"{file}: {cut(name)} is not supported, got {shown(value)}")
    return {name: raw[name] for name in (*REQUIRED, *OPTIONAL) if name in raw and name in defaults}


def read_tensors(folder: Path, keys: KeyLayout) -> dict[str, Tensor]:
    """The adapter's tensors on the host, by their keys without `PREFIX`; modules by the names that the file has.

    Raises `ValueError` where the file is missing, damaged or empty; a key is no adapter's or there twice; a tensor is
    not of a floating dtype, or not finite.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"adapter folder {folder} has no {WEIGHTS_FILE} (pickles are not read)")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {cut(error)}") from error
    names: dict[str, str] = {}
    for key, tensor in stored.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: keys must begin with {PREFIX}, got {shown(key)}")
        name = keys.module_name(key.removeprefix(PREFIX))
        if name in names:
            raise ValueError(f"{file} has the same tensor twice: {shown(names[name])} and {shown(key)}")
        names[name] = key
        if tensor.dtype not in FLOATING or not bool(tensor.isfinite().all()):
            kind = "values that are not finite" if tensor.dtype in FLOATING else tensor.dtype
            raise ValueError(f"{file}: {shown(key)} must hold finite numbers of a floating dtype, got {kind}")
    return {key.removeprefix(PREFIX): tensor for key, tensor in stored.items()}

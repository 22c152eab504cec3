"""LoRA adapters, as peft writes them, for a `QwenBatchedVL` and for transformers.

transformers has renamed the model's modules over time (`model.layers` is `model.language_model.layers` since 4.52), and
an adapter holds their names: before each of its weights, and often in the patterns of its config. Needs peft.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from qwen_batched.checkpoint import find_folder
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.weights import nested_name, published_name

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

PREFIX, MARK = "base_model.model.", ".lora_"  # in a key, before the name of a layer and after it
WEIGHTS_FILE = "adapter_model.safetensors"


def load_adapter(
    model: QwenBatchedVL, name: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Puts a LoRA adapter, trained here or with any transformers, on the layers of the same published names.

    Args:
        model: Its layers are wrapped, and its parameters frozen.
        name: The adapter's folder or hub id.
        adapter_name: What peft shall call it.
        is_trainable: Whether the adapter is to be trained on.

    Returns:
        peft's model, with all its methods.

    Raises:
        ValueError: The adapter has no safetensors, is not LoRA, or does not fit the model. Nothing is changed then.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict

    folder = find_folder(name)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"adapter folder {folder} has no {WEIGHTS_FILE} (pickles are not read)")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {folder} must be LoRA, got {config.peft_type}")
    stored = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS_FILE).items()}
    layers = _layers(stored)
    unknown = {published_name(layer) for layer in layers} - {layer for layer, _ in model.named_modules()}
    if unknown or not layers:
        raise ValueError(f"adapter {folder} must be for layers of the model, got {sorted(unknown)[:5] or 'none'}")

    _name_layers(config, layers)
    config.inference_mode = not is_trainable
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = PeftModel(model, config, adapter_name)
    try:
        weights = {PREFIX + published_name(key): tensor for key, tensor in stored.items()}
        result = set_peft_model_state_dict(adapted, weights, adapter_name)
        wrong = [key for key in result.missing_keys if MARK in key and f".{adapter_name}" in key]
        if wrong or result.unexpected_keys:
            raise KeyError(f"it misses {wrong[:5]} and has unknown {result.unexpected_keys[:5]}")
    except (KeyError, RuntimeError) as error:  # something is missing, or of another shape
        adapted.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise ValueError(f"adapter {folder} does not fit the model: {error}") from error
    return adapted


def save_adapter(adapted: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes a LoRA adapter of a `QwenBatchedVL` by the names of transformers 4.52 and later; `load_adapter` reads it.

    peft's own `save_pretrained` keeps this package's names, which are those of earlier releases.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
    names = {key: key.removeprefix(PREFIX) for key in state}
    config = copy.deepcopy(adapted.peft_config[adapter_name])
    _name_layers(config, _layers(names.values()))
    config.inference_mode = True
    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    weights = {PREFIX + nested_name(names[key]): tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})


def _layers(keys: Collection[str]) -> list[str]:
    """The names of the layers that have LoRA weights among `keys`."""
    return sorted({key.partition(MARK)[0] for key in keys if MARK in key})


def _name_layers(config: LoraConfig, layers: Collection[str]) -> None:
    """Puts names of layers in place of the patterns that chose them, with the rank and the alpha that they gave.

    Names are without the front that transformers changed: `layers.0.self_attn.q_proj`, `blocks.0.attn.qkv`.

    Args:
        config: Is changed.
        layers: The layers' names where the adapter was trained.
    """
    endings = {layer: published_name(layer).partition(".")[2] or layer for layer in layers}
    config.target_modules = set(endings.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        values = {layer: _value_of(layer, getattr(config, field)) for layer in layers}
        setattr(config, field, {re.escape(endings[layer]): x for layer, x in values.items() if x is not None})


def _value_of(layer: str, patterns: dict[str, int]) -> int | None:
    """The value of the first pattern that ends the layer's name, as in peft."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer)), None)

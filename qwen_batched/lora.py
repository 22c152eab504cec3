"""LoRA adapters, as peft writes them, for a `QwenBatchedVL` and for transformers.

transformers has renamed the model's modules over time (`model.layers` is `model.language_model.layers` since 4.52), and
an adapter holds their names: before each of its weights, and often in the patterns of its config. Needs peft, which
`qwen_batched[lora]` installs.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwen_batched.arguments import cut, shown
from qwen_batched.checkpoint.atomic_save import naming, replacing
from qwen_batched.checkpoint.folder import ADAPTER_FILE, find_folder
from qwen_batched.checkpoint.weights import write_tensors
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.training.adapter_files import PREFIX, WEIGHTS_FILE, matches, read_settings, read_tensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

MARK = ".lora_"  # in a key, after the name of a layer
# In the names of parameters that peft adds.
ADDED = (MARK, ".modules_to_save.", ".token_adapter.trainable_tokens_")


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
        ImportError: peft is not installed.
        TypeError: An argument is not as described.
        ValueError: The adapter is damaged, is not LoRA, has settings that are not supported, or does not fit the model.
            Nothing is changed then, nor by any other error.
    """
    _check_peft()
    if not isinstance(model, QwenBatchedVL):
        raise TypeError(f"an adapter is loaded into a QwenBatchedVL, got {type(model).__name__}")
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str, got {shown(adapter_name)}")
    if not adapter_name or "." in adapter_name or adapter_name in getattr(model, "peft_config", {}):
        expected = "new to the model, not empty and without a dot"
        raise ValueError(f"adapter_name must be {expected}, got {shown(adapter_name)}")
    folder = find_folder(name)
    keys = model.family.keys
    settings, stored = read_settings(folder), read_tensors(folder, keys)
    layers = _layers(stored)
    unknown = {keys.module_name(layer) for layer in layers} - set(_module_names(model))
    if unknown or not layers:
        got = shown(sorted(unknown)) if unknown else "none"
        raise ValueError(f"adapter {folder} must be for layers of the model, got {got}")
    weights = {PREFIX + keys.adapter_name(key): tensor for key, tensor in stored.items()}
    try:
        config = _config_for(model, settings, stored)
        config.inference_mode = not is_trainable
        # Once without values, where nothing can be spoilt and a rank of any size takes no memory.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            _put(_without_values(model), copy.deepcopy(config), weights, adapter_name)
    except Exception as error:  # peft raises errors of many types
        reason = f"{WEIGHTS_FILE} lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"adapter {folder} does not fit the model: {cut(reason)}") from error
    with _undone_by_errors(model, weights):
        return _put(model, config, weights, adapter_name)


def save_adapter(adapted: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Writes a LoRA adapter of a `QwenBatchedVL` by the names of transformers 4.52 and later; `load_adapter` reads it.

    So does peft's own `save_pretrained` for an adapter of the model itself; this writes all or nothing.

    Args:
        adapted: peft's model of a `QwenBatchedVL`, or of a module that contains one: then the adapter that is written
            is the contained model's.
        folder: Is made where there is none.
        adapter_name: What peft calls it.

    Raises:
        ImportError: peft is not installed.
        TypeError: `adapted` is not peft's.
        ValueError: There is no such adapter, it is not LoRA, or something was trained that an adapter of a
            `QwenBatchedVL` cannot hold. Nothing is written then.
    """
    _check_peft()
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(adapted, PeftModel):
        raise TypeError(f"save_adapter takes a PeftModel, got {type(adapted).__name__}")
    config = adapted.peft_config.get(adapter_name)
    if config is None:
        raise ValueError(f"adapter_name must be one of {list(adapted.peft_config)}, got {shown(adapter_name)}")
    if config.peft_type != "LORA":
        raise ValueError(f"an adapter to save must be LoRA, got {config.peft_type!s}")
    front, model = _contained_model(adapted.get_base_model())
    state = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
    # Of an embedding with new rows peft saves a trained copy twice, once by a name that it does not load.
    state = {key.removeprefix(PREFIX): x for key, x in state.items() if ".modules_to_save." not in key}
    _check_whole(adapted, state, front)

    config = copy.deepcopy(config)
    keys = model.family.keys
    wrapped = _wrapped_modules(model, adapter_name)
    layers = {layer: keys.module_name(layer.removeprefix(front)) for layer in _layers(state)}
    _name_layers(config, layers)
    config.modules_to_save = sorted(map(keys.adapter_path, wrapped["modules_to_save"])) or None
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {
            keys.adapter_path(name): indices
            for entry, indices in config.trainable_token_indices.items()
            for name in wrapped["token_adapter"]
            if (front + name).endswith(entry)
        }
    if front and config.trainable_token_indices is not None and model.has_tied_head:
        raise ValueError("trained tokens of a tied model that is part of another cannot be saved: peft ties them alone")
    config.inference_mode = True
    weights = {PREFIX + keys.adapter_name(key.removeprefix(front)): tensor for key, tensor in state.items()}
    # What another adapter has left in the folder goes, other files stay.
    with replacing(folder, stale=lambda name: name.startswith("adapter_model."), last=ADAPTER_FILE) as staged:
        with naming(staged / ADAPTER_FILE):
            config.save_pretrained(str(staged))
        write_tensors(staged / WEIGHTS_FILE, weights)


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":  # a broken installation says more itself
            raise
        raise ImportError("LoRA adapters need peft: install it, or this package as qwen_batched[lora]") from error


def _put(model: nn.Module, config: LoraConfig, weights: dict[str, Tensor], adapter_name: str) -> PeftModel:
    """peft's model with the adapter's weights. Raises where any of them is missing, unknown or of another shape."""
    from peft import PeftModel, set_peft_model_state_dict

    adapted = PeftModel(model, config, adapter_name)
    result = set_peft_model_state_dict(adapted, weights, adapter_name)
    ends = {"none": (), "lora_only": (".base_layer.bias",), "all": (".bias",)}[config.bias]
    missing = [key for key in result.missing_keys if key.endswith(ends) or (MARK in key and f".{adapter_name}" in key)]
    if missing or result.unexpected_keys:
        raise ValueError(f"{WEIGHTS_FILE} misses {missing[:5]} and has unknown {result.unexpected_keys[:5]}")
    return adapted


def _without_values(model: QwenBatchedVL) -> QwenBatchedVL:
    """The same modules, their tensors on the meta device."""
    shared = {id(part): part for part in (model.processor, model.checkpoint)}
    empty = {id(x): nn.Parameter(torch.empty_like(x, device="meta"), x.requires_grad) for x in model.parameters()}
    return copy.deepcopy(model, shared | empty)


@contextlib.contextmanager
def _undone_by_errors(model: QwenBatchedVL, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts everything back as it was when the body raises: modules, hooks, attributes, flags and values."""
    parts = [vars(module) for module in model.modules()]
    parts += [value for part in parts for value in part.values() if isinstance(value, dict)]
    contents = [(part, dict(part)) for part in parts]
    parameters = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    named = dict(model.named_parameters())
    names = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in weights}
    names |= set(map(model.family.keys.module_name, names))
    values = [(named[name], named[name].detach().clone()) for name in names if name in named]
    try:
        yield
    except BaseException:
        for part, content in contents:
            part.clear()
            part.update(content)
        for parameter, requires_grad, data in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for parameter, value in values:
                parameter.copy_(value)
        raise


def _config_for(model: QwenBatchedVL, settings: dict[str, Any], stored: Mapping[str, Tensor]) -> LoraConfig:
    """peft's config for the layers that there are weights of, by this model's names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = model.family.keys
    layers = {layer: keys.module_name(layer) for layer in _layers(stored)}
    names = _module_names(model)
    # The settings name modules as the model did that was trained, and so do the keys.
    theirs = keys.adapter_name if any(keys.module_name(key) != key for key in stored) else str
    config = LoraConfig(**settings)
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str):
            setattr(config, field, {theirs(name) for name in names if matches(pattern, theirs(name))})
    meant, there = {name for name in names if check_target_module_exists(config, theirs(name))}, set(layers.values())
    if meant - there:
        raise ValueError(f"{WEIGHTS_FILE} misses layers that {ADAPTER_FILE} names: {shown(sorted(meant - there))}")
    extra = there - meant
    if settings.get("ensure_weight_tying"):
        extra.discard("lm_head")  # it has the embedding's adapter
    if extra:
        raise ValueError(f"{WEIGHTS_FILE} has layers that {ADAPTER_FILE} does not name: {shown(sorted(extra))}")

    def modules(entry: str) -> list[str]:
        return [name for name in names if theirs(name).endswith(entry)]

    _name_layers(config, layers)
    if config.modules_to_save is not None:
        config.modules_to_save = sorted({name for entry in config.modules_to_save for name in modules(entry)})
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        config.trainable_token_indices = {name: ids for entry, ids in indices.items() for name in modules(entry)}
    rows = model.config.text.vocab_size
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    if any(index >= rows for ids in lists for index in ids):
        raise ValueError(f"{ADAPTER_FILE}: trainable_token_indices must be below the vocabulary's {rows}")
    return config


def _module_names(model: QwenBatchedVL) -> list[str]:
    """The modules' own names, whether or not there are adapters."""
    return [name for name, _ in nn.Module.named_modules(model) if name]


def _layers(keys: Collection[str]) -> list[str]:
    """The names of the layers that have LoRA weights among `keys`."""
    return sorted({key.partition(MARK)[0] for key in keys if MARK in key})


def _name_layers(config: LoraConfig, layers: Mapping[str, str]) -> None:
    """Puts names of layers in place of the patterns that chose them, with the rank and the alpha that they gave.

    `layers` are their names where the adapter was trained, and as published; the new ones are without the front that
    transformers changed: `layers.0.self_attn.q_proj`, `blocks.0.attn.qkv`.
    """
    endings = {layer: name.partition(".")[2] or name for layer, name in layers.items()}
    config.target_modules = set(endings.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        values = {}
        for layer, ending in endings.items():
            for pattern, value in (getattr(config, field) or {}).items():
                if matches(rf"(.*\.)?({pattern})", layer):  # the first that ends the layer's name, as in peft
                    values[re.escape(ending)] = value
                    break
        setattr(config, field, values)


def _contained_model(module: nn.Module) -> tuple[str, QwenBatchedVL]:
    """The `QwenBatchedVL` that `module` is or contains, and what its names begin with there."""
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, QwenBatchedVL)]
    if len(found) != 1:
        got = f"{len(found)} in {type(module).__name__}"
        raise ValueError(f"an adapter to save must be of one QwenBatchedVL, got {got}")
    name, model = found[0]
    return name and f"{name}.", model


def _wrapped_modules(model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
    """The names of the modules that are saved whole, and of those with trained tokens."""
    from peft.utils.other import ModulesToSaveWrapper

    named = model.named_modules()
    wrappers = [(name, child) for name, child in named if adapter_name in getattr(child, "_adapters", ())]
    whole = [name for name, child in wrappers if isinstance(child, ModulesToSaveWrapper)]
    return {"modules_to_save": whole, "token_adapter": [name for name, _ in wrappers if name not in whole]}


def _check_whole(adapted: PeftModel, state: Mapping[str, Tensor], front: str) -> None:
    """Raises `ValueError` where the adapter is more than its model's, or less than what was trained."""
    if outside := sorted(name for name in state if not name.startswith(front)):
        where = f"the QwenBatchedVL at {front.rstrip('.')!r}"
        what = f"{shown(outside)}; save those by themselves"
        raise ValueError(f"an adapter of {where} cannot hold what is outside it: {what}")
    parts = [name for name, x in state.items() if type(x) not in (Tensor, nn.Parameter) or x.is_meta]
    if parts:
        raise ValueError(f"tensors to save must be whole, got a part or none of {parts[0]}")
    trained = {name.removeprefix(PREFIX) for name, x in adapted.named_parameters() if x.requires_grad}
    unsaved = sorted(name for name in trained - state.keys() if name.startswith(front))
    if lost := [name for name in unsaved if not any(mark in name for mark in ADDED)]:
        raise ValueError(f"trained parameters are not in the adapter: {shown(lost)}; name them in modules_to_save")

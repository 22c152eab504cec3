"""The config of an adapter, as a user of this package or of transformers writes it -> by transformers' nested names.

Endings of names (`q_proj`, `layers.0.mlp.up_proj`) mean the same under both names and stay. A path from the root is
rewritten. A pattern stays where it matches any nested name, for so transformers reads it; where it matches published
names alone, the nested names of what it matches take its place.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.keys import KeyLayout

PATHS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters")
PATTERNS = ("target_modules", "exclude_modules")  # these, where they are one string
VALUES_BY_PATTERN = ("rank_pattern", "alpha_pattern")
ALL_LINEAR = "all-linear"


def nested_config(config: Any, model: nn.Module) -> Any:
    """`config` itself where it has nothing to rewrite, a copy otherwise.

    Args:
        config: Of a kind of adapter that peft puts on layers.
        model: Of a `family`; its modules are named as published.
    """
    keys: KeyLayout = model.family.keys
    modules = dict(nn.Module.named_modules(model))
    names = {keys.adapter_path(name): name for name in modules if name}
    changed: dict[str, Any] = {}
    for field in PATHS:
        value = getattr(config, field, None)
        if not isinstance(value, str):
            changed[field] = _rewritten(value, keys.adapter_path)
        elif field not in PATTERNS:
            changed[field] = keys.adapter_path(value)
        elif value.lower() == ALL_LINEAR:
            head = model.get_output_embeddings()
            changed[field] = {
                name for name, own in names.items() if modules[own] is not head and _is_linear(modules, own)
            }
        else:
            changed[field] = _names_matched(field, value, names)
    for field in VALUES_BY_PATTERN:
        if value := getattr(config, field, None):
            changed[field] = _values_by_nested_pattern(value, names)
    if isinstance(tokens := getattr(config, "trainable_token_indices", None), Mapping):
        changed["trainable_token_indices"] = {keys.adapter_path(name): indices for name, indices in tokens.items()}
    changed = {field: value for field, value in changed.items() if value != getattr(config, field, None)}
    if changed:
        config = copy.copy(config)
        for field, value in changed.items():
            setattr(config, field, value)
    return config


def _rewritten(paths: Any, rewrite: Callable[[str], str]) -> Any:
    """A collection of the same type with each path rewritten."""
    if not paths or not isinstance(paths, list | set | tuple):
        return paths
    return type(paths)(rewrite(path) for path in paths)


def _names_matched(field: str, pattern: str, names: Mapping[str, str]) -> str | list[str]:
    """The pattern, or the nested names of what it means; `names` are the nested ones, each with the published."""
    nested = [name for name in names if re.fullmatch(pattern, name)]
    published = [name for name, own in names.items() if re.fullmatch(pattern, own)]
    if not nested and published:
        return published
    if not set(published) <= set(nested):
        read = f"read by transformers' names it is {len(nested)} modules, by the published names {len(published)}"
        warnings.warn(f"{field} {shown(pattern)}: {read}; it is read by transformers'", stacklevel=2)
    return pattern


def _values_by_nested_pattern(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same values by patterns that match nested names."""
    found: dict[str, Any] = {}
    for pattern, value in values.items():
        if _ends(pattern, names) or not (published := _ends(pattern, names.values())):
            found[pattern] = value
            continue
        for nested, own in names.items():
            if own in published:
                found.setdefault(re.escape(nested), value)
    return found


def _ends(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that the pattern is, or is all of behind a dot: so peft matches these."""
    return {name for name in names if re.fullmatch(rf"(.*\.)?({pattern})", name)}


def _is_linear(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module is a linear layer, or one that has an adapter already, and no part of an adapter."""
    module = modules[name]
    wraps = [modules[owner] for owner in _owners(name) if hasattr(modules[owner], "base_layer")]
    return not wraps and isinstance(getattr(module, "base_layer", module), nn.Linear)


def _owners(name: str) -> Collection[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]

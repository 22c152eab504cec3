"""The names that peft finds on a model: transformers' own, so that its configs and files mean the same layers in both.

The modules here have the published names (`model.layers.0`, `visual.blocks.0`), and so has a state dict. transformers
nests them since 4.52 (`model.language_model.layers.0`, `model.visual.blocks.0`). From the moment that peft has an
adapter's config for a model until the last adapter is gone, `named_modules` has the nested names, and the state dict
has them for what adapters own; what is the model's own keeps its published keys. `get_submodule` and `load_state_dict`
take either.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qwen_batched.training.adapter_configs import nested_config

STORED = "_adapter_configs"  # the attribute that a model has while peft has configs for it


class AdapterConfigs(dict):
    """peft's configs of a model's adapters by their names. One that is put in is rewritten to the nested names."""

    def __init__(self) -> None:
        super().__init__()
        self.is_injecting = False  # peft has put a config in, and has not said that its layers are there
        self.owner: weakref.ref[AdapterNames] | None = None

    def __setitem__(self, name: str, config: Any) -> None:
        model = None if self.owner is None else self.owner()
        if model is not None:
            config = nested_config(config, model)
            vars(model)[STORED] = self
            self.is_injecting = True
        super().__setitem__(name, config)

    def update(self, *arguments: Any, **keywords: Any) -> None:
        """As of any dict."""
        for name, config in dict(*arguments, **keywords).items():
            self[name] = config

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_entries, (dict(self),)  # a copy belongs to the model that has it


def _with_entries(entries: dict[str, Any]) -> AdapterConfigs:
    configs = AdapterConfigs()
    configs.update(entries)
    return configs


class AdapterNames(nn.Module):
    """A model of a `family`, whose layers peft may wrap."""

    @property
    def peft_config(self) -> AdapterConfigs:
        """The configs of the adapters, by their names; peft looks for them here, and puts them here."""
        configs = vars(self).get(STORED)
        if configs is None:
            configs = AdapterConfigs()
            # peft warns of several adapters where a model has this attribute at all.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", module=r"peft\.")
        configs.owner = weakref.ref(self)
        return configs

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        if configs is not vars(self).get(STORED):
            del self.peft_config
            self.peft_config.update(configs)
        if STORED in vars(self):
            vars(self)[STORED].is_injecting = False

    @peft_config.deleter
    def peft_config(self) -> None:
        vars(self).pop(STORED, None)

    @property
    def _has_nested_names(self) -> bool:
        """Whether modules go by transformers' names: there are adapters, or peft is about to put one in."""
        configs = vars(self).get(STORED)
        return bool(configs) and (configs.is_injecting or any(map(of_peft, dict(super().named_modules()).values())))

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """All modules by their names: while there are adapters, by transformers' nested ones."""
        found = super().named_modules(memo, prefix, remove_duplicate)
        if not self._has_nested_names:
            yield from found
            return
        front, keys = prefix and f"{prefix}.", self.family.keys
        for name, module in found:
            yield name if name == prefix else front + keys.adapter_path(name.removeprefix(front)), module

    def get_submodule(self, target: str) -> nn.Module:
        """The module of a name, its own or transformers' nested one."""
        if target == "model" and self._has_nested_names:
            return self  # what transformers nests the networks in
        return super().get_submodule(self.family.keys.module_path(target))

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        """The tensors by their published names, those of adapters by transformers' nested ones."""
        state = super().state_dict(*arguments, **keywords)
        if self._has_nested_names:
            prefix = arguments[1] if len(arguments) > 1 else keywords.get("prefix", "")
            owned, keys = self._owned_by_adapters(), self.family.keys
            for key in [key for key in state if key.startswith(prefix)]:
                name, value = key.removeprefix(prefix), state.pop(key)
                state[prefix + (keys.adapter_name(name) if name in owned else name)] = value
        return state

    def _owned_by_adapters(self) -> set[str]:
        """The keys, by the modules' names, of what adapters add, and of the model's own tensors that they train."""
        modules = dict(super().named_modules())
        trains_biases = any(getattr(config, "bias", "none") != "none" for config in self.peft_config.values())
        embeddings = [self.get_input_embeddings(), self.get_output_embeddings()]
        wrapped = [module.base_layer for module in embeddings if hasattr(module, "base_layer")]  # peft saves these too
        owned = set()
        for name, module in modules.items():
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                is_bias, is_trained = leaf == "bias", tensor is not None and tensor.requires_grad
                is_saved = (trains_biases and is_bias) or module in wrapped or (module in embeddings and is_trained)
                if is_saved or _is_added(modules, name, leaf):
                    owned.add(f"{name}.{leaf}" if name else leaf)
        return owned


def of_peft(module: nn.Module) -> bool:
    """Whether a module is a layer of peft's."""
    return type(module).__module__.startswith("peft.")


def _is_added(modules: dict[str, nn.Module], owner: str, leaf: str) -> bool:
    """Whether a tensor belongs to a layer of peft's, and not to the layer that it wraps."""
    child = leaf
    while owner:
        if of_peft(modules[owner]):
            return child not in ("base_layer", "original_module")
        owner, _, child = owner.rpartition(".")
    return False

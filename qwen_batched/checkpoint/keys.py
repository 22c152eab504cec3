"""Names of tensors: those of the modules here, and how each layout of files and adapters spells them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

VISION_PREFIX, TEXT_PREFIX = "visual.", "model."
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")

Prefixes = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyLayout:
    """The key layouts of a family: prefixes of stored keys, each with the prefix of the module's name it stands for."""

    adapters: Prefixes  # the layout of adapters that `save_adapter` writes: that of transformers since 4.52
    others: Prefixes = ()  # prefixes of further layouts that are read, tried after `adapters`
    saved: Prefixes = ()  # the layout of checkpoints that `save_pretrained` writes; empty for the modules' own names
    ignored: tuple[str, ...] = ()  # prefixes of stored keys that no module has

    def module_name(self, key: str) -> str:
        """The module's name of a key of any of the layouts."""
        return _replace_prefix(key, (*self.adapters, *self.others))

    def adapter_name(self, key: str) -> str:
        """The key in an adapter, of a key of any of the layouts."""
        return _replace_prefix(self.module_name(key), [(module, stored) for stored, module in self.adapters])

    def module_path(self, path: str) -> str:
        """The same of a module's path, which may be one of the prefixes without its dot."""
        return self.module_name(f"{path}.").removesuffix(".")

    def adapter_path(self, path: str) -> str:
        """The same of a module's path."""
        return self.adapter_name(f"{path}.").removesuffix(".")

    def saved_name(self, name: str) -> str:
        """The key in a saved checkpoint, of a module's name."""
        return _replace_prefix(name, [(module, stored) for stored, module in self.saved])


def _replace_prefix(name: str, prefixes: Collection[tuple[str, str]]) -> str:
    """`name` with the first of the prefixes that it begins with replaced."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def unread_layers(names: Collection[str], kept: int, stored: int) -> Callable[[str], bool]:
    """Says of a module's name whether it belongs to a decoder block above the `kept` of the `stored` ones.

    `names` are those of the parameters wanted, of which block 0's stand for every block's.
    """

    def unread(name: str) -> bool:
        match = BLOCK_NAME.fullmatch(name)
        return bool(match) and kept <= int(match[1]) < stored and f"{TEXT_PREFIX}layers.0.{match[2]}" in names

    return unread

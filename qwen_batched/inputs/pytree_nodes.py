"""Dataclasses of tensors as nodes of PyTorch's pytrees."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields
from typing import Any

from torch.utils import _pytree


def register_node(kind: type, facts: Sequence[str]) -> None:
    """Makes a dataclass a node: its `facts` are the structure, hashable, its other fields, where not None, children."""
    names = [field.name for field in fields(kind) if field.name not in facts]

    def flatten(node: Any) -> tuple[list[Any], Hashable]:
        given = tuple(name for name in names if getattr(node, name) is not None)
        return [getattr(node, name) for name in given], (given, *(getattr(node, name) for name in facts))

    def unflatten(children: Sequence[Any], context: tuple) -> Any:
        given, *known = context
        values = dict.fromkeys(names) | dict(zip(given, children, strict=True))
        return kind(**values, **dict(zip(facts, known, strict=True)))

    _pytree.register_pytree_node(kind, flatten, unflatten)

"""Invariants that keep a captured graph valid: a module's tree, its code, and where its tensors are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from operator import is_

from torch import Tensor, nn

from qwen_batched.runtime.fast_path import has_fsdp_unsharded_params, has_global_hooks, hooks_of, is_plain

OWN_CODE = ("qwen_batched.", "torch.nn.modules.")


class ModuleSnapshot:
    """Modules as they were.

    Values of parameters may change in place; a graph reads them anew. Anything else may not: children, parameters,
    buffers, hooks, attributes (the mode, a norm's epsilon, a replaced `forward`), or where tensors are and how they
    are laid out.
    The snapshot keeps the memory of the tensors, so that a graph captured with it never reads what is someone else's.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        children = [child for module in modules for child in module.modules()]
        # Lists beside lists of the same length, which one comparison in C tells apart: this is asked at every replay.
        self._children, self._types = children, [*map(type, children)]
        # Values that are the same object are equal without being looked into.
        self._dicts = [part for child in children for part in _dicts(child)]
        self._copies = [*map(dict, self._dicts)]
        self._tensor_dicts = [part for child in children for part in (child._parameters, child._buffers) if part]
        self._sizes, self._held = [*map(len, self._tensor_dicts)], [*_values(self._tensor_dicts)]
        self._ids = [*map(id, self._held)]
        # All parameters and buffers.
        self.tensors = [tensor for tensor in self._held if tensor is not None]
        self._layouts = _layouts(self.tensors)
        self._memory = [tensor.detach() for tensor in self.tensors]

    def matches(self, *modules: nn.Module) -> bool:
        """Whether `modules` are the same and still as they were."""
        return (
            len(modules) == len(self._modules)
            and all(map(is_, modules, self._modules))
            and [*map(type, self._children)] == self._types
            and _equal(self._dicts, self._copies)
            and [*map(len, self._tensor_dicts)] == self._sizes
            and [*map(id, _values(self._tensor_dicts))] == self._ids
            and _layouts(self.tensors) == self._layouts
        )


def is_capturable(*modules: nn.Module) -> bool:
    """Whether a graph would leave nothing out: no hooks, and only code and parameters that are known to be plain.

    A wrapped layer (an adapter, a quantised one) may decide in Python what it does, at every call; FSDP2's unsharded
    parameters are elsewhere at the next one.
    """
    children = (child for module in modules for child in module.modules())
    return not has_global_hooks() and all(
        type(child).__module__.startswith(OWN_CODE) and is_plain(child) and not has_fsdp_unsharded_params(child)
        for child in children
    )


def _values(dicts: list[dict]) -> Iterator[Tensor | None]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _equal(now: list[dict], before: list[dict]) -> bool:
    try:
        return now == before
    except Exception:  # a value of the user's that cannot be compared with what stood there before
        return False


def _dicts(module: nn.Module) -> tuple[dict, ...]:
    return vars(module), module._modules, *hooks_of(module)


def _layouts(tensors: list[Tensor]) -> tuple[list, ...]:
    """Address, shape, strides and dtype of each."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
    )

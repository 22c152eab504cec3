"""Autocast that would cast nothing is off inside a call: it only keeps packed weights and CUDA graphs from use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def without_idle_autocast(method: F) -> F:
    """A method of a module on CUDA or the CPU, without autocast where all parameters have the dtype that it casts to.

    Many policies wrap every call of a bfloat16 model in autocast to bfloat16.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        for kind in ("cuda", "cpu"):
            if torch.is_autocast_enabled(kind) and _casts_nothing(self, kind):
                with torch.autocast(kind, enabled=False):
                    return method(self, *arguments, **keywords)
        return method(self, *arguments, **keywords)

    return call


def _casts_nothing(module: nn.Module, kind: str) -> bool:
    dtype = torch.get_autocast_dtype(kind)
    return all(
        parameter is None or (parameter.dtype == dtype and parameter.device.type == kind)
        for child in module.modules()
        for parameter in child._parameters.values()
    )

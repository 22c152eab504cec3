"""Export of a model for what runs without Python (`engine`) or without PyTorch (`onnx`); see docs/export.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_batched.export.api import ExportError, export
    from qwen_batched.export.engine import load_engine

__all__ = ["ExportError", "export", "load_engine"]

_MODULES = {"ExportError": "api", "export": "api", "load_engine": "engine"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:  # they import PyTorch, which `run_onnx` does without
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value

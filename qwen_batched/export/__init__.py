"""Export of a model for what runs without Python (`engine`) or without PyTorch (`onnx`); see docs/export.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_batched.export.api import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qwen_batched.export.api import export  # with PyTorch, which `run_onnx` does without

    return export

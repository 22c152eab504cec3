"""Batched Qwen2-VL, Qwen2.5-VL and Qwen3-VL for robots: camera frames and texts to hidden states, features or text.

Modules are imported when a name of theirs is first used: what runs without PyTorch, as `export.run_onnx`, needs none.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_batched.inputs.batch import Features
    from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
    from qwen_batched.model.prompt_cache import PromptCache
    from qwen_batched.model.tensor_processor import TensorProcessor
    from qwen_batched.outputs import GenerateOutput, VLOutput
    from qwen_batched.qwen_batched_VL_model import BatchedVL, QwenBatchedVL

_MODULES = {
    "BatchedDecoder": "model.modeling_qwen2_5_vl_batched",
    "BatchedVL": "qwen_batched_VL_model",
    "BatchedVisionTransformer": "model.modeling_qwen2_5_vl_batched",
    "Features": "inputs.batch",
    "GenerateOutput": "outputs",
    "PromptCache": "model.prompt_cache",
    "QwenBatchedVL": "qwen_batched_VL_model",
    "TensorProcessor": "model.tensor_processor",
    "VLOutput": "outputs",
}

__all__ = [
    "BatchedDecoder",
    "BatchedVL",
    "BatchedVisionTransformer",
    "Features",
    "GenerateOutput",
    "PromptCache",
    "QwenBatchedVL",
    "TensorProcessor",
    "VLOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        # A module of the package, as it was there without an import of its own when all were imported at once.
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

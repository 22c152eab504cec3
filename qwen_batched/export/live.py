"""The model of an export, which may be larger than what runs beside it leaves room for."""

from __future__ import annotations

import gc
from collections.abc import Callable

from qwen_batched.export.genai.parts import GenaiParts
from qwen_batched.export.manifest import weights_hash
from qwen_batched.export.parts import Parts
from qwen_batched.export.programs import detached
from qwen_batched.export.request import GENAI, ExportRequest
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL


class LiveModel:
    """A model that is loaded where it is needed, and let go in between unless the caller holds it."""

    def __init__(self, load: Callable[[], QwenBatchedVL], is_kept: bool) -> None:
        """Takes what gives the model, and whether it stays in memory whatever happens here."""
        self._load, self._is_kept = load, is_kept
        self._model: QwenBatchedVL | None = None
        self._parts: Parts | GenaiParts | None = None
        self._hash: str | None = None

    @property
    def model(self) -> QwenBatchedVL:
        if self._model is None:
            self._model = self._load()
        return self._model

    def parts(self, request: ExportRequest) -> Parts | GenaiParts:
        """The parts of a request, always the same. Raises `ValueError` where other weights were loaded than before."""
        if self._parts is None:
            kind = GenaiParts if request.target == GENAI else Parts
            found = None if self._is_kept else weights_hash(self.model, request.parts)
            if found != (self._hash or found):
                raise ValueError(f"the weights of {self.model.name_or_path} changed while they were exported")
            self._hash, self._parts = found, kind(detached(self.model), request)
        return self._parts

    def release(self) -> None:
        """Lets the weights go, if nobody else holds them."""
        if not self._is_kept:
            self._model = self._parts = None
            gc.collect()  # traced programs refer to themselves

"""ONNX Runtime without its usage data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Published packages of ONNX Runtime send usage data unless this is set when they are imported.

    Those of onnxruntime-genai read it when their first model is made.
    """
    name = "ORT_DISABLE_TELEMETRY"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

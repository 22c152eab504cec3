"""Exported programs -> ONNX graphs with their weights beside them, and back to something that can be called."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qwen_batched.export.telemetry import without_telemetry
from qwen_batched.export.tracing import Part, trace

SUFFIX = ".onnx"


def write(part: Part, path: Path, opset: int) -> None:
    """Writes a part's graph, and its weights as `path` with ".data" behind it."""
    program = trace(part)
    names = {"input_names": list(part.examples), "output_names": list(part.results)}
    # Not optimised here: ONNX Runtime does that when it loads a graph, in a tenth of the time.
    with _quiet():
        written = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False, **names)
        written.save(path, external_data=True)


def open_graph(path: Path) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The graph as a function of its arguments by name, on ONNX Runtime, which maps the weights and copies none."""
    with without_telemetry():
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {each.name for each in session.get_inputs()}

    def run(arguments: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: x.cpu().numpy() for name, x in arguments.items() if name in inputs}
        return [torch.from_numpy(x) for x in session.run(None, arrays)]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that it did not find and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

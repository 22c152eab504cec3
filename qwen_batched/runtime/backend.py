"""What the fused operations run on: Triton kernels on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

BACKENDS = ("auto", "triton", "reference")
LEAST_CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports, and the first with bfloat16
# Whether `torch.export` is tracing. PyTorch 2.6 cannot say so, and nothing is exported with it.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_backend: ContextVar[str] = ContextVar("qwen_batched_backend", default="auto")
_reads_ahead: ContextVar[bool] = ContextVar("qwen_batched_reads_ahead", default=False)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses what the operations run on inside the `with` block.

    "auto" is Triton on a GPU where it is installed, else the reference; "triton" is Triton, or a `RuntimeError` at the
    first call that cannot have it; "reference" is plain PyTorch, of which `torch.export` then sees every operation.
    Raises `ValueError` for any other.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


@torch.compiler.assume_constant_result  # torch.compile cannot trace a context variable
def backend() -> str:
    """The backend chosen, "auto" where none was."""
    return _backend.get()


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`. Raises `RuntimeError` where they were asked for and cannot."""
    chosen = _backend.get()
    if chosen == "reference" or (chosen == "auto" and device.type != "cuda"):
        return False
    obstacle = _obstacle(device)
    if obstacle is None:
        return True
    if chosen == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {obstacle}")
    _log_fallback(obstacle)
    return False


@contextlib.contextmanager
def reading_ahead(allowed: bool = True) -> Iterator[None]:
    """Inside the `with` block kernels may read parameters and older keys before those launched earlier have ended.

    For the capture of a graph in which no kernel writes any of these. Its replay begins when all is done that came
    before; elsewhere they may just have been written. Not `allowed`, inside of another, for weights that the graph
    does write.
    """
    token = _reads_ahead.set(allowed)
    try:
        yield
    finally:
        _reads_ahead.reset(token)


def reads_ahead() -> bool:
    """Whether this is inside `reading_ahead`."""
    return _reads_ahead.get()


def refuse_forced_triton(reason: str) -> None:
    """Raises `RuntimeError` where Triton was asked for and `reason` is why the reference is required."""
    if backend() == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but {reason}")


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs anywhere
    if device.type != "cuda":
        return f"Triton does not run on {device}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and capability < LEAST_CAPABILITY:
        return f"Triton needs a GPU of compute capability {LEAST_CAPABILITY}, got {capability}"
    return None


@functools.cache
def _log_fallback(obstacle: str) -> None:
    logging.getLogger(__name__).warning("%s: the fused operations run on plain PyTorch, slower", obstacle)

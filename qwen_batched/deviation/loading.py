"""Models, one after the other: each is loaded when the one before is gone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
import transformers

from qwen_batched.ops import TORCHVISION
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.transformers_reference import TransformersReference


def load_ours(folder: str, dtype: torch.dtype, device: torch.device, resample_backend: str) -> QwenBatchedVL:
    """This library's model. Raises `ValueError` where it cannot load the folder."""
    _let_go(device)
    return QwenBatchedVL.from_pretrained(folder, dtype=dtype, device=device, resample_backend=resample_backend)


def load_theirs(folder: str, dtype: torch.dtype, device: torch.device, resample_backend: str) -> TransformersReference:
    """transformers' model, with that backend's image processor on a CPU. Raises `ValueError` where it cannot load."""
    if device.type != "cpu":
        resample_backend = TORCHVISION  # the only one that resizes on a GPU, as ours does
    _let_go(device)
    try:
        with _quiet_transformers():
            return TransformersReference.from_pretrained(
                folder, dtype=dtype, device=device, resample_backend=resample_backend
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever transformers, safetensors and tokenizers raise on a broken folder
        raise ValueError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error


def _let_go(device: torch.device) -> None:
    """Frees what earlier models, of which nobody holds a reference any more, have on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and warnings of transformers' between the lines of our bar."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

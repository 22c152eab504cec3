"""Fixtures: a tiny checkpoint of the real architecture, our model of it, and transformers'.

Tests that take `device` run on the CPU, and, marked `gpu`, on an NVIDIA GPU where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported: its kernels then run on the CPU

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference

# The tests' models are tiny: threads of PyTorch's would only wait for each other, for minutes where cores are shared.
torch.set_num_threads(1)

# The first use of a default device makes PyTorch note its factory functions, once. They must be its own by then, and
# not what a test put in their place: else torch.device("meta") would allocate for the rest of the process.
with torch.device("meta"):
    torch.empty(0)

# cuDNN's convolutions use TF32 unless told otherwise, and transformers' patch embedding is one.
torch.backends.cudnn.allow_tf32 = False

# The smallest images of the tests are 28 x 28.
MIN_PIXELS = 28 * 28


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset "tiny", float32, with images from 28 x 28 up. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", image={"min_pixels": MIN_PIXELS})


@pytest.fixture(scope="session")
def load(checkpoint: Path) -> Callable[..., QwenBatchedVL]:
    """Loads the tiny checkpoint, on the CPU unless told otherwise."""
    return lambda **options: QwenBatchedVL.from_pretrained(checkpoint, **{"device": "cpu", **options})


@pytest.fixture(scope="session")
def model(load: Callable[..., QwenBatchedVL], device: str) -> QwenBatchedVL:
    """Our model in float32, padding on the left. Read only."""
    return load(device=device).requires_grad_(False)


@pytest.fixture(scope="session")
def right_padded_model(load: Callable[..., QwenBatchedVL], device: str) -> QwenBatchedVL:
    """The same, padding on the right."""
    return load(device=device, padding_side="right").requires_grad_(False)


@pytest.fixture(scope="session")
def reference(checkpoint: Path, device: str) -> TransformersReference:
    """transformers' model of the same checkpoint in float32; runs one sample at a time."""
    return TransformersReference.from_pretrained(checkpoint, device=device)

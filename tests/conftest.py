"""Fixtures: a tiny checkpoint of the real architecture, our model of it, and transformers'.

Tests that take `device` run on the CPU, and, marked `gpu`, on an NVIDIA GPU where there is one. Those marked `slow` run
last, or first where several workers share the tests, so that none waits for another's longest. Of a test with
parameters all cases but the first are marked `more` here, and so is what Hypothesis makes examples for. PyTorch is
imported inside functions, since pytest-xdist's controller, which runs no test, has to read this file before it starts
them.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qwen_batched import QwenBatchedVL
    from qwen_batched.transformers_reference import TransformersReference
    from tests.sisters import Sister

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network

# The smallest images of the tests are 28 x 28.
MIN_PIXELS = 28 * 28


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # the controller
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported: its kernels then run on the CPU

    # The tests' models are tiny: PyTorch's threads would only wait for each other, for minutes where cores are shared.
    torch.set_num_threads(1)

    # The first use of a default device makes PyTorch note its factory functions, once. They must be its own by then,
    # and not what a test put in their place: else torch.device("meta") would allocate for the rest of the process.
    with torch.device("meta"):
        torch.empty(0)

    # Layers without values have none to initialise; PyTorch goes through the motions in a tenth of a load's time.
    initialise = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda layer: None if layer.weight.is_meta else initialise(layer)

    # cuDNN's convolutions use TF32 unless told otherwise, and transformers' patch embedding is one.
    torch.backends.cudnn.allow_tf32 = False


_first_cases: dict[tuple[object, ...], pytest.Item] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    key = (item.parent, getattr(item, "originalname", item.name), item.get_closest_marker("gpu") is not None)
    has_examples = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    if _first_cases.setdefault(key, item) is not item or has_examples:
        item.add_marker(pytest.mark.more)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        on_gpus = defaultdict(list)
        for item in items:
            if item.get_closest_marker("gpu"):
                on_gpus[item.path].append(item)
        for of_a_file in on_gpus.values():  # one is skipped for all: thousands would take seconds
            of_a_file[0].add_marker(pytest.mark.skip(reason=f"{len(of_a_file)} tests here need an NVIDIA GPU"))
        left_out = {item for of_a_file in on_gpus.values() for item in of_a_file[1:]}
        items[:] = [item for item in items if item not in left_out]
    slow_first = hasattr(config, "workerinput")
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None) != slow_first)


def pytest_collection_finish() -> None:
    gc.freeze()  # else each full collection goes through what PyTorch and pytest have made, 0.2 s and more


_file_before: Path | None = None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a file begins, sets aside what lives on of those before: caches and compilers grow to seconds of that."""
    global _file_before
    if _file_before != item.path:
        _file_before = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, object]]:
    """Makes a folder by its name, and what a function returns of it, in one of the processes that share the tests."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker's own
        root = root.parent

    def make(name: str, function: Callable[[Path], object]) -> tuple[Path, object]:
        """`function` takes the folder, which does not exist, and returns what can be pickled."""
        folder, result = root / "made-once" / name, root / "made-once" / f"{name}.pickle"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "made-once" / f"{name}.lock"):
            if not result.exists():
                result.write_bytes(pickle.dumps(function(folder)))
        return folder, pickle.loads(result.read_bytes())

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset "tiny", float32, with images from 28 x 28 up. Read only."""
    from qwen_batched.testing import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny", image={"min_pixels": MIN_PIXELS})


@pytest.fixture(scope="session")
def load(checkpoint: Path) -> Callable[..., QwenBatchedVL]:
    """The tiny checkpoint's model, to be changed, on the CPU unless told otherwise.

    On the CPU it is a copy of what was loaded once with these options, in a fifth of the time.
    """
    from qwen_batched import QwenBatchedVL

    loaded: dict[str, QwenBatchedVL] = {}

    def load(**options: object) -> QwenBatchedVL:
        options = {"device": "cpu", **options}
        if str(options["device"]) != "cpu":
            return QwenBatchedVL.from_pretrained(checkpoint, **options)
        if (key := repr(sorted(options.items()))) not in loaded:
            loaded[key] = QwenBatchedVL.from_pretrained(checkpoint, **options)
        return copy.deepcopy(loaded[key])

    return load


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
    from qwen_batched.transformers_reference import TransformersReference

    return TransformersReference.from_pretrained(checkpoint, device=device)


@pytest.fixture(scope="session")
def sisters(device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sister]:
    """A sister family's tiny checkpoint by its preset, in both libraries. Read only."""
    from tests.sisters import Sister

    return functools.cache(lambda preset: Sister(preset, tmp_path_factory.mktemp(preset) / "checkpoint", device))


@pytest.fixture(params=["qwen2-vl-tiny", "qwen3-vl-tiny"], scope="session")
def family(request: pytest.FixtureRequest, sisters: Callable[[str], Sister]) -> Sister:
    return sisters(request.param)

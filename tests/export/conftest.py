"""Tiny models for exports on CPUs, which follow Pillow, and folders that were exported once.

Nothing here runs on a GPU, where exports are untested: the root's models, which may be on one, are not used.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest


@pytest.fixture(scope="session")
def sisters(tmp_path_factory):
    """A family's tiny checkpoint by its preset, in both libraries, on the CPU. Read only."""
    from tests.sisters import Sister  # not with this file, which pytest may load before it is configured

    return functools.cache(lambda preset: Sister(preset, tmp_path_factory.mktemp(preset) / "checkpoint"))


@pytest.fixture(scope="session")
def live(sisters):
    """A family's tiny model by its preset. Read only."""
    return functools.cache(lambda preset: load(sisters(preset)))


def load(sister, **options):
    return sister.load(resample_backend="pillow", **options).requires_grad_(False)


# Of all exports but the first, to save time.
PARTS = {"float32": ("vision", "cached_decoder"), "float16": ("vision", "decoder", "cached_decoder")}


class Exported(NamedTuple):
    """A model, the folder it was exported to, and what the export returned."""

    model: object
    folder: Path
    manifest: dict


@pytest.fixture(scope="session")
def exported(sisters, tmp_path_factory):
    """ONNX exports of tiny models with two cameras, frames of 50 x 70 pixels resized to 2 x 3 merged cells."""
    from qwen_batched.export import export

    @functools.cache
    def make(preset, dtype="float32"):
        folder, factor = tmp_path_factory.mktemp(preset) / "onnx", sisters(preset).factor
        model = load(sisters(preset), num_layers=2, dtype=dtype)
        frames = ((50, 70), (2 * factor, 3 * factor))
        parts = None if (preset, dtype) == ("tiny", "float32") else PARTS[dtype]
        return Exported(model, folder, export(model, folder, "onnx", frames, cameras=2, parts=parts))

    return make

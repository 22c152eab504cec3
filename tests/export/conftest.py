"""Tiny models for exports on CPUs, which follow Pillow, and folders that were exported once in a run of all tests.

These are on the CPU: the root's models, which may be on a GPU, are not used.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import pytest


@pytest.fixture(scope="session")
def sisters(tmp_path_factory):
    """A family's tiny checkpoint by its preset, of few blocks, in both libraries, on the CPU. Read only."""
    from tests.sisters import FEW_BLOCKS, Sister  # not with this file, which pytest may load before it is configured

    return functools.cache(
        lambda preset: Sister(preset, tmp_path_factory.mktemp(preset) / "checkpoint", **FEW_BLOCKS[preset])
    )


@pytest.fixture(scope="session")
def live(sisters):
    """A family's tiny model by its preset. Read only."""
    return functools.cache(lambda preset: load(sisters(preset)))


def load(sister, **options):
    return sister.load(resample_backend="pillow", **options).requires_grad_(False)


# Of all exports but the first, to save time.
PARTS = {"float32": ("vision", "cached_decoder"), "float16": ("vision", "decoder", "cached_decoder")}
TEXTS = ["Pick up the red block.", "go"]


class Exported(NamedTuple):
    """A model, the folder that its like was exported to, what the export returned, and what that model was then."""

    model: object
    folder: Path
    manifest: dict
    after: dict


@pytest.fixture(scope="session")
def exported(sisters, made_once):
    """Exports of tiny models by preset, dtype and target; two cameras, frames of 50 x 70 resized to 2 x 3 merged cells.

    Those to "genai" are of all blocks, but in float16. Read only.
    """
    from qwen_batched.export import export

    @functools.cache
    def make(preset, dtype="float32", target="onnx"):
        factor, layers = sisters(preset).factor, 2 if (target, dtype) != ("genai", "float32") else None
        resize = (2 * factor, 3 * factor)
        has_all = target == "genai" or (preset, dtype) == ("tiny", "float32")

        def write(folder):
            model = load(sisters(preset), num_layers=layers, dtype=dtype)
            parts = None if has_all else PARTS[dtype]
            manifest = export(model, folder, target, ((50, 70), resize), cameras=2, parts=parts)
            return manifest, state_of(model, resize)

        folder, (manifest, after) = made_once(f"{target}-{preset}-{dtype}", write)
        return Exported(load(sisters(preset), num_layers=layers, dtype=dtype), folder, manifest, after)

    return make


def state_of(model, resize):
    """Its weights, and its logits of two samples."""
    from tests.support import photos

    logits = model(photos(2, 2, 50, 70), TEXTS, resize=resize, logits="all").logits
    return {**model.state_dict(), "logits of two samples": logits}

"""A data set, extracted once; and what runs the command."""

import importlib.util

import pytest

if any(importlib.util.find_spec(name) is None for name in ("av", "pyarrow")):
    collect_ignore_glob = ["test_*.py"]  # without the extra
else:
    from tests.extraction import written


@pytest.fixture(scope="session")
def lerobot(tmp_path_factory):
    """A LeRobot v3 data set of 3 episodes with a video and an image camera of two sizes. Read only."""
    return written.write_v3(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """One of 8 episodes of 40 frames, with two video cameras of one size, which makes 16 parts. Read only."""
    sizes, kinds = ((28, 56), (28, 56)), ("video", "video")
    return written.write_v3(tmp_path_factory.mktemp("videos"), (40,) * 8, kinds, sizes)


@pytest.fixture(scope="session")
def extracted(lerobot, checkpoint, tmp_path_factory):
    """Image features, a layer and the last of `lerobot`, in float32 batches of 4, by the command. Read only."""
    from qwen_batched.extract import main

    out = tmp_path_factory.mktemp("extracted") / "out"
    assert main(written.arguments(lerobot, out, checkpoint, "--what", "image_features", "hidden:1", "last")) == 0
    return out

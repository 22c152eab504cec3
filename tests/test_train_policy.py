"""The training example learns what it says, on one process and on two. How far it gets is said in docs/training.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(tmp_path, *options, launcher=()):
    command = [sys.executable, *launcher, str(EXAMPLES / "train_policy.py"), "--device", "cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--output", str(tmp_path / "policy.png")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )


def test_a_short_training_reports_and_draws(tmp_path):
    done = run(tmp_path, "--steps", "3", "--batch-size", "2", "--held-out", "8")
    assert done.returncode == 0, done.stderr
    for line in ("held-out success", "told of another cube", "3 steps"):
        assert line in done.stdout
    assert Image.open(tmp_path / "policy.png").width > 400


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_come_to_the_same_weights(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run(tmp_path, "--steps", "2", "--batch-size", "1", "--held-out", "2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "processes 2, all with the same weights" in done.stdout
    assert done.stdout.count("held-out success") == 1


def test_a_model_that_cannot_be_had_is_said_in_one_line(tmp_path):
    done = run(tmp_path, "--model", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_frames_and_actions_fit_together(monkeypatch):
    """A sample's action leads from the gripper to the cube that its instruction names, and to no other."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import random

    from reaching_task import draw_samples, make_batch, reached

    samples = draw_samples(random.Random(0), 4)
    batch, other = make_batch(samples), make_batch([sample.misled() for sample in samples])
    assert reached(batch["action"], batch["action"]).all()
    assert not reached(other["action"], batch["action"]).any()
    assert all(a != b for a, b in zip(batch["task"], other["task"], strict=True))
    frames = batch["observation.images.front"]
    assert frames.dtype == torch.float32 and frames.shape[1] == 3 and frames.min() >= 0 and frames.max() <= 1

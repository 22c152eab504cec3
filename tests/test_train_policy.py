"""The training example learns what it says, on one process and on two. How far it gets is said in docs/training.md."""

import pytest
import torch
from PIL import Image

from tests.processes import ROOT, run_python

EXAMPLES = ROOT / "examples"


def run(tmp_path, *options, processes=1):
    options = ("--device", "cpu", *options, "--output", tmp_path / "policy.png")
    return run_python(EXAMPLES / "train_policy.py", *options, processes=processes)


@pytest.mark.slow
def test_a_short_training_reports_and_draws(tmp_path):
    done = run(tmp_path, "--steps", "3", "--batch-size", "2", "--held-out", "8")
    assert done.returncode == 0, done.stderr
    for line in ("held-out success", "told of another cube", "3 steps"):
        assert line in done.stdout
    assert Image.open(tmp_path / "policy.png").width > 400


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_come_to_the_same_weights(tmp_path):
    done = run(tmp_path, "--steps", "2", "--batch-size", "1", "--held-out", "2", processes=2)
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

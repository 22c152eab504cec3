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


# --- cached features ---


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_policy

    return train_policy


def train_frozen(example, *options):
    """The losses of a short training with a frozen tower, and how often the tower ran before and in the training."""
    args = example.argument_parser().parse_args(["--scenes", "5", "--batch-size", "2", "--steps", "5", *options])
    torch.manual_seed(0)
    policy = example.Policy(example.load_backbone(None)).to("cpu")
    policy.backbone.visual.requires_grad_(False)
    runs = []
    policy.backbone.visual.register_forward_hook(lambda *_: runs.append(1))
    training_set = example.load_training_set(policy.backbone, args)
    before = len(runs)
    return example.train(policy, args, training_set), before, len(runs) - before


def test_training_from_cached_features_has_the_losses_of_a_frozen_tower(example, tmp_path):
    expected, before, during = train_frozen(example)
    assert (before, during) == (0, 5)
    for runs in (1, 0):  # the second run reads the file
        losses, before, during = train_frozen(example, "--cached-features", str(tmp_path / "features"))
        assert (before, during) == (runs, 0)
        assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == 5


def test_features_of_another_model_frames_or_precision_are_refused(example, monkeypatch, tmp_path):
    cached = ["--cached-features", str(tmp_path)]
    train_frozen(example, *cached)
    for changes, named in ((["--seed", "1"], "frames"), (["--scenes", "6"], "frames"), (["--bf16"], "precision")):
        with pytest.raises(ValueError, match=f"does not fit this run's {named}:"):
            train_frozen(example, *cached, *changes)
    load_backbone = example.load_backbone

    def load_another(name):
        backbone = load_backbone(name)
        with torch.no_grad():
            next(backbone.visual.parameters()).flatten()[0] += 1e-3
        return backbone

    monkeypatch.setattr(example, "load_backbone", load_another)
    with pytest.raises(ValueError, match="does not fit this run's model:"):
        train_frozen(example, *cached)


def test_a_file_that_holds_no_features_is_refused_in_one_line(tmp_path):
    path = tmp_path / "features-0-of-1.safetensors"
    path.write_text("no features")
    done = run(tmp_path, "--scenes", "2", "--cached-features", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert str(path) in done.stderr

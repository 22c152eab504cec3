"""The example of a flow-matching head computes the same velocity in training and behind a prompt, and learns."""

import random
from argparse import Namespace

import pytest
import torch

from tests.processes import ROOT, run_python
from tests.support import assert_equal_to

EXAMPLES = ROOT / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def policy(examples, device):
    from flow_head import FlowHead
    from flow_matching import load_backbone

    torch.manual_seed(0)
    return FlowHead(load_backbone(None, device)).to(device)


def draw(device, samples):
    from flow_matching import draw_batch, on_device

    return on_device(draw_batch(random.Random(0), samples), device)


@torch.no_grad()
def test_training_and_acting_compute_the_same_velocity(policy, device):
    batch = draw(device, 5)  # with prompts of several lengths
    noisy, times = torch.randn(5, 8, 2, device=device), torch.linspace(0, 0.9, 5, device=device)
    cache = policy.prefill(batch)
    assert not cache.output.attention_mask.all()
    for _ in range(2):  # the cache serves again
        assert_equal_to(policy.velocity_behind(cache, noisy, times), policy(batch, noisy, times))


def test_gradients_reach_the_head_and_all_of_the_backbone(policy, device):
    from flow_matching import flow_loss

    flow_loss(policy, draw(device, 2)).backward()
    missing = [name for name, x in policy.named_parameters() if x.grad is None or not x.grad.any()]
    assert not missing


def test_the_prompt_runs_once_for_a_chunk(policy, device, monkeypatch):
    runs = []
    monkeypatch.setattr(policy.backbone.visual, "forward", _counted(policy.backbone.visual.forward, runs))
    assert policy.act(draw(device, 2), torch.zeros(2, 8, 2, device=device)).shape == (2, 8, 2)
    assert len(runs) == 1


def _counted(function, runs):
    def run(*arguments, **options):
        runs.append(function)
        return function(*arguments, **options)

    return run


def test_euler_steps_along_the_true_velocity_end_at_the_actions(examples):
    from flow_matching import integrate

    actions, noise = torch.randn(2, 3, 8, 2).unbind()
    found = integrate(lambda noisy, times: (actions - noisy) / (1 - times[:, None, None]), noise)
    torch.testing.assert_close(found, actions)


def test_the_loss_is_zero_for_the_true_velocity_and_not_for_another(examples):
    from flow_matching import flow_loss, scaled

    batch = draw(torch.device("cpu"), 4)

    def true_velocity(batch, noisy, times):
        return (scaled(batch) - noisy) / (1 - times[:, None, None])

    assert flow_loss(true_velocity, batch) < 1e-6
    assert flow_loss(lambda *arguments: -true_velocity(*arguments), batch) > 0.1


def test_a_chunk_leads_to_a_cube_that_the_frame_shows(examples):
    from flow_matching import SIGHT

    batch = draw(torch.device("cpu"), 8)
    actions, frames = batch["action"], batch["observation.images.wrist"]
    assert actions.shape == (8, 8, 2) and actions.abs().max() <= SIGHT
    torch.testing.assert_close(actions.diff(dim=1), actions[:, :1].expand(-1, 7, -1))
    assert all(name in task for name, task in zip(_colours_of(frames), batch["task"], strict=True))


def _colours_of(frames):
    """The cube whose colour comes closest to that of a pixel of each frame."""
    from reaching_task import COLOURS

    colours = torch.tensor(list(COLOURS.values())) / 255
    distances = (frames.permute(0, 2, 3, 1).flatten(1, 2)[:, :, None] - colours).norm(dim=-1).amin(dim=1)
    return [list(COLOURS)[nearest] for nearest in distances.argmin(dim=1)]


@pytest.mark.slow
def test_a_short_training_lowers_loss_and_error(policy, device):
    from flow_matching import held_out_error, train

    held_out = draw(device, 16)
    before = held_out_error(policy, held_out)
    losses = train(policy, Namespace(seed=0, lr=2e-3, steps=30, batch_size=8))
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    assert held_out_error(policy, held_out) < before / 1.5


@pytest.mark.slow
def test_the_example_runs():
    done = run_python(EXAMPLES / "flow_head.py", "--steps", "2", "--batch-size", "2", "--held-out", "4")
    assert done.returncode == 0, done.stderr
    assert "held-out error" in done.stdout
    (difference,) = [line.split()[-3] for line in done.stdout.splitlines() if line.startswith("velocities")]
    assert float(difference) < 1e-5

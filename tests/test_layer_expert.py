"""The example of an action expert trains the backbone through its keys and values, and never sees padding."""

import random

import pytest
import torch

from tests.processes import ROOT, run_python
from tests.support import assert_equal_to

EXAMPLES = ROOT / "examples"


@pytest.fixture
def make_policy(monkeypatch, device):
    monkeypatch.syspath_prepend(EXAMPLES)
    from flow_matching import load_backbone
    from layer_expert import LayerExpert

    def make(blocks=(0, 1)):
        torch.manual_seed(0)
        return LayerExpert(load_backbone(None, device, num_layers=max(blocks) + 1), blocks).to(device)

    return make


def draw(device, samples):
    from flow_matching import draw_batch, on_device

    return on_device(draw_batch(random.Random(0), samples), device)


@torch.no_grad()
def test_a_sample_alone_gets_the_velocity_that_it_gets_in_a_batch(make_policy, device):
    policy, batch = make_policy(), draw(device, 5)
    assert not policy.look(batch).attention_mask.all()  # some are padded
    noisy, times = torch.randn(5, 8, 2, device=device), torch.linspace(0, 0.9, 5, device=device)
    together = policy(batch, noisy, times)
    for i in range(5):
        alone = policy({key: x[i : i + 1] for key, x in batch.items()}, noisy[i : i + 1], times[i : i + 1])
        assert_equal_to(together[i : i + 1], alone)


@pytest.mark.parametrize("blocks", [(0, 1), (1,), (0,)])
def test_gradients_reach_the_backbone_through_keys_and_values_alone(make_policy, device, blocks):
    from flow_matching import flow_loss

    policy = make_policy(blocks)
    flow_loss(policy, draw(device, 2)).backward()
    without = {name for name, x in policy.named_parameters() if x.grad is None or not x.grad.any()}
    last = f"backbone.model.layers.{max(blocks)}."
    unused = {name for name, _ in policy.named_parameters() if name.startswith(last)}
    unused -= {last + name for name in ("input_layernorm.weight", "self_attn.k_norm.weight")}
    unused -= {last + f"self_attn.{name}_proj.weight" for name in "kv"}
    assert {name for name in without if "deepstack" not in name} == unused | {"backbone.model.norm.weight"}


def test_the_norms_that_it_prints_are_not_zero_and_leave_no_gradients(make_policy, device):
    from layer_expert import gradient_norms

    policy = make_policy()
    norms = gradient_norms(policy, draw(device, 2))
    assert set(norms) == {"tower", "decoder", "expert"} and min(norms.values()) > 0
    assert all(x.grad is None for x in policy.parameters())


def test_the_backbone_runs_once_for_a_chunk(make_policy, device):
    policy, runs = make_policy(), []
    policy.backbone.register_forward_hook(lambda *arguments: runs.append(1))
    assert policy.act(draw(device, 2), torch.zeros(2, 8, 2, device=device)).shape == (2, 8, 2)
    assert len(runs) == 1


@pytest.mark.slow
def test_the_example_learns():
    done = run_python(EXAMPLES / "layer_expert.py", "--steps", "40", "--batch-size", "8", "--held-out", "16")
    assert done.returncode == 0, done.stderr
    words = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    before, after = float(words["held-out error"][2]), float(words["held-out error"][6])
    assert after < before / 1.5
    assert "tower" in words["gradient norms"]

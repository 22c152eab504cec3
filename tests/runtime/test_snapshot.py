"""A snapshot of a module sees every change that a captured graph would not."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qwen_batched.runtime.snapshot import ModuleSnapshot, is_capturable
from tests.support import Scaled


def make_module():
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.GELU()), nn.BatchNorm1d(4))


def update_in_place(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2).add_(1)


UNCHANGED = {
    "nothing": lambda module: None,
    "in place": update_in_place,
    "data.copy_": lambda module: module[0].weight.data.copy_(torch.ones(4, 3)),
    "load_state_dict": lambda module: module.load_state_dict(make_module().state_dict()),
    "eval": lambda module: module.requires_grad_(False),
    "hook removed again": lambda module: module[0].register_forward_hook(lambda *args: None).remove(),
    "same dtype": lambda module: module.to(torch.float32),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_module_with_other_values_in_the_same_memory_matches(name):
    module = make_module()
    snapshot = ModuleSnapshot(module)
    UNCHANGED[name](module)
    assert snapshot.matches(module)


def replace_forward(module):
    module[0].forward = types.MethodType(lambda self, x: x[..., :1].expand(-1, 4), module[0])


def swap_hook(module):
    module[1]._first.remove()
    module[1].register_forward_hook(lambda module, args, out: out * 3)


def swap_within(module):
    module[1][0].weight.data = module[1][0].weight.data.t()


CHANGED = {
    "replaced child": lambda module: module.__setitem__(0, nn.Linear(3, 4)),
    "replaced inner child": lambda module: module[1].__setitem__(0, nn.Identity()),
    "wrapped child": lambda module: module[1].__setitem__(0, nn.Sequential(module[1][0])),
    "removed child": lambda module: module.__delitem__(2),
    "added child": lambda module: module.append(nn.ReLU()),
    "replaced parameter": lambda module: setattr(module[0], "weight", nn.Parameter(module[0].weight.clone())),
    "removed bias": lambda module: setattr(module[0], "bias", None),
    "added bias": lambda module: setattr(module[1][0], "bias", nn.Parameter(torch.ones(4))),
    "moved storage": lambda module: setattr(module[0].weight, "data", module[0].weight.data.clone()),
    "other dtype": lambda module: module.to(torch.bfloat16),
    "assigned": lambda module: module.load_state_dict(make_module().state_dict(), assign=True),
    "replaced buffer": lambda module: setattr(module[2], "running_mean", torch.ones(4)),
    "forward hook": lambda module: module[1][1].register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *args: None),
    "another hook": swap_hook,
    "replaced forward": replace_forward,
    "same address, other strides": swap_within,
    "training": lambda module: module.train(not module.training),
    "another class": lambda module: setattr(module[0], "__class__", Special),
    "epsilon": lambda module: setattr(module[2], "eps", 1e-3),
    "a tensor as attribute": lambda module: setattr(module[0], "kept", torch.ones(3)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_trap26_a_change_that_a_graph_would_miss_does_not_match(name):
    module = make_module()
    module[1]._first = module[1].register_forward_hook(lambda *args: None)
    snapshot = ModuleSnapshot(module)
    CHANGED[name](module)
    assert not snapshot.matches(module)


def test_another_module_does_not_match():
    module = make_module()
    assert not ModuleSnapshot(module).matches(copy.deepcopy(module))


def test_a_snapshot_keeps_the_memory_that_a_graph_may_still_read():
    module = make_module()
    weight = module[0].weight
    address, snapshot = weight.data_ptr(), ModuleSnapshot(module)
    weight.data = torch.zeros(4, 3)
    others = [torch.empty(4, 3) for _ in range(1000)]
    assert address not in {other.data_ptr() for other in others}
    assert not snapshot.matches(module)


PLAIN = {
    "as built": lambda module: None,
    "frozen": lambda module: module.requires_grad_(False),
    "another mode": lambda module: module.eval(),
    "in bfloat16": lambda module: module.to(torch.bfloat16),
    "a hook that is gone": lambda module: module.register_forward_hook(lambda *args: None).remove(),
}
NOT_PLAIN = {
    "forward hook": lambda module: module[1][0].register_forward_hook(lambda *args: None),
    "forward pre-hook": lambda module: module[0].register_forward_pre_hook(lambda *args: None),
    "backward hook": lambda module: module[0].register_full_backward_hook(lambda *args: None),
    "backward pre-hook": lambda module: module[0].register_full_backward_pre_hook(lambda *args: None),
    "replaced forward": replace_forward,
    "wrapped": lambda module: module.__setitem__(0, Scaled(module[0])),
    "compiled": lambda module: module[0].compile(),
    "a layer of the user's": lambda module: setattr(module[0], "__class__", Special),
    "a tensor as attribute": lambda module: setattr(module[0], "kept", torch.ones(3)),
    "parametrized": lambda module: nn.utils.parametrizations.orthogonal(module[0]),
    "as fully_shard leaves it": lambda module: module[0].register_load_state_dict_post_hook(lambda *args: None),
    "pruned": lambda module: prune.random_unstructured(module[0], "weight", 0.5),
    "another kind of parameter": lambda module: setattr(
        module[0], "weight", SpecialParameter(module[0].weight.detach())
    ),
}


class SpecialParameter(nn.Parameter):
    """As of a quantised or sharded layer."""


class Special(nn.Linear):
    """A layer of the user's."""


def test_values_that_cannot_be_compared_do_not_match():
    module = make_module()
    module.anything = np.ones(3)
    snapshot = ModuleSnapshot(module)
    assert snapshot.matches(module)
    module.anything = np.zeros(3)
    assert not snapshot.matches(module)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules_can_be_captured(name):
    module = make_module()
    PLAIN[name](module)
    assert is_capturable(module)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_trap26_code_that_a_graph_would_leave_out_is_not_captured(name):
    module = make_module()
    NOT_PLAIN[name](module)
    assert not is_capturable(module)


def test_hooks_on_all_modules_are_not_left_out():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not is_capturable(make_module())
    finally:
        handle.remove()
    assert is_capturable(make_module())

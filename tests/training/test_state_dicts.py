"""`load_state_dict` takes either key layout, alone and as a part of another module."""

import pytest
import torch
from torch import nn

from tests.support import assert_equal_to

PRESETS = ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"]


@pytest.fixture(params=PRESETS)
def loaded(request, sisters):
    return sisters(request.param)


def zeroed(loaded):
    model = loaded.load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def in_layout(loaded, layout):
    """The checkpoint's tensors by the names of a layout, with a tied head only where transformers has one."""
    state = loaded.model.state_dict()
    if layout == "nested":
        return {loaded.model.family.keys.adapter_name(name): value for name, value in state.items()}
    return loaded.reference.model.state_dict() if layout == "transformers" else state


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", ["published", "nested", "transformers"])
def test_either_layout_loads(loaded, layout, assign):
    model = zeroed(loaded)
    result = model.load_state_dict(in_layout(loaded, layout), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for (name, found), expected in zip(model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    frames = loaded.photos(1, 1, 2, 3).to(model.device)
    assert_equal_to(model(frames, ["Go."]).last_hidden_state, loaded.model(frames, ["Go."]).last_hidden_state)


def test_a_part_of_another_module_takes_either_layout(loaded):
    class Policy(nn.Module):
        def __init__(self, vlm):
            super().__init__()
            self.vlm, self.head = vlm, nn.Linear(2, 2)

    policy = Policy(zeroed(loaded))
    state = {f"vlm.{name}": value for name, value in in_layout(loaded, "nested").items()}
    policy.load_state_dict(state | {f"head.{name}": value for name, value in policy.head.state_dict().items()})
    assert all(map(torch.equal, policy.vlm.parameters(), loaded.model.parameters()))


def test_a_shard_loads_without_the_others(loaded):
    state = in_layout(loaded, "nested")
    half = dict(list(state.items())[::2])
    model = zeroed(loaded)
    result = model.load_state_dict(half, strict=False)
    missing = {name for name in result.missing_keys if name in loaded.model.state_dict()}  # without a tied head
    assert result.unexpected_keys == [] and len(missing) == len(state) - len(half)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(half)


def test_one_tensor_by_two_names_is_refused(loaded):
    state = {**in_layout(loaded, "published"), **in_layout(loaded, "nested")}
    with pytest.raises(ValueError, match="twice"):
        loaded.load().load_state_dict(state)


def test_unknown_names_are_reported_as_they_came(loaded):
    state = {**in_layout(loaded, "nested"), "model.somewhere.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"model\.somewhere\.weight"):
        loaded.load().load_state_dict(state)

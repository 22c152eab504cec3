"""Running averages of a model: by `deepcopy`, and by PyTorch's `AveragedModel`."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support import assert_equal_to, photos

FRAMES = photos(2, 2, 56, 84)
TEXTS = ["Pick up the red block.", ""]
DECAY = 0.9


@pytest.fixture
def model(load, device):
    return load(device=device)


def result(model):
    with torch.no_grad():
        return model(FRAMES, TEXTS).last_hidden_state


def train_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(FRAMES, TEXTS).last_hidden_state.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_an_average_kept_by_deepcopy_follows_the_weights_and_no_more(model, load, used):
    """What a used model has cached and packed is not shared with the copy."""
    before = result(model) if used else None
    average = copy.deepcopy(model).requires_grad_(False)
    first = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train_a_step(model)
    if used:
        assert torch.equal(result(average), before)
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(parameter.detach(), 1 - DECAY)
    expected = load(device=model.device)
    for name, parameter in expected.named_parameters():
        parameter.data = first[name].lerp(model.get_parameter(name).detach(), 1 - DECAY)
    assert torch.equal(result(average), result(expected))
    assert not torch.equal(result(average), result(model))


def test_pytorchs_averaged_model_equals_an_average_by_hand(model, load):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(model)  # the first sets it
    expected = load(device=model.device)
    for _ in range(2):
        train_a_step(model)
        average.update_parameters(model)
        for mean, parameter in zip(expected.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.detach(), 1 - DECAY)
    assert_equal_to(result(average), result(expected), tolerance=1e-6)  # many tensors at once may round otherwise
    assert list(average.module.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_an_average_is_saved_with_torch_save_and_taken_up_again(model, tmp_path):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for _ in range(2):
        train_a_step(model)
        average.update_parameters(model)
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, tmp_path / "state.pt")
    torch.save(average.module, tmp_path / "whole.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    again = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    again.load_state_dict(stored["average"])
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(result(again), result(average)) and torch.equal(result(whole), result(average))
    for each in (again, average):
        train_a_step(model)
        each.update_parameters(model)
        model.load_state_dict(stored["model"])
    assert torch.equal(result(again), result(average))

"""A slice of the fuzzed calls, and that the fuzzer finds what is planted. `python -m tests.fuzz.calls` makes all."""

import pytest
import torch

from qwen_batched import QwenBatchedVL
from tests.fuzz.calls import Fuzzer, describe

SLICE, PART = 160, 40
FORWARD = QwenBatchedVL.forward
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of sparse and nested tensors
@pytest.mark.parametrize("start", range(0, SLICE, PART))
def test_an_odd_call_gives_a_right_result_or_is_refused_before_any_work_and_changes_nothing(fuzzer, start):
    found = {index: fuzzer.faults(index) for index in range(start, start + PART)}
    assert not any(found.values()), "\n".join(
        f"{index}: {faults}\n{describe(fuzzer.call(index))}" for index, faults in found.items() if faults
    )
    assert fuzzer.outcomes["ran"] and fuzzer.outcomes["refused"]


def test_a_call_is_the_same_whenever_it_is_made(fuzzer):
    for index in range(40):
        assert describe(fuzzer.call(index)) == describe(fuzzer.call(index))


def off_in_batches(self, *arguments, **keywords):
    out = FORWARD(self, *arguments, **keywords)
    if len(out.input_ids) > 1:
        out.hidden_states[0][1] *= 1.001
    return out


def another_exception(self, *arguments, **keywords):
    try:
        return FORWARD(self, *arguments, **keywords)
    except ValueError as error:
        raise IndexError(str(error)) from error


def work_first(self, *arguments, **keywords):
    self.model.norm(torch.zeros(1, self.config.text.hidden_size))
    return FORWARD(self, *arguments, **keywords)


def random_numbers(self, *arguments, **keywords):
    torch.rand(1)
    return FORWARD(self, *arguments, **keywords)


def gigabytes(self, *arguments, **keywords):
    torch.empty(2**31, dtype=torch.uint8)
    return FORWARD(self, *arguments, **keywords)


def long_message(self, *arguments, **keywords):
    try:
        return FORWARD(self, *arguments, **keywords)
    except ValueError as error:
        raise ValueError(str(error) * 1000) from error


def lenient(self, *arguments, **keywords):
    try:
        return FORWARD(self, *arguments, **keywords)
    except (ValueError, TypeError):
        return FORWARD(self, None, ["Go."])


def strict(self, *arguments, layers=(-1,), **keywords):
    if len(layers) > 1:
        raise ValueError("one layer")
    return FORWARD(self, *arguments, layers=layers, **keywords)


def in_place(self, images=None, *arguments, **keywords):
    if isinstance(images, torch.Tensor) and images.layout == torch.strided:
        out = FORWARD(self, images, *arguments, **keywords)
        images.zero_()
        return out
    return FORWARD(self, images, *arguments, **keywords)


def gradients_left_on(self, *arguments, **keywords):
    torch.set_grad_enabled(True)
    return FORWARD(self, *arguments, **keywords)


PLANTED = {
    off_in_batches: "wrong result: hidden_states is off by",
    another_exception: "IndexError",
    work_first: "refused after AddRMSNorm ran",
    random_numbers: "changed the state: PyTorch's generator",
    gigabytes: "RuntimeError",
    long_message: "an error of",
    lenient: "ran though it must be refused",
    strict: "refused though it is right",
    in_place: "changed its arguments",
    gradients_left_on: "changed the state: grad mode",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planted", PLANTED, ids=lambda function: function.__name__)
def test_the_fuzzer_finds_what_is_planted(fuzzer, monkeypatch, planted):
    grad_mode = torch.is_grad_enabled()
    monkeypatch.setattr(QwenBatchedVL, "forward", planted)
    try:
        for index in range(2 * SLICE):
            if any(PLANTED[planted] in fault for fault in fuzzer.faults(index)):
                return
    finally:
        torch.set_grad_enabled(grad_mode)
    pytest.fail("not found")


def test_the_fuzzer_finds_a_model_that_is_changed_by_a_call(fuzzer, monkeypatch):
    def damaging(self, *arguments, **keywords):
        try:
            return FORWARD(self, *arguments, **keywords)
        except ValueError:
            self.model.norm.weight.data[0] += 1e-3  # which no version counter sees
            raise

    before = fuzzer.model.model.norm.weight.detach().clone()
    monkeypatch.setattr(QwenBatchedVL, "forward", damaging)
    try:
        found = (fault for index in range(SLICE) for fault in fuzzer.faults(index))
        assert any("changed what a good call gives" in fault for fault in found)
    finally:
        fuzzer.model.model.norm.weight.data.copy_(before)

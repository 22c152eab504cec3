"""A slice of what is known to be good, and that the harness finds what is planted. The module itself runs all of it."""

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.inputs.vocabulary import Vocabulary
from qwen_batched.runtime.lru_cache import LRUCache
from tests.fuzz.known_good import KnownGood

FORWARD = QwenBatchedVL.forward
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return KnownGood(tmp_path_factory.mktemp("known"), shapes=12)


@pytest.fixture
def known(stage):
    stage.faults.clear()
    return stage


def test_no_text_becomes_a_control_token(known):
    known.inject(1000)
    assert known.faults == []


def test_calls_in_random_order_stay_bitwise_the_same_and_memory_flat(known):
    known.soak(40)
    assert known.faults == []


def test_calls_of_many_threads_and_of_forked_children_are_bitwise_as_alone(known):
    known.threads(threads=3, calls=10, forks=2)
    assert known.faults == []


def test_an_interrupted_call_leaves_everything_as_it_was(known):
    known.interrupt(8)
    assert known.faults == []


def test_interrupted_loading_and_saving_leave_everything_as_it_was(known):
    known.interrupt_files(4)
    assert known.faults == []


# --- planted faults ---


def test_the_harness_finds_a_text_that_becomes_a_control_token(known, monkeypatch):
    encode = Vocabulary.encode

    def lenient(self, text):
        found = [index for token, index in self.control_ids.items() if token in text]
        return found or encode(self, text)

    monkeypatch.setattr(Vocabulary, "encode", lenient)
    known.inject(100)
    assert known.faults


def test_the_harness_finds_a_result_that_drifts(known, monkeypatch):
    calls = iter(range(10**6))

    def drifting(self, *arguments, **keywords):
        out = FORWARD(self, *arguments, **keywords)
        if next(calls) == 5:
            out.hidden_states[0][0] *= 1 + 1e-6
        return out

    monkeypatch.setattr(QwenBatchedVL, "forward", drifting)
    known.soak(60)
    assert len(known.faults) == 1


def test_the_harness_finds_a_leak(known, monkeypatch):
    kept = []

    def leaking(self, *arguments, **keywords):
        kept.append(torch.ones(2**20))
        return FORWARD(self, *arguments, **keywords)

    monkeypatch.setattr(QwenBatchedVL, "forward", leaking)
    known.soak(60)
    assert any("grew by" in fault for fault in known.faults)


def test_the_harness_finds_threads_that_feel_each_other(known, monkeypatch):
    running = []

    def crowded(self, *arguments, **keywords):
        running.append(None)
        out = FORWARD(self, *arguments, **keywords)
        if len(running) > 1:
            out.hidden_states[0][0] *= 1 + 1e-6
        running.pop()
        return out

    monkeypatch.setattr(QwenBatchedVL, "forward", crowded)
    known.threads(threads=3, calls=20, forks=0)
    assert known.faults


def test_the_harness_finds_state_that_an_interrupt_leaves_behind(known, monkeypatch):
    def careless(self, *arguments, **keywords):
        before = torch.get_rng_state()
        torch.manual_seed(1)
        out = FORWARD(self, *arguments, **keywords)
        torch.set_rng_state(before)
        return out

    monkeypatch.setattr(QwenBatchedVL, "forward", careless)
    with torch.random.fork_rng():
        known.interrupt(12)
    assert any("PyTorch's generator changed" in fault for fault in known.faults)


def test_the_harness_finds_a_cache_whose_books_are_wrong(known, monkeypatch):
    keep = LRUCache._keep

    def wrong(self, key, value, size):
        keep(self, key, value, size)
        self._bytes += 1

    monkeypatch.setattr(LRUCache, "_keep", wrong)
    known.interrupt(4)
    assert any("a cache counts" in fault for fault in known.faults)
    for cache in list(LRUCache._instances):
        cache._bytes = sum(size for _, size in cache._values.values())

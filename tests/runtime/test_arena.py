"""What an invalidated capture leaves behind, with a graph that only pretends: `test_cuda_graphs.py` has real ones."""

import weakref

import pytest
import torch

from qwen_batched.runtime.arena import Arena

DEVICE = torch.device("cuda", 0)


class Graph:
    """A graph whose capture was invalidated, or was not."""

    def __init__(self, error):
        self.error = error

    def capture_end(self):
        if self.error is not None:
            raise self.error


@pytest.fixture
def arena(monkeypatch):
    """An arena of a GPU that is not there."""
    monkeypatch.setattr(Arena, "_living", weakref.WeakValueDictionary())
    arena = Arena.__new__(Arena)
    arena.device, arena._pool = DEVICE, (0, 7)
    Arena._living[DEVICE] = arena
    return arena


@pytest.fixture
def ended(monkeypatch):
    """The pools whose recording was ended."""
    pools = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *arguments: pools.append(arguments), raising=False)
    return pools


def test_a_capture_that_ends_well_leaves_its_arena_in_use(arena, ended):
    arena._end(Graph(None))
    assert Arena._living[DEVICE] is arena and ended == []


@pytest.mark.parametrize("is_in_use", [True, False])
def test_after_an_invalidated_capture_its_arena_takes_no_more(arena, ended, is_in_use):
    if not is_in_use:
        del Arena._living[DEVICE]
    with pytest.raises(RuntimeError, match="previous error"):
        arena._end(Graph(RuntimeError("operation failed due to a previous error during capture")))
    assert DEVICE not in Arena._living
    assert ended == [(0, (0, 7))]


def test_the_last_arena_that_has_a_stream_stays(arena, ended, monkeypatch):
    """Its successor would look for an unused stream for ever."""
    monkeypatch.setattr(Arena, "_immortal", [arena])
    with pytest.raises(RuntimeError):
        arena._end(Graph(RuntimeError("invalidated")))
    assert Arena._living[DEVICE] is arena and ended == [(0, (0, 7))]


def test_an_arena_whose_first_capture_fails_has_no_pool_to_end(arena, ended):
    arena._pool = None
    with pytest.raises(RuntimeError):
        arena._end(Graph(RuntimeError("invalidated")))
    assert ended == []

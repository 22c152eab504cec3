"""What an invalidated capture leaves behind, with a graph that only pretends: `test_cuda_graphs.py` has real ones."""

import threading

import pytest
import torch

from qwen_batched.runtime.arena import Arena, synchronize

DEVICE, POOL = torch.device("cuda", 0), (0, 7)


class Graph:
    """A graph whose capture was invalidated, or was not."""

    def __init__(self, error=None):
        self.error = error

    def capture_end(self):
        if self.error is not None:
            raise self.error


@pytest.fixture
def log(monkeypatch):
    """Which pools were ended, and that one was opened."""
    log = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *arguments: log.append(arguments), raising=False)
    monkeypatch.setattr(Arena, "_open_pool", lambda self: log.append("opened"))
    return log


def end(graph, pool):
    """Ends the capture of `graph` in an arena of a GPU that is not there."""
    arena = Arena.__new__(Arena)
    arena.device = DEVICE
    arena._end(graph, pool)


def test_a_capture_that_ends_well_leaves_its_pool_in_use(log):
    end(Graph(), POOL)
    assert log == []


def test_after_an_invalidated_capture_the_next_ones_get_another_pool(log):
    with pytest.raises(RuntimeError, match="previous error"):
        end(Graph(RuntimeError("operation failed due to a previous error during capture")), POOL)
    assert log == [(0, POOL), "opened"]


def test_an_arena_whose_first_capture_fails_does_not_try_for_ever(log):
    with pytest.raises(RuntimeError):
        end(Graph(RuntimeError("invalidated")), None)
    assert log == []


def test_a_wait_for_a_device_comes_behind_a_capture_of_another_thread(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", log.append)
    thread = threading.Thread(target=synchronize, args=(DEVICE,))
    with Arena._one_capture:
        thread.start()
        thread.join(0.2)
        log.append("captured")
    thread.join()
    assert log == ["captured", DEVICE]
    synchronize(torch.device("cpu"))
    assert len(log) == 2

"""CUDA graphs that only pretend, so that a CPU can test when calls are run, captured and replayed."""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves


def overwrite(outputs, values):
    """As a replay does: new values in the same memory."""
    for output, value in zip(tree_leaves(outputs), tree_leaves(values), strict=True):
        if isinstance(output, torch.Tensor):
            output.copy_(value)


class FakeArena:
    """In place of an arena of a GPU: captures nothing but the call itself."""

    def __init__(self, log):
        self.device, self.log = torch.device("cpu"), log

    @contextlib.contextmanager
    def capture(self):
        self.log.before_capture()
        if self.log.error is not None:
            raise self.log.error
        self.log.captured += 1
        self.log.capturing = True
        yield types.SimpleNamespace()
        self.log.capturing = False

    def in_turn(self):
        return contextlib.nullcontext(FakeEvent(self.log))


class FakeEvent:
    """Comes to pass when the device is no longer busy."""

    def __init__(self, log):
        self.log = log

    def query(self):
        return not self.log.busy

    def synchronize(self):
        self.log.waited += 1
        self.log.busy = False


@pytest.fixture
def fake(monkeypatch):
    """CudaGraphs without CUDA: a replay runs the function again, on the same buffers, into the same outputs."""
    from qwen_batched.runtime import cuda_graphs  # not with this file, which pytest may load before it is configured

    log = types.SimpleNamespace(captured=0, replayed=0, waited=0, busy=False, error=None, capturing=False)
    log.replaying = False  # where hooks of the model run, they would not

    class FakeCall(cuda_graphs.CapturedCall):
        def __init__(self, function, inputs, rooms, held, arena):
            def on_zeros(*buffers):
                """A capture runs nothing. Here outputs must be made, from something harmless; without them, nothing."""
                with monkeypatch.context() as patch:  # nor can anything be read
                    patch.setattr("qwen_batched.inputs.checks.can_read", lambda *tensors: False)
                    return function(*(buffer.zero_() for buffer in buffers)) if buffers else None

            super().__init__(on_zeros, inputs, rooms, held, arena)

            def replay():
                log.replayed += 1
                log.replaying = True
                with torch.no_grad():  # a graph knows no gradients, whoever replays it
                    overwrite(self.outputs, function(*self.inputs, *self.held))
                log.replaying = False

            self.graph.replay = replay
            living.add(self)

    log.before_capture = lambda: None
    living = weakref.WeakSet()

    def count_living():
        """How many captured calls are still there; those that pretend are cycles."""
        gc.collect()
        return len(living)

    log.living = count_living
    monkeypatch.setattr(cuda_graphs, "CapturedCall", FakeCall)
    monkeypatch.setattr(cuda_graphs.Arena, "of", lambda device: FakeArena(log))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return log

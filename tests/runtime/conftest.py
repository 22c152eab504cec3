"""CUDA graphs that only pretend, so that a CPU can test when calls are run, captured and replayed."""

import contextlib
import gc
import threading
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


class Past:
    """Modules as they are now, for later: a graph knows nothing of what has changed since its capture."""

    def __init__(self, modules):
        children = [child for module in modules for child in module.modules()]
        names = "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"
        self.parts = [vars(child) for child in children] + [getattr(x, name) for x in children for name in names]
        self.copies = [dict(part) for part in self.parts]
        self.tensors = [x for child in children for x in (*child._parameters.values(), *child._buffers.values())]
        self.tensors = [x for x in self.tensors if x is not None]
        self.memory = [x.data for x in self.tensors]

    @contextlib.contextmanager
    def restored(self):
        now = [dict(part) for part in self.parts], [x.data for x in self.tensors]
        self._put(self.copies, self.memory)
        try:
            yield
        finally:
            self._put(*now)

    def _put(self, copies, memory):
        for part, copy in zip(self.parts, copies, strict=True):
            if [*map(id, part.values())] != [*map(id, copy.values())] or part.keys() != copy.keys():
                part.clear()
                part.update(copy)
        for tensor, data in zip(self.tensors, memory, strict=True):
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.data = data


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

            modules = getattr(capturing, "modules", ())  # none where a test captures calls by itself
            past = Past(modules)

            def replay():
                log.replayed += 1
                log.replaying = True
                with torch.no_grad(), past.restored():  # a graph knows no gradients, whoever replays it
                    overwrite(self.outputs, function(*self.inputs, *self.held))
                log.replaying = False

            self.graph.replay = replay
            living.add(self)

    capture, capturing = cuda_graphs.CudaGraphs._capture, threading.local()

    def capture_as_now(graphs, *arguments):
        capturing.modules = graphs._snapshot._modules
        return capture(graphs, *arguments)

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_capture", capture_as_now)
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

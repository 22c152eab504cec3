"""Launches of kernels that were compiled before: each finds the one that its arguments want."""

from __future__ import annotations

import threading

import pytest
import torch

from qwen_batched.ops import reference
from tests.kernels.support import normal
from tests.support import relative_error

launch = pytest.importorskip("qwen_batched.ops.triton.launch", reason="needs Triton")
launchers = pytest.importorskip("qwen_batched.ops.triton.launchers", reason="needs Triton")


class Kernel:
    """In place of a compiled one: remembers its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


def test_without_a_gpu_every_launch_is_tritons():
    kernel, x = Kernel(), torch.zeros(3)
    for _ in range(2):
        launch.launch(kernel, (4, 5), x, 7, BLOCK=8, num_warps=2)
    assert len(kernel.launches) == 2
    for grid, (first, number), constants in kernel.launches:
        assert grid == (4, 5) and first is x and number == 7 and constants == {"BLOCK": 8, "num_warps": 2}


def check_swiglu(rows, width, offset, dtype):
    """`offset` elements into memory, so that pointers are aligned or not."""
    memory = normal(2 * rows * width + offset, where=("cuda", dtype))
    gate, up = memory[offset:].view(2, rows, width)
    exact = reference.swiglu(gate.double(), up.double())
    assert relative_error(launchers.swiglu(gate, up, None, None), exact) < 0.01


@pytest.mark.gpu
def test_alignment_dtype_and_sizes_each_find_their_kernel():
    """In turns, so that each comes again after others have been compiled."""
    launch._compiled.clear()
    cases = [
        (rows, width, offset, dtype)
        for rows in (1, 2, 16, 17)
        for width in (1, 16, 33, 48)
        for offset in (0, 1, 8)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for _ in range(2):
        for case in cases:
            check_swiglu(*case)
    assert launch._compiled


@pytest.mark.gpu
def test_a_launch_that_is_remembered_compiles_nothing_and_follows_the_stream(monkeypatch):
    x, weight = normal(64, 256, where=("cuda", torch.bfloat16)), normal(256, where=("cuda", torch.bfloat16))
    expected, _ = launchers.add_rms_norm(x, x, weight, 1e-6)
    monkeypatch.setattr(type(launch.wait_for_inputs), "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found, _ = launchers.add_rms_norm(x, x, weight, 1e-6)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "MAX_COMPILED", 5)
    launch._compiled.clear()
    for width in range(1, 20):
        check_swiglu(2, width, 0, torch.float32)
        assert len(launch._compiled) <= 5


@pytest.mark.gpu
def test_threads_launch_at_once():
    failures = []

    def run():
        try:
            for width in (16, 33, 48):
                for _ in range(20):
                    check_swiglu(4, width, 0, torch.bfloat16)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

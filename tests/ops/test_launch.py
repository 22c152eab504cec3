"""Launches of kernels that were compiled before: each finds the one that its arguments want."""

import threading
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from qwen_batched.ops import reference
from tests.ops.support import normal
from tests.support import relative_error

triton = pytest.importorskip("triton", reason="needs Triton")
launch = pytest.importorskip("qwen_batched.ops.triton.launch", reason="needs Triton")
swiglu = pytest.importorskip("qwen_batched.ops.triton.swiglu", reason="needs Triton").swiglu
add_norm = pytest.importorskip("qwen_batched.ops.triton.add_norm", reason="needs Triton").add_norm


class Kernel:
    """In place of a compiled one: remembers its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants))


def test_without_a_gpu_every_launch_is_tritons():
    kernel, x = Kernel(), torch.zeros(3)
    for _ in range(2):
        launch.launch(kernel, (4, 5), (x,), (7,), BLOCK=8, num_warps=2)
    assert len(kernel.launches) == 2
    for grid, (first, number), constants in kernel.launches:
        assert (grid, number) == ((4, 5), 7) and first is x
        assert constants == {"BLOCK": 8, "num_warps": 2, "USE_PDL": False}


@pytest.mark.parametrize("scratch", [0, 128])
@pytest.mark.parametrize("knows", [True, False])
def test_tritons_launcher_in_c_is_called_only_as_it_is_known(knows, scratch, monkeypatch):
    monkeypatch.setattr(launch, "_knows_the_launcher", lambda: knows)
    wrapper = SimpleNamespace(
        launch=print,
        launch_cooperative_grid=False,
        launch_pdl=True,
        global_scratch_size=0,
        profile_scratch_size=scratch,
    )
    kernel = SimpleNamespace(run=wrapper, function=5, packed_metadata=(4, 1, 0))
    compiled = launch._prepare(kernel, (8, 2))
    assert compiled.constants == (8, 2) and compiled.kernel is kernel
    if not knows or scratch:
        assert compiled.launch is None
    else:  # what Triton 3.6's takes behind the grid and the stream, before the kernel's arguments
        assert compiled.launch is print
        assert compiled.options == (5, False, True, None, None, (4, 1, 0), None, None, None)


def test_the_launcher_of_triton_3_6_is_known_and_no_later_one():
    release = Version(triton.__version__).release[:2]
    if release >= (3, 6):
        assert launch._knows_the_launcher.__wrapped__() == (release == (3, 6))


def check_swiglu(rows, width, offset, dtype):
    """`offset` elements into memory, so that pointers are aligned or not."""
    memory = normal(2 * rows * width + offset, where=("cuda", dtype))
    gate, up = memory[offset:].view(2, rows, width)
    exact = reference.swiglu(gate.double(), up.double())
    assert relative_error(swiglu(gate, up, None, None), exact) < 0.01


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
    expected, _ = add_norm(x, x, weight, None, 1e-6)
    monkeypatch.setattr(type(launch.pdl_wait), "run", lambda *_, **__: pytest.fail("Triton was asked again"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        found, _ = add_norm(x, x, weight, None, 1e-6)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_tritons_own_launch_gives_the_same_and_its_hooks_see_every_launch(monkeypatch):
    x, weight = normal(64, 256, where=("cuda", torch.bfloat16)), normal(256, where=("cuda", torch.bfloat16))
    expected = [add_norm(x, x, weight, None, 1e-6)[0] for _ in range(2)][1]
    seen, hook = [], triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        hooked, _ = add_norm(x, x, weight, None, 1e-6)
    finally:
        hook.remove(seen.append)
    assert len(seen) == 1
    launch._compiled.clear()
    monkeypatch.setattr(launch, "_knows_the_launcher", lambda: False)
    for found in (hooked, *(add_norm(x, x, weight, None, 1e-6)[0] for _ in range(2))):
        assert torch.equal(found, expected)
    launch._compiled.clear()


@pytest.mark.gpu
def test_a_tensor_on_another_device_is_refused_however_often_the_kernel_ran():
    x, weight = normal(4, 256, where=("cuda", torch.bfloat16)), normal(256, where=("cuda", torch.bfloat16))
    for _ in range(2):
        expected, _ = add_norm(x, x, weight, None, 1e-6)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add_norm(x, x, weight.cpu(), None, 1e-6)
    assert torch.equal(add_norm(x, x, weight, None, 1e-6)[0], expected)


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

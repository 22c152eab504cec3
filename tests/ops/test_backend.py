"""What operations run on is what was asked for, and what the tensors allow."""

import contextlib
import importlib
import logging
import sys

import pytest
import torch

from qwen_batched import ops
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.runtime import backend
from tests.ops.everything import MEAN, STD, everything, everything_inputs
from tests.ops.support import kernels_of, normal, rope_tables
from tests.support import assert_equal_to, noise

kernels = kernels_of("swiglu")
# Of swiglu; the module has the name of its function.
OPERATOR = sys.modules["qwen_batched.ops.swiglu"]._forward


@pytest.fixture
def launched(monkeypatch):
    """Counts how often a Triton launcher ran."""
    count = []
    launch = kernels.swiglu
    monkeypatch.setattr(OPERATOR, "kernel", lambda *args: count.append(1) or launch(*args))
    return count


def test_auto_runs_kernels_on_a_gpu_and_the_reference_on_a_cpu(device, launched):
    x = normal(3, 90).to(device)
    ops.swiglu(x, x)
    assert len(launched) == (device == "cuda")


def test_the_reference_can_be_asked_for(device, launched):
    x = normal(3, 90).to(device)
    with ops.use_backend("reference"):
        ops.swiglu(x, x)
    assert not launched


def test_triton_can_be_asked_for(where, launched):
    x = normal(3, 90, where=where)
    with ops.use_backend("triton"):
        assert torch.equal(ops.swiglu(x, x), kernels.swiglu(x, x))
        with ops.use_backend("reference"):
            ops.swiglu(x, x)
    ops.swiglu(x, x)
    assert len(launched) == (2 if where[0] == "cuda" else 1)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 1])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of"), ops.use_backend(name):
        pass


def test_the_backend_is_put_back_after_an_error(launched):
    with contextlib.suppress(KeyError), ops.use_backend("triton"):
        raise KeyError
    x = normal(3, 90)
    ops.swiglu(x, x)
    assert not launched


CALLS = {
    "rms_norm": lambda x: ops.add_norm(x, None, x[0], None, 1e-6),
    "add_norm": lambda x: ops.add_norm(x, x, x[0], None, 1e-6),
    "quick_gelu": ops.quick_gelu,
    "add_layer_norm": lambda x: ops.add_norm(x, x, x[0], x[1], 1e-6),
    "swiglu": lambda x: ops.swiglu(x, x),
    "swiglu-biases": lambda x: ops.swiglu(x, x, x[0], x[1]),
    "rotary_attention": lambda x: ops.rotary_attention(
        x[None], torch.ones(2, 8).to(x.device), torch.ones(2, 8).to(x.device), _segments(x.device), 1
    ),
    "frames_to_patches": lambda x: ops.frames_to_patches(
        _frames(x), 28, 28, None, *_how(x), resample_backend=ops.PILLOW
    ),
}


def _frames(x):
    return torch.zeros(1, 3, 28, 28, dtype=x.dtype, device=x.device)


def _how(x):
    order = torch.zeros(1, dtype=torch.int64, device=x.device)
    return 1.0, MEAN.to(x.device), STD.to(x.device), order, 14, 2, 2, torch.float32


def _segments(device):
    return Segments.of((Run(0, 1, 2),), device)


@pytest.fixture
def forgetful(monkeypatch):
    """Nobody has asked yet what Triton runs on."""
    for remembered in (backend._obstacle, backend._log_fallback):
        remembered.cache_clear()
    yield
    for remembered in (backend._obstacle, backend._log_fallback):
        remembered.cache_clear()


@pytest.fixture
def without_triton(forgetful, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def without_interpreter(forgetful, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_that_is_absent_is_an_error_at_the_call(name, device, without_triton):
    x = normal(2, 48).to(device)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*not installed"):
        CALLS[name](x)
    CALLS[name](x)


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_that_does_not_run_on_the_cpu_is_an_error_at_the_call(name, without_interpreter):
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*cpu"):
        CALLS[name](normal(2, 48))
    CALLS[name](normal(2, 48))


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_triton_refuses_float64_and_otherwise_the_reference_serves(name, device):
    x = normal(2, 48).double().to(device)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*float64"):
        CALLS[name](x)
    CALLS[name](x)


MIXED_CALLS = {
    "add_norm": lambda x, y: ops.add_norm(x, y, x[0], None, 1e-6),
    "swiglu": lambda x, y: ops.swiglu(x, y),
    "swiglu-biases": lambda x, y: ops.swiglu(x, y, x[0], y[0]),
}
MIXED_REFERENCES = {
    "add_norm": lambda x, y: reference.add_norm(x, y, x[0], None, 1e-6),
    "swiglu": lambda x, y: (reference.swiglu(x, y),),
    "swiglu-biases": lambda x, y: (reference.swiglu(x, y, x[0], y[0]),),
}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("name", MIXED_CALLS)
def test_a_forced_triton_refuses_mixed_dtypes_and_otherwise_the_reference_serves(name, dtypes, device):
    x, y = (normal(2, 48, seed=seed).to(device, dtype) for seed, dtype in enumerate(dtypes))
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*one dtype"):
        MIXED_CALLS[name](x, y)
    ours = MIXED_CALLS[name](x, y)
    ours = ours if isinstance(ours, tuple) else (ours,)
    for mine, theirs in zip(ours, MIXED_REFERENCES[name](x, y), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_forced_triton_refuses_to_resize_without_tables_and_otherwise_the_reference_serves(device):
    frames = noise(1, 1, 40, 30)[0].to(device)
    how = _how(frames)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"triton.*tables"):
        ops.frames_to_patches(frames, 28, 28, None, *how, resample_backend=ops.PILLOW)
    for library in (ops.PILLOW, ops.TORCHVISION):
        ours = ops.frames_to_patches(frames, 28, 28, None, *how, resample_backend=library)
        assert torch.equal(ours, reference.frames_to_patches(frames, 28, 28, None, *how, resample_backend=library))


def test_the_fallback_on_a_gpu_is_logged_once(without_triton, caplog):
    with caplog.at_level(logging.WARNING, logger="qwen_batched"):
        for _ in range(3):
            assert not backend.has_kernels(torch.device("cuda"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Triton" in caplog.text


def test_a_cpu_has_nothing_to_log(without_triton, caplog):
    for call in CALLS.values():
        call(normal(2, 48))
    with ops.use_backend("reference"):
        assert not backend.has_kernels(torch.device("cuda"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "cuda", "serves"),
    [((7, 5), "12.8", False), ((8, 0), "12.8", True), ((9, 0), "12.8", True), ((7, 5), None, True)],
    ids=str,
)
def test_kernels_run_on_gpus_that_triton_supports(capability, cuda, serves, without_interpreter, caplog, monkeypatch):
    """A build of PyTorch without CUDA is ROCm's, whose capabilities are other numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gpu = torch.device("cuda")
    assert backend.has_kernels(gpu) == serves
    assert len(caplog.records) == (0 if serves else 1)
    with ops.use_backend("triton"):
        if serves:
            assert backend.has_kernels(gpu)
        else:
            with pytest.raises(RuntimeError, match=r"triton.*\(8, 0\).*\(7, 5\)"):
                backend.has_kernels(gpu)


@pytest.mark.gpu
def test_operations_on_a_gpu_without_triton_equal_the_kernels(forgetful, monkeypatch):
    inputs = everything_inputs("cuda")
    with_kernels = everything(*inputs)
    backend._obstacle.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(OPERATOR, "kernel", lambda *args: pytest.fail("a kernel ran"))
    for ours, theirs in zip(with_kernels, everything(*inputs), strict=True):
        assert_equal_to(ours, theirs, 1e-4)


def test_float64_keeps_its_precision(device):
    """`reference` computes in float64 there; a kernel that cannot must not be chosen."""
    x, y, weight = (normal(5, 90, seed=seed).double().to(device) for seed in (0, 1, 2))
    segments = Segments.of((Run(0, 1, 5),), torch.device(device))
    cos, sin = (table.double() for table in rope_tables(5, 30, device))
    qkv = torch.stack([x.repeat(1, 2)])
    ours = [
        ops.swiglu(x, y),
        ops.swiglu(x, y, weight[0], weight[1]),
        *ops.add_norm(x, y, weight[0], None, 1e-6),
        *ops.add_norm(x, None, weight[0], None, 1e-6),
        ops.rotary_attention(qkv, cos, sin, segments, 2),
    ]
    theirs = [
        reference.swiglu(x, y),
        reference.swiglu(x, y, weight[0], weight[1]),
        *reference.add_norm(x, y, weight[0], None, 1e-6),
        *reference.add_norm(x, None, weight[0], None, 1e-6),
        reference.rotary_attention(qkv, cos, sin, segments, 2),
    ]
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float64
        assert_equal_to(mine, expected, 1e-12)


# --- large grids ---

MAX_GRID_Y = 65535  # of CUDA, and of a grid's third side; its first goes to 2**31 - 1
MANY = 70_000


def large_launches(device):
    """A launch of each kernel over more rows, windows or cells than the second side of a grid may have."""
    dtype = torch.float32
    x, qkv = torch.zeros(MANY, 4, device=device), torch.zeros(MANY, 1, 12, device=device)
    cos = sin = torch.zeros(1, 2, device=device)
    segments = Segments.of((Run(0, 1, 1),), torch.device(device))
    frames = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device).expand(MANY, -1, -1, -1)
    axis = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, 1, device=device)
    how = (1.0, MEAN.to(device), STD.to(device), torch.zeros(1, dtype=torch.int64, device=device), 1, 1, 1, dtype)
    return {
        "add_norm": lambda: kernels_of("add_norm").add_norm(x, x, x[0], None, 1e-6)[0],
        "swiglu": lambda: kernels_of("swiglu").swiglu(x, x),
        "rotary": lambda: kernels_of("rotary").rotary(qkv, cos, sin, 1),
        "rotary_attention": lambda: kernels_of("rotary_attention").rotary_attention(qkv, cos, sin, segments, 1),
        "frames_to_patches": lambda: kernels_of("frames_to_patches").frames_to_patches(
            frames, 1, 1, (*axis, *axis), *how, ops.PILLOW
        ),
    }


LARGE_LAUNCHES = list(large_launches("cpu"))


class Recorder:
    """Stands for a kernel and remembers the grids it was to be launched on."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.mark.parametrize("name", LARGE_LAUNCHES)
def test_what_grows_with_the_input_is_the_first_side_of_a_grid(name, monkeypatch):
    module = importlib.import_module(f"qwen_batched.ops.triton.{name}")
    recorder = Recorder()
    for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, kernel, recorder)
    large_launches("cpu")[name]()
    assert len(recorder.grids) == (2 if name == "frames_to_patches" else 1)
    for grid in recorder.grids:
        assert grid[0] > MAX_GRID_Y
        assert all(side == 1 for side in grid[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE_LAUNCHES)
def test_kernels_run_on_large_grids(name):
    """Every row is the same; memory that was not written is NaN."""
    out = large_launches("cuda")[name]()
    assert out.shape[0] == MANY
    assert out.isfinite().all()
    assert (out == out[:1]).all()

"""Kernels inside packages for a GPU: the windows' attention, and nothing where a kernel does not fit."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qwen_batched import ops
from qwen_batched.export import engine, export, load_engine
from qwen_batched.export.tracing import Part
from qwen_batched.model.vision import VisionAttention
from qwen_batched.ops import reference
from qwen_batched.ops.segments import Run, Segments
from qwen_batched.runtime import backend
from tests.processes import ROOT
from tests.support import FLOAT32_TOLERANCE, assert_equal_to, photos, relative_error

pytest.importorskip("triton", reason="needs Triton")
WINDOWS, WHOLE = "qwen_batched.window_attention.default", "aten.scaled_dot_product_attention.default"


def test_a_program_has_the_kernel_where_there_are_windows(sisters):
    models = [sisters(preset) for preset in ("tiny", "qwen2-vl-tiny")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.export.traced", *[str(sister.folder) for sister in models]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, sister in zip(done.stdout.splitlines(), models, strict=True):
        said, config = json.loads(line), sister.model.config.vision
        attention = [name for name in said["after"] if name.startswith("qwen_batched.") or name == WHOLE]
        is_whole = [config.window_size is None or i in config.fullatt_block_indexes for i in range(config.depth)]
        assert attention == [WHOLE if whole else WINDOWS for whole in is_whole]
        assert not any(name.startswith("qwen_batched.") for name in said["before"])
        assert not said["live_model_is_changed"]


@pytest.mark.parametrize(
    ("capability", "chosen", "has"),
    [((7, 5), "auto", False), ((8, 0), "auto", True), ((9, 0), "auto", True), ((9, 0), "reference", False)],
    ids=str,
)
def test_a_package_has_the_kernel_where_the_live_model_has_kernels(
    capability, chosen, has, live, tmp_path, monkeypatch
):
    """None on GPUs that Triton does not support, and where who exports chose the reference."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda program, **_: None)
    traced = []
    monkeypatch.setattr(engine, "trace", lambda part: traced.append(part.program))
    with FakeTensorMode():
        frames = torch.ones(2, device="cuda")
    backend._obstacle.cache_clear()
    try:
        with ops.use_backend(chosen):
            engine.write(Part(live("tiny").visual, {"frames": frames}, {}, ()), tmp_path / "vision.pt2")
    finally:
        backend._obstacle.cache_clear()
    attention = [module.attend for module in traced[0].modules() if isinstance(module, VisionAttention)]
    assert attention and {each is ops.inlined_rotary_attention for each in attention} == {has}


@pytest.mark.parametrize(("length", "heads", "size"), [(16, 2, 16), (40, 3, 24), (65, 2, 16), (16, 1, 160)])
def test_attention_is_that_of_the_reference_whether_the_kernel_takes_it_or_not(length, heads, size):
    torch.manual_seed(length)
    tokens = 2 * length + 5
    qkv, angles = torch.randn(2, tokens, 3 * heads * size), 3 * torch.rand(tokens, size // 2)
    segments = Segments.of((Run(0, 2, length), Run(2 * length, 1, 5)), torch.device("cpu"))
    arguments = qkv, angles.cos(), angles.sin(), segments, heads
    assert_equal_to(ops.inlined_rotary_attention(*arguments), reference.rotary_attention(*arguments), FLOAT32_TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_package_on_a_gpu_runs_the_kernel(tmp_path, dtype):
    """Frames of the model's own size, which both sides normalise to the same pixels; windows cut at the border."""
    from tests.sisters import Sister

    sister = Sister("tiny", tmp_path / "checkpoint", "cuda")
    model = sister.load(dtype=dtype).requires_grad_(False)
    manifest = export(model, tmp_path / "out", "engine", (112, 140), cameras=2, batch=(1, 4), parts=["vision"])
    with zipfile.ZipFile(tmp_path / "out" / "vision.pt2") as package:
        assert any(b"window_attention_kernel" in package.read(name) for name in package.namelist())
    allowed = manifest["deviation"]["vision"]["bound"] * (1 if dtype == "float32" else 2)  # of two that are so far off
    vision = load_engine(tmp_path / "out", "vision", for_graphs=True)
    for batch in (1, 3, 4):
        frames = photos(batch, 2, 112, 140, seed=batch).cuda()
        (features,) = vision({"frames": frames})
        expected = model.encode_images(frames, resize=None).flatten(2, 3)
        assert features.shape == expected.shape and features.isfinite().all()
        assert relative_error(features.float(), expected.float()) <= allowed
        assert torch.equal(vision({"frames": frames})[0], features)

"""Compiled packages give what the live model gives, in Python and in a C++ program that has none."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from qwen_batched.export import export, load_engine
from qwen_batched.export.engine import open_package, write
from qwen_batched.export.programs import rope_positions
from qwen_batched.export.tracing import Part
from tests.export.conftest import load
from tests.processes import ROOT
from tests.support import photos, relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]
COMPILED = 2e-6  # relative L2 from the live model
TEXT = "Pick up the red block."


@pytest.fixture(scope="module")
def engine(sisters, made_once):
    """A tiny model of two decoder blocks and its packages, for two cameras of 40 x 60 pixels, resized. Read only."""

    def write(folder):
        parts = ["vision", "cached_decoder"]
        return export(load(sisters("tiny"), num_layers=2), folder, "engine", "40x60:56x84", cameras=2, parts=parts)

    return load(sisters("tiny"), num_layers=2), *made_once("engine", write)


@pytest.fixture(scope="module")
def runner(made_once):
    """The program of examples/cpp."""
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")

    def write(build):
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        for command in (["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, prefix], ["cmake", "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return made_once("runner", write)[0] / "runner"


def write_ppm(path, frame):
    height, width = frame.shape[1:]
    path.write_bytes(f"P6\n{width} {height}\n255\n".encode() + frame.permute(1, 2, 0).contiguous().numpy().tobytes())


def run(runner, *words):
    environment = {**os.environ, "RUNNER_MAPS": "1"}
    return subprocess.run([runner, *map(str, words)], capture_output=True, text=True, env=environment, timeout=120)


def test_packages_serve_every_batch(engine):
    model, folder, manifest = engine
    assert all(each["measured"] <= COMPILED for each in manifest["deviation"].values())
    vision, decoder = load_engine(folder, "vision"), load_engine(folder, "cached_decoder")
    for batch in (1, 3, 8):
        frames = photos(batch, 2, 40, 60, seed=batch)
        (features,) = vision({"frames": frames})
        assert relative_error(features, model.encode_images(frames, resize=(56, 84)).flatten(2, 3)) <= COMPILED
        live = model(None, [TEXT] * batch, logits="all", layers=(-1,), image_features=None)
        ids, mask = live.input_ids, live.attention_mask
        text = model.model.config
        past = torch.zeros(text.num_hidden_layers, batch, 0, text.num_key_value_heads, text.head_dim)
        embeds = torch.zeros(*ids.shape, text.hidden_size)
        arguments = {"input_ids": ids, "attention_mask": mask.long()}
        arguments |= {"position_ids": rope_positions(ids < 0, mask, (2, 3)), "image_embeds": embeds}
        logits, *_ = decoder({**arguments, "past_keys": past, "past_values": past})
        assert relative_error(logits, live.logits) <= COMPILED


def test_a_package_is_given_only_what_it_takes(engine):
    """It would read past the end of what is too small, and give plausible features of it."""
    _, folder, manifest = engine
    vision, decoder = load_engine(folder, "vision"), load_engine(folder, "cached_decoder")
    frames = photos(1, 2, 40, 60)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(frames)
    for wrong, words in (
        ({}, "arguments must be frames, got none"),
        ({"frames": frames, "more": frames}, "arguments must be frames"),
        ({"frames": frames[:, :1]}, r"got \(1, 1, 3, 40, 60\)"),
        ({"frames": frames[..., :28]}, r"here \(1, 2, 3, 40, 60\)"),
        ({"frames": frames.transpose(3, 4)}, "frames must be"),
        ({"frames": frames[0]}, "frames must be"),
        ({"frames": frames.float()}, "must be a tensor of uint8 on cpu, got torch.float32"),
        ({"frames": frames.numpy()}, "got ndarray"),
        ({"frames": frames.expand(9, -1, -1, -1, -1)}, "of 1 to 8 samples, got 9"),
        ({"frames": frames[:0]}, "of 1 to 8 samples, got 0"),
        ({"frames": frames.to_sparse()}, "must be a dense tensor with values, got Tensor of torch.sparse_coo"),
        ({"frames": fake}, "must be a dense tensor with values, got FakeTensor"),
    ):
        with pytest.raises(ValueError, match=words):
            vision(wrong)
    turned = frames.permute(0, 1, 2, 4, 3).contiguous().permute(0, 1, 2, 4, 3)  # the same, otherwise in memory
    assert torch.equal(vision({"frames": turned})[0], vision({"frames": frames})[0])
    sizes = {"batch": 2, "tokens": 3, "past": 4}
    good = {}
    for name, like in manifest["arguments"]["cached_decoder"].items():
        shape = [x if isinstance(x, int) else sum(sizes[part] for part in x.split(" + ")) for x in like["shape"]]
        good[name] = torch.ones(shape, dtype=getattr(torch, like["dtype"]))
    expected = decoder(good)
    reordered = decoder(dict(reversed(good.items())))
    assert all(torch.equal(x, y) for x, y in zip(reordered, expected, strict=True))
    minus = {**good, "past_keys": torch._neg_view(-good["past_keys"])}  # the same, with signs yet to be turned
    assert all(torch.equal(x, y) for x, y in zip(decoder(minus), expected, strict=True))
    for unknown in (-1, manifest["vocabulary_size"]):  # which would end the process
        ids = good["input_ids"].clone()
        ids[1, 2] = unknown
        with pytest.raises(ValueError, match=f"input_ids must be from 0 to {manifest['vocabulary_size'] - 1}, got"):
            decoder({**good, "input_ids": ids})
    for name in good:
        for dim in range(good[name].ndim):
            with pytest.raises(ValueError, match="must be"):
                decoder({**good, name: good[name].narrow(dim, 0, good[name].shape[dim] - 1)})


@pytest.mark.parametrize("harm", ["cut", "empty", "no zip", "another zip", "missing"])
def test_a_file_that_is_no_package_is_refused(engine, tmp_path, harm):
    """In a process of its own it would end it, with some versions of PyTorch."""
    whole, path = engine[1] / "vision.pt2", tmp_path / "vision.pt2"
    shutil.copyfile(engine[1] / "manifest.json", tmp_path / "manifest.json")
    if harm == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "nothing")
    elif harm != "missing":
        content = whole.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "no zip": b"nothing"}[harm])
    with pytest.raises(ValueError, match=r"vision\.pt2 must be a package"):
        load_engine(tmp_path, "vision")


def test_a_package_loads_where_there_is_no_compiler(engine, tmp_path):
    """PyTorch's own function compiles programs to see what the CPU can do, and warns where it cannot."""
    _, folder, manifest = engine
    shape = manifest["arguments"]["vision"]["frames"]["shape"][1:]
    program = (
        "import sys, torch; from qwen_batched.export import load_engine; "
        f"print(load_engine(sys.argv[1], 'vision')({{'frames': torch.zeros(2, *{shape}, dtype=torch.uint8)}})[0].shape)"
    )
    shared = tmp_path / "shared"
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(shared)}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith("torch.Size([2, 2, 6, ")
    assert not [*shared.rglob("*")]


def test_the_runner_has_no_python_and_gives_features_and_tokens(engine, runner, tmp_path):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    model, folder, _ = engine
    frames = photos(1, 2, 40, 60)
    paths = [tmp_path / f"{camera}.ppm" for camera in range(2)]
    for path, frame in zip(paths, frames[0], strict=True):
        write_ppm(path, frame)
    done = run(runner, "features", folder, tmp_path / "features.bin", *paths)
    assert done.returncode == 0, done.stderr
    assert "libtorch" in done.stderr and "libpython" not in done.stderr
    features = torch.from_numpy(np.fromfile(tmp_path / "features.bin", np.float32)).view(2, 6, -1)
    assert relative_error(features, model.encode_images(frames, resize=(56, 84))[0].flatten(1, 2)) <= COMPILED
    ids = model.processor(frames, [TEXT], resize=(56, 84))["input_ids"][0].tolist()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))
    done = run(runner, "generate", folder, tmp_path / "ids.txt", 24, *paths)
    assert done.returncode == 0 and "libpython" not in done.stderr, done.stderr
    expected = model.generate(frames, [TEXT], resize=(56, 84), max_new_tokens=24).token_ids[0].tolist()
    assert list(map(int, done.stdout.split())) == expected


def test_the_runner_follows_the_repetition_penalty_and_the_end_tokens(engine, runner, tmp_path, monkeypatch):
    model, folder, _ = engine
    frames = photos(1, 2, 40, 60)
    paths = [tmp_path / f"{camera}.ppm" for camera in range(2)]
    for path, frame in zip(paths, frames[0], strict=True):
        write_ppm(path, frame)
    ids = model.processor(frames, [TEXT], resize=(56, 84))["input_ids"][0].tolist()
    (tmp_path / "ids.txt").write_text(" ".join(map(str, ids)))

    def both(penalty, *ends):
        changed = shutil.copytree(folder, tmp_path / f"{penalty}-{len(ends)}")
        lines = (changed / "runner.txt").read_text().splitlines()
        kept = [line for line in lines if line.split()[0] not in ("repetition_penalty", "eos_token_ids")]
        kept += [f"repetition_penalty {penalty}", f"eos_token_ids {' '.join(map(str, ends))}"]
        (changed / "runner.txt").write_text("\n".join(kept))
        done = run(runner, "generate", changed, tmp_path / "ids.txt", 24, *paths)
        assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
        monkeypatch.setattr(model.generation_config, "repetition_penalty", penalty)
        monkeypatch.setattr(model.generation_config, "eos_token_ids", ends)
        live = model.generate(frames, [TEXT], resize=(56, 84), max_new_tokens=24).token_ids[0].tolist()
        return list(map(int, done.stdout.split())), live

    absent = model.processor.config.image_token_id
    plain, live_plain = both(1.0, absent)
    penalised, live_penalised = both(1.5, absent)
    assert (plain, penalised) == (live_plain, live_penalised) and plain != penalised
    end = next(token for token in penalised[3:] if token not in penalised[:3])
    ended, live_ended = both(1.5, absent, end)
    assert ended == live_ended == penalised[: penalised.index(end) + 1]


def test_the_runner_says_what_is_wrong(engine, runner, tmp_path):
    model, folder, manifest = engine
    (tmp_path / "broken.ppm").write_bytes(b"P6\n60 40\n255\nshort")
    (tmp_path / "huge.ppm").write_bytes(b"P6\n4000000000 4000000000\n255\n")
    (tmp_path / "ids.txt").write_text("1 2 3")
    right = " ".join(map(str, model.processor(photos(1, 2, 40, 60), [TEXT], resize=(56, 84))["input_ids"][0].tolist()))
    for name, more in (("right", ""), ("words", " x"), ("above", f" {manifest['vocabulary_size']}"), ("below", " -1")):
        (tmp_path / f"{name}.txt").write_text(right + more)
    write_ppm(tmp_path / "good.ppm", photos(1, 1, 40, 60)[0, 0])
    write_ppm(tmp_path / "small.ppm", photos(1, 1, 28, 28)[0, 0])
    write_ppm(tmp_path / "turned.ppm", photos(1, 1, 60, 40)[0, 0])
    good = [tmp_path / "good.ppm"] * 2
    pixels = good[0].read_bytes().removeprefix(b"P6\n60 40\n255\n")
    (tmp_path / "lines.ppm").write_bytes(b"P6\r\n60 40\r\n255\r\n" + pixels)  # all of it would move by a byte
    for words in (
        ["nothing"],
        ["features", tmp_path, tmp_path / "out", *good],
        ["features", folder, tmp_path / "out", tmp_path / "broken.ppm", good[0]],
        ["features", folder, tmp_path / "out", good[0]],
        ["features", folder, tmp_path / "out", *good, good[0]],
        ["features", folder, tmp_path / "out", good[0], tmp_path / "small.ppm"],
        ["features", folder, tmp_path / "out", *[tmp_path / "small.ppm"] * 2],
        ["features", folder, tmp_path / "out", *[tmp_path / "turned.ppm"] * 2],
        ["generate", folder, tmp_path / "none.txt", 3, *good],
        ["generate", folder, tmp_path / "ids.txt", 3, *good],
        ["features", folder, tmp_path / "out", tmp_path / "lines.ppm", good[0]],
        ["features", folder, tmp_path / "out", tmp_path / "huge.ppm", good[0]],
        ["features", folder, tmp_path / "none" / "out", *good],
        *(["generate", folder, tmp_path / f"{name}.txt", 3, *good] for name in ("words", "above", "below")),
        *(["generate", folder, tmp_path / "right.txt", count, *good] for count in ("0", "-1", "3x", "x", "9" * 30)),
    ):
        done = run(runner, *words)
        assert done.returncode == 2 and done.stderr.startswith("runner: ") and done.stdout == "", words
        assert done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists(), words


@pytest.mark.parametrize(
    ("name", "value"), [("torch", "1 2 3"), ("device", "CPU none"), ("device", "NVIDIA H200"), ("cuda", "1")]
)
def test_the_runner_takes_no_engine_of_another_pytorch_or_device(engine, runner, tmp_path, name, value):
    changed = shutil.copytree(engine[1], tmp_path / "engine")
    lines = (changed / "runner.txt").read_text().splitlines()
    lines = [f"{name} {value}" if line.split()[0] == name else line for line in lines]
    (changed / "runner.txt").write_text("\n".join(lines))
    for camera in range(2):
        write_ppm(tmp_path / f"{camera}.ppm", photos(1, 1, 40, 60)[0, 0])
    done = run(runner, "features", changed, tmp_path / "out", tmp_path / "0.ppm", tmp_path / "1.ppm")
    assert done.returncode == 2 and done.stderr.startswith("runner: the engine was made for "), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_runner_takes_no_engine_of_another_format_nor_one_that_lacks_a_number(engine, runner, tmp_path):
    lines = (engine[1] / "runner.txt").read_text().splitlines()
    (tmp_path / "vision.pt2").write_bytes(b"nothing")  # which would be the next to be found wrong
    changes = {line: "" for line in lines} | {"frames 2 40 60": "frames 2 40", "format 2": "format 1"}
    assert changes.keys() == set(lines)
    for line, changed in changes.items():
        (tmp_path / "runner.txt").write_text("\n".join(changed if each == line else each for each in lines))
        done = run(runner, "features", tmp_path, tmp_path / "out", "none.ppm")
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done
        assert f" {line.split()[0]} " in done.stderr and done.stderr.endswith("export the engine again\n"), done.stderr


def test_a_compiler_that_links_its_own_c_library_makes_packages_that_load(tmp_path, monkeypatch):
    """Where there is no link `libstdc++.so`, packages would crash in `std::regex` when they are loaded.

    Nothing is left in the folder that PyTorch's compiler shares with others, whose files would be read half written.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    compiler = tmp_path / "static-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-shared*) set -- "$@" -static-libstdc++;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    layer, x = torch.nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4)
    part = Part(layer, {"input": x}, {}, ("output",))
    # Without vector instructions, of which a compiler that it does not know is asked for seconds what it can.
    settings = {"cpp.cxx": (str(compiler),), "cpp.vec_isa_ok": False, "fx_graph_cache": False}
    with torch._inductor.config.patch(settings):
        write(part, tmp_path / "layer.pt2")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "shared")
    assert not [*(tmp_path / "shared").rglob("*.wrapper*")]
    (found,) = open_package(tmp_path / "layer.pt2")({"input": x})
    assert relative_error(found, layer(x)) <= COMPILED


def test_a_package_has_the_threads_of_who_runs_it(tmp_path):
    """Not the exporter's, for which a forked process, as a worker of a data loader, would wait."""

    class Waves(torch.nn.Module):
        def forward(self, x):
            return x.sin() + x.cos() * x

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        write(Part(Waves(), {"x": torch.randn(64, 4096)}, {}, ("output",)), tmp_path / "waves.pt2")
    finally:
        torch.set_num_threads(threads)
    program = (
        "import multiprocessing, sys, torch; from qwen_batched.export.engine import open_package; "
        "run, x = open_package(sys.argv[1]), torch.randn(64, 4096); torch.set_num_threads(2); run({'x': x})\n"
        "def work():\n    torch.set_num_threads(1)\n    run({'x': x})\n"
        "worker = multiprocessing.get_context('fork').Process(target=work); worker.start(); worker.join(60)\n"
        "print(worker.exitcode); worker.kill()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "waves.pt2")]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.stdout == "0\n", done.stdout + done.stderr


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_compilation_that_fails_leaves_no_copy_of_the_weights(tmp_path, monkeypatch, caplog, error):
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(error):
        write(Part(Fails(), {"x": torch.ones(2)}, {}, ("output",)), tmp_path / "fails.pt2")
    assert list(tmp_path.iterdir()) == [] and "kept" not in caplog.text


def test_a_full_disk_is_an_error_and_does_not_end_the_process(tmp_path, monkeypatch):
    """PyTorch's writer of archives, here without a compilation before it, would end it."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(
        "torch._inductor.aoti_compile_and_package",
        lambda program, package_path, **_: torch.save(torch.ones(2**16), package_path),
    )
    (tmp_path / "layer.pt2").symlink_to("/dev/full")
    part = Part(torch.nn.Linear(4, 4).requires_grad_(False), {"input": torch.ones(2, 4)}, {}, ("output",))
    with pytest.raises(OSError, match=r"No space left on device: '.*layer\.pt2'"):
        write(part, tmp_path / "layer.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_not_unpacked_where_there_is_no_room_for_it(engine, tmp_path, monkeypatch):
    """PyTorch's loader would leave there what it had written before."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with zipfile.ZipFile(engine[1] / "vision.pt2") as archive:
        size = sum(each.file_size for each in archive.infolist())
    usage = SimpleNamespace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=f"{tmp_path} must have .* GiB free, got "):
        load_engine(engine[1], "vision")
    assert list(tmp_path.iterdir()) == []
    usage.free = size
    load_engine(engine[1], "vision")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_the_live_model(sisters, tmp_path, dtype):
    model = load(sisters("tiny"), num_layers=1, dtype=dtype)
    part = "cached_decoder" if dtype == "bfloat16" else "decoder"  # tests/test_benchmarks.py has vision
    found = export(model, tmp_path / "out", "engine", "40x60:56x84", parts=[part])["deviation"]
    for each in found.values():
        assert each["measured_from"] == "float32" and 1e-5 < each["measured"] <= each["bound"] < 2e-2

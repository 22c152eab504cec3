"""The benchmarks run from end to end on tiny shapes, and measure what they say. Nothing here looks at a time."""

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.processes import ROOT, run_python
from tests.support import FLOAT32_TOLERANCE, assert_equal_to, photos

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module from beside the scripts, as the scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run_smoke(script, *options):
    done = run_python(BENCHMARKS / f"{script}.py", "--smoke", *options, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where runs of the whole model keep their checkpoint."""
    return ("--keep-checkpoint", str(tmp_path_factory.mktemp("checkpoints") / "kept"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vision", "whole_call", "policies", "every_call", "engine"])
def test_a_smoke_run_finds_right_results_and_claims_nothing(script, kept, tmp_path):
    options = {"whole_call": kept}.get(script, ())
    if script == "engine":  # of few blocks, since compiling takes seconds for each
        blocks = {"depth": 2, "fullatt_block_indexes": [1]}
        options = ("--works", "loop", "--model", write_checkpoint(tmp_path, vision=blocks, dtype=torch.bfloat16))
    report = run_smoke(script, *options)
    assert report["benchmark"] == script
    assert report["smoke"] and report["wrong"] == [] and report["goals"] == []


@pytest.mark.slow
def test_exports_are_measured_by_what_they_say_and_by_the_memory_they_take():
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    report = run_smoke("export", "deviation", "--targets", "onnx", "--parts", "vision")
    assert 0 < report["onnx 56x84"]["vision"] < 2e-6 and report["wrong"] == report["goals"] == []
    report = run_smoke("export", "memory")
    assert 2**28 < report["peak_bytes"] < 2**33 and report["wrong"] == report["goals"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("vision", ("--preset", "qwen2-vl-tiny")),
        ("whole_call", ("--preset", "qwen3-vl-tiny", "--num-layers", "2", "--norm", "pre")),
        ("generation", ("--preset", "qwen3-vl-tiny")),
        ("training", ("--preset", "qwen3-vl-tiny")),
        ("floors", ("--preset", "qwen3-vl-tiny", "--num-layers", "3")),
        ("batches", ("--preset", "qwen3-vl-tiny")),
    ],
    ids=str,
)
def test_a_smoke_run_of_another_family_finds_right_results(script, options):
    report = run_smoke(script, *options)
    assert report["preset"] == options[1] and report["wrong"] == report["goals"] == []


@pytest.mark.parametrize("preset", ["qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_the_floor_of_a_tower_has_all_its_matrices(tmp_path, preset, benchmark_module):
    visual = QwenBatchedVL.from_pretrained(write_checkpoint(tmp_path, preset), device="cpu").visual
    shapes = benchmark_module("peers")._product_shapes(visual.config)
    block = sum(rows * columns for rows, columns in shapes.pop("block"))
    found = block * visual.config.depth + sum(rows * columns for part in shapes.values() for rows, columns in part)
    matrices = {name: x.numel() for name, x in visual.named_parameters() if x.ndim > 1}
    assert found == sum(matrices.values()) - matrices.get("pos_embed.weight", 0)


def varlen_attention(q, k, v, bounds, *_, scale):
    """In place of the kernel, which needs a GPU: (tokens, heads, head size), each sequence by itself."""
    parts = zip(*(x.split(bounds.diff().tolist()) for x in (q, k, v)), strict=True)
    outs = [
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), scale=scale).transpose(
            0, 1
        )
        for part in parts
    ]
    return torch.cat(outs)


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__).release < (5,), reason="geometry is an argument since 5")
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
@torch.no_grad()
def test_the_varlen_tower_and_its_geometry_are_transformers(sisters, device, preset, benchmark_module, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attention)
    peers, sister = benchmark_module("peers"), sisters(preset)
    config, factor = sister.model.config.vision, sister.factor
    work = benchmark_module("measure").Work(2, 1, (5 * factor, 3 * factor))
    (inputs,) = peers.random_inputs(config, work, torch.empty(0, device=device), 1)
    expected = peers.default_tower(sister.reference.visual)(inputs)
    assert len(expected) == 1 + len(config.deepstack_visual_indexes or ())
    tower = peers.with_varlen_attention(sister.reference.visual)
    for arguments in ({}, dict(inputs.geometry)):  # made by the tower, and beforehand
        found = peers._features(tower(inputs.pixels, grid_thw=inputs.grid, **arguments))
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal_to(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__).release < (5,), reason="geometry is an argument since 5")
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
@torch.no_grad()
def test_the_compiled_peer_is_the_whole_model(sisters, device, preset, benchmark_module, monkeypatch):
    """Compiled or not: what is compiled is put together from both networks, deep features included."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    whole_peers, sister = benchmark_module("whole_peers"), sisters(preset)
    reference, frames = sister.load_reference(), sister.photos(2, 2, 2, 3).to(device)
    prompts = whole_peers.Prompts.of(
        sister.model.processor(frames, ["up", "up"], device=device), sister.model.config.vision
    )
    pixels = whole_peers.processed(reference, frames, tuple(frames.shape[-2:]))
    run, _, error = whole_peers.compiled_model(reference, reference.visual, prompts, pixels)
    assert error <= FLOAT32_TOLERANCE
    ours = sister.model(frames, ["up", "up"], cuda_graph=False).last_hidden_state
    assert_equal_to(run(pixels), ours)


def test_frames_become_multiples_of_a_cell(benchmark_module):
    fit, work = benchmark_module("runs").fit, benchmark_module("measure").Work
    assert fit(((476, 644), (10, 224)), 32) == ((480, 640), (32, 224))
    assert fit(work(2, 3, (252, 308)), 32) == work(2, 3, (256, 320))
    assert fit((252, 308), 28) == (252, 308)


@pytest.mark.slow
def test_a_quick_run_takes_the_kept_checkpoint_and_leaves_transformers_out(kept):
    times = [run_smoke("generation", "--quick", *kept)["step"]["1"] for _ in range(1 if Path(kept[1]).exists() else 2)]
    assert all("ours" in each and "default" not in each for each in times)
    assert [path.name for path in Path(kept[1]).parent.iterdir()] == ["kept"]


@pytest.mark.parametrize("tokens", [1, 2, 40, 200])
def test_a_text_has_the_tokens_that_were_asked_for(load, tokens, benchmark_module):
    prompts = load().processor.prompts
    text = benchmark_module("runs").text_of(prompts, tokens, seed=tokens)
    assert len(prompts.encode(text, "plain", 0)) == tokens


def test_transformers_is_given_the_same_work(load, checkpoint, benchmark_module):
    """In float32, the benchmarks' calls of transformers give our hidden states and our tokens."""
    whole_peers = benchmark_module("whole_peers")
    reference, model = TransformersReference.from_pretrained(checkpoint), load()
    frames = photos(2, 2, 56, 84)
    texts = [benchmark_module("runs").text_of(model.processor.prompts, 7, seed) for seed in range(2)]
    batch = model.processor(frames, texts, resize=None)
    with torch.no_grad():
        prompts = whole_peers.Prompts.of(batch, model.config.vision)
        theirs = whole_peers.from_frames(reference, reference.visual, prompts, (56, 84))(frames)
        ours = model(frames, texts, resize=None).last_hidden_state
        assert (ours - theirs).norm() <= FLOAT32_TOLERANCE * theirs.norm()
        tokens = whole_peers.generation(reference, prompts, whole_peers.processed(reference, frames, (56, 84)))(5)
    assert torch.equal(torch.stack(model.generate(frames, texts, max_new_tokens=5, resize=None).token_ids), tokens)


def test_prompts_with_padding_are_refused(load, benchmark_module):
    model = load()
    batch = model.processor(photos(2, 1, 56, 56), ["up", "up and up"], resize=None)
    with pytest.raises(ValueError, match="one length"):
        benchmark_module("whole_peers").Prompts.of(batch, model.config.vision)


def test_waits_are_counted_while_the_calls_run_and_copies_to_the_host_always(benchmark_module):
    waits = benchmark_module("waits")

    def event(kind, name, ts, dur=1):
        return {"cat": kind, "name": name, "ts": ts, "dur": dur}

    events = [
        {"name": "process_name", "ph": "M"},
        event("user_annotation", waits.COUNTED, 10, 10),
        event("gpu_user_annotation", waits.COUNTED, 12, 30),
        event("cuda_runtime", "cudaLaunchKernel", 11),
        event("cuda_runtime", "cudaStreamSynchronize", 12),
        event("cuda_runtime", "cudaDeviceSynchronize", 25),  # the profiler's own, after the calls
        event("cuda_driver", "cuEventSynchronize", 19),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 40),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 13),
    ]
    found = waits.waits_in(events)
    assert found == {"cudaStreamSynchronize": 1, "cuEventSynchronize": 1, "Memcpy DtoH (Device -> Pinned)": 1}
    assert waits.traced_waits(lambda: torch.ones(3).sum(), torch.device("cpu")) == {}


def test_a_shape_without_a_graph_counts_as_a_wait(benchmark_module):
    with pytest.raises(RuntimeError, match="no CUDA graph"), benchmark_module("waits").waits_raise(torch.device("cpu")):
        warnings.warn("no CUDA graph for this shape", RuntimeWarning, stacklevel=1)

"""The benchmarks run from end to end on tiny shapes, and measure what they say. Nothing here looks at a time."""

import importlib
import json
import warnings
from pathlib import Path

import pytest
import torch

from qwen_batched.transformers_reference import TransformersReference
from tests.processes import ROOT, run_python
from tests.support import FLOAT32_TOLERANCE, photos

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
@pytest.mark.parametrize("script", ["vision", "training", "whole_call", "generation"])
def test_a_smoke_run_finds_right_results_and_claims_nothing(script, kept):
    report = run_smoke(script, *(kept if script in ("whole_call", "generation") else ()))
    assert report["benchmark"] == script
    assert report["smoke"] and report["wrong"] == [] and report["goals"] == []


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

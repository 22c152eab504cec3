"""`python -m qwen_batched.profile`: its numbers belong together, its floor counts what the model computes."""

import json
import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen_batched import QwenBatchedVL, ops
from qwen_batched import profile as tool
from qwen_batched.testing import write_checkpoint
from tests.support import noise

QUICK = ("--device", "cpu", "--calls", "4", "--hz", "1000", "--tflops", "2", "--gbps", "50", "--size", "56")
NETWORKS = (tool.VISION, tool.DECODER)


@pytest.fixture(scope="module")
def on_cpu(load):
    return load(device="cpu").requires_grad_(False)


def quick(model, **options):
    return tool.profile(model, size=(56, 84), calls=4, hz=1000.0, tflops=2.0, gbps=50.0, **options)


@pytest.mark.parametrize(
    ("batch", "cameras", "size"), [(1, 1, (28, 28)), (2, 1, (56, 308)), (3, 2, (140, 84)), (1, 3, (252, 252))]
)
def test_the_floor_counts_the_products_of_the_linear_layers(on_cpu, batch, cameras, size):
    assert_floor_counts_products(on_cpu, batch, cameras, size)


@pytest.mark.parametrize(("preset", "size"), [("qwen2-vl-tiny", (84, 140)), ("qwen3-vl-tiny", (96, 160))])
def test_the_floor_of_a_sister_family_counts_its_products_and_weights(tmp_path, preset, size):
    model = QwenBatchedVL.from_pretrained(write_checkpoint(tmp_path, preset), device="cpu").requires_grad_(False)
    assert_floor_counts_products(model, 2, 2, size)
    assert_floor_counts_weights(model)


def assert_floor_counts_products(model, batch, cameras, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(noise(batch, cameras, *size), ["pick it up"] * batch, resize=None)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(flop for operator, flop in counts.items() if "attention" not in str(operator))
    cells, tokens = out.image_features.shape[:-1].numel(), out.attention_mask.numel()
    floors = tool.stage_floors(model.config, cells, tokens, 4, tflops=1.0, gbps=1.0)
    assert round(sum(gflop for gflop, *_ in floors.values()) * 1e9) == counted


def test_the_floor_counts_the_weights_of_the_linear_layers(on_cpu):
    assert_floor_counts_weights(on_cpu)


def assert_floor_counts_weights(model):
    floors = tool.stage_floors(model.config, 4, 10, 4, tflops=2.0, gbps=50.0)
    for stage, network in zip(NETWORKS, (model.visual, model.model.layers), strict=True):
        weights = {name: weight for name, weight in network.named_parameters() if weight.ndim > 1}
        matrices = sum(weight.numel() for name, weight in weights.items() if not name.startswith("pos_embed"))
        gflop, product_ms, weight_gb, weight_ms = floors[stage]
        assert weight_gb == pytest.approx(4 * matrices / 1e9)
        assert weight_ms == pytest.approx(4 * matrices / 50e9 * 1e3)
        assert product_ms == pytest.approx(gflop * 1e9 / 2e12 * 1e3)


class Clock:
    """Stands in for `time`, and moves only while somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_the_stages_cover_the_call(load, monkeypatch):
    model, slept = load(device="cpu"), {tool.VISION: 0.03, tool.DECODER: 0.02, tool.PIXELS: 0.01, tool.PLACING: 0.015}
    clock = Clock()
    monkeypatch.setattr(tool, "time", clock)

    def slowed(function, stage):
        return lambda *args, **keywords: (clock.sleep(slept[stage]), function(*args, **keywords))[1]

    model.visual.forward = slowed(model.visual.forward, tool.VISION)
    model.model.forward = slowed(model.model.forward, tool.DECODER)
    embed = model.model.embed_tokens
    embed.forward = slowed(embed.forward, tool.PLACING)
    monkeypatch.setattr(ops, "frames_to_patches", slowed(ops.frames_to_patches, tool.PIXELS))
    found = quick(model)
    assert [stage.name for stage in found.stages] == list(tool.STAGES)
    assert sum(stage.share for stage in found.stages) == pytest.approx(1)
    for stage in found.stages:
        assert stage.ms == pytest.approx(slept[stage.name] * 1e3)
    assert found.eager_ms == pytest.approx(75)
    assert found.back_to_back.p50 == pytest.approx(75)
    assert min(found.first_calls) == pytest.approx(75)


def test_a_profile_leaves_the_model_as_it_was(on_cpu):
    before = dict(on_cpu.visual._forward_pre_hooks), dict(on_cpu.model._forward_pre_hooks)
    with torch.no_grad():
        expected = on_cpu(noise(1, 1, 56, 56), ["stop"]).last_hidden_state
        quick(on_cpu)
        assert torch.equal(on_cpu(noise(1, 1, 56, 56), ["stop"]).last_hidden_state, expected)
    assert before == (dict(on_cpu.visual._forward_pre_hooks), dict(on_cpu.model._forward_pre_hooks))
    assert torch.is_inference_mode_enabled() is False


def test_percentiles_are_ordered():
    latency = tool.Latency.of([5.0, 1.0, 2.0, 9.0, 3.0])
    assert latency.p50 == 3
    assert latency.p50 <= latency.p90 <= latency.p99 <= latency.worst == 9


def test_ticks_that_a_call_misses_are_counted():
    cpu = torch.device("cpu")
    assert tool._paced(lambda: time.sleep(0.025), cpu, 4, 100.0)[1] >= 4
    started = time.perf_counter()
    assert tool._paced(lambda: None, cpu, 4, 20.0)[0].p50 < 50
    assert time.perf_counter() - started >= 0.2


@pytest.mark.parametrize("tokens", [1, 7, 40, 200])
def test_a_text_has_the_tokens_that_were_asked_for(on_cpu, tokens):
    prompts = on_cpu.processor.prompts
    assert len(prompts.encode(tool._text_of(prompts, tokens), "plain", 0)) == tokens


def test_a_trace_gives_kernels_copies_and_gaps():
    def event(kind, start, duration):
        return {"cat": kind, "ts": start, "dur": duration}

    events = [event("kernel", 100, 50), event("kernel", 120, 10), event("kernel", 170, 30), event("gpu_memcpy", 0, 90)]
    found = tool.work_in_trace([*events, event("cuda_runtime", 0, 1000), {"ph": "M"}])
    assert found == tool.DeviceWork(kernels=3, copies=1, kernel_ms=0.09, gap_ms=0.03)
    assert tool.work_in_trace([event("gpu_memcpy", 0, 90)]) is None


@pytest.mark.slow
def test_the_command_prints_what_it_writes(checkpoint, tmp_path, capsys):
    report = tmp_path / "profile.json"
    options = ("--batch", "2", "--cameras", "1", "--resize", "84x56", "--layers", "2", "--text-tokens", "5")
    assert tool.main([*QUICK, *options, "--model", str(checkpoint), "--json", str(report)]) == 0
    printed, found = capsys.readouterr().out, json.loads(report.read_text())
    assert found["call"]["blocks"] == 2
    assert found["call"]["text tokens"] == 5
    assert found["call"]["grid"] == [3, 2]
    for latency in (found["back_to_back"], found["paced"]):
        assert latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["worst"]
        assert all(f"{value:.3f}" in printed for value in latency.values())
    for stage in found["stages"]:
        row = re.search(rf"^{stage['name']} .*$", printed, re.MULTILINE)[0]
        assert f"{stage['ms']:.3f}" in row
        assert f"{stage['share']:.1%}" in row
        assert f"{stage['gflop']:.3f}" in row
    numbers = (*found["first_calls"], found["eager_ms"], found["floor_ms"])
    assert all(f"{number:.3f}" in printed for number in numbers)
    assert "not available" in printed


@pytest.mark.slow
def test_the_command_runs_a_preset_of_any_family(capsys):
    assert tool.main([*QUICK, "--preset", "qwen3-vl-tiny", "--cameras", "1", "--text-tokens", "5"]) == 0
    assert "preset qwen3-vl-tiny, random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--preset", "tiny"), "cannot go together"),
        (("--size", "20"), "at least 28 x 28"),
        (("--size", "30", "--resize", "none"), "multiples of 28"),
        (("--resize", "30x30"), "multiples of 28"),
        (("--size", "big"), "480x640"),
        (("--size", "1x2x3"), "480x640"),
        (("--device", "toaster"), "toaster"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--dtype", "int8"), "int8"),
        (("--layers", "0"), "num_layers"),
        (("--batch", "0"), "batch"),
        (("--cameras", "-1"), "cameras"),
        (("--calls", "1"), "calls"),
        (("--hz", "0"), "hz"),
        (("--tflops", "nan"), "tflops"),
        (("--text-tokens", "5000"), "at most 4096 tokens"),
        (("--json", "no/such/folder/file.json"), "no folder"),
        (("--wheels", "4"), "--wheels"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, capsys, options, says):
    arguments = [*QUICK, "--model", str(checkpoint), *options]
    try:
        code = tool.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("profile: ")
    assert len(err.splitlines()) == 1
    assert says in err

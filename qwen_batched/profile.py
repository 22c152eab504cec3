"""Where the time of a call goes: `python -m qwen_batched.profile --batch 1 --cameras 3 --size 224 ...`.

In: a checkpoint and the shape of a call. Out: the time of each stage, the GPU's kernels and the gaps between them, the
floor that matrix products and weights set, and what a caller waits, back to back and paced like a control loop.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity

from qwen_batched.arguments import dtype_name
from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.inputs.checks import Resize
from qwen_batched.inputs.prompt import PromptEncoder
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.runtime.arena import synchronize
from qwen_batched.testing import PRESETS, default_checkpoint, write_checkpoint

STAGES = ("resize, patches", "vision tower", "prompt layout, placing features", "decoder")
PIXELS, VISION, PLACING, DECODER = STAGES
SENTENCE = "pick up the red cube and put it into the box on the left, then open the drawer. "
WORDS = len(SENTENCE.split())  # at least so many tokens
FRAME_SETS = 4  # batches of frames in turn: what one call leaves in a cache is no use to the next
GATED = "silu"  # the activation of vision transformers whose MLP has a gate
WARM_UP, MOST_STAGED_CALLS = 5, 50
# Measured, by GPU and dtype: products in TFLOP/s, copies in GB/s (bytes read and written).
KNOWN_RATES = {("NVIDIA H200", torch.bfloat16): (750.0, 4200.0)}

Floors = dict[str, tuple[float, float, float, float]]


@dataclass(frozen=True)
class DeviceWork:
    """What a GPU did in one call: kernels, copies with memsets, sum of the kernels' ms, ms in between without any."""

    kernels: int
    copies: int
    kernel_ms: float
    gap_ms: float

    def __str__(self) -> str:
        return f"{self.kernels} kernels {self.kernel_ms:.3f} ms, {self.copies} copies, gaps {self.gap_ms:.3f} ms"


@dataclass(frozen=True)
class Stage:
    """A part of a call, run eagerly: median ms, sum of its kernels' ms (None: not known), share of all stages.

    Of its linear layers the products in GFLOP, the weights in GB, and the least ms for each at the peak rates.
    """

    name: str
    ms: float
    kernel_ms: float | None
    share: float
    gflop: float
    product_ms: float
    weight_gb: float
    weight_ms: float

    def __str__(self) -> str:
        kernels = "-" if self.kernel_ms is None else f"{self.kernel_ms:.3f}"
        times = f"{self.name:<32} {self.ms:9.3f} {self.share:7.1%} {kernels:>11}"
        return f"{times} {self.gflop:10.3f} {self.product_ms:8.3f} {self.weight_gb:11.4f} {self.weight_ms:8.3f}"


@dataclass(frozen=True)
class Latency:
    """Wall ms of calls, each from an idle device to an idle device."""

    p50: float
    p90: float
    p99: float
    worst: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Percentiles of two times or more, interpolated linearly."""
        cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
        return cls(cuts[49], cuts[89], cuts[98], max(milliseconds))

    def __str__(self) -> str:
        return f"p50 {self.p50:.3f}  p90 {self.p90:.3f}  p99 {self.p99:.3f}  worst {self.worst:.3f} ms"


@dataclass(frozen=True)
class Profile:
    """What was measured of a call; times in ms."""

    call: dict[str, Any]  # the machine and the call, in words and numbers
    # Wall times of the first two, which count nowhere else. On a GPU they compile kernels and capture graphs, unless
    # the model was used before.
    first_calls: tuple[float, float]
    stages: tuple[Stage, ...]
    eager_ms: float  # median of the eager call that was cut in `stages`
    back_to_back: Latency  # of the call as a user makes it, with graphs where the library has them
    paced: Latency  # the same
    missed_ticks: int  # of the paced calls' clock, because a call was still running
    device_work: DeviceWork | None  # of the call as a user makes it; None where the profiler saw no device
    floor_ms: float  # sum over the stages of what products or weights take at least, at these TFLOP/s and GB/s
    tflops: float
    gbps: float
    rates_from: str

    def text(self) -> str:
        """A table, and what surrounds it."""
        return f"""\
{", ".join(f"{name} {value}" for name, value in self.call.items())}
first two calls, counted nowhere else: {self.first_calls[0]:.3f} and {self.first_calls[1]:.3f} ms

{"stages one by one, eagerly":<32} {"ms":>9}   share  kernels ms      GFLOP       ms  weights GB       ms
{chr(10).join(map(str, self.stages))}
{"eager call":<32} {self.eager_ms:9.3f}
(medians, on a GPU between events and without graphs: at the host's pace where that is slower;
placing is what the others leave of the eager call)

the call as a user makes it, wall time from idle device to idle device
back to back  {self.back_to_back}
paced         {self.paced}, {self.missed_ticks} ticks missed
one, profiled {self.device_work or "kernels and gaps: not available"}
floor         {self.floor_ms:.3f} ms at {self.tflops:.4g} TFLOP/s and {self.gbps:.4g} GB/s ({self.rates_from});
              linear layers and their weights alone: attention, activations and caches are ignored
p50 is        {self.back_to_back.p50 / self.floor_ms:.2f} x the floor"""


@torch.inference_mode()
def profile(
    model: QwenBatchedVL,
    batch: int = 1,
    cameras: int = 3,
    size: tuple[int, int] = (224, 224),
    resize: Resize = "hf",
    text_tokens: int = 40,
    text: str | None = None,
    calls: int = 200,
    hz: float = 30.0,
    host: bool = False,
    tflops: float | None = None,
    gbps: float | None = None,
) -> Profile:
    """Measures `model(images, texts)` with noise for frames, a few sets of them in turn.

    Args:
        model, batch, cameras: What is measured, with so many samples and frames of each.
        size, resize: Height and width of the frames in pixels; then as for the model.
        text_tokens, text: Length of every sample's text, or the text itself.
        calls, hz: How many calls (at least 2) are timed back to back, and again paced at so many a second.
        host: On a GPU, frames come from pinned host memory, not from the GPU's.
        tflops, gbps: Peak rates for the floor; None for what is known of the GPU, else for a measurement here.

    Raises:
        ValueError: The model does not take such a call, or a number is out of range.
    """
    positive = dict(batch=batch, cameras=cameras, text_tokens=text_tokens, hz=hz, tflops=tflops, gbps=gbps)
    for name, number in positive.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {number}")
    if calls < 2:
        raise ValueError(f"calls must be at least 2, got {calls}")
    device, dtype, prompts = model.device, model.dtype, model.processor.prompts
    text = _text_of(prompts, text_tokens) if text is None else text
    frames = [torch.randint(0, 256, (batch, cameras, 3, *size), dtype=torch.uint8) for _ in range(FRAME_SETS)]
    if device.type == "cuda":
        frames = [each.pin_memory() if host else each.to(device) for each in frames]
    frames = itertools.cycle(frames)

    def call() -> Any:
        return model(next(frames), [text] * batch, resize=resize)

    def pixels() -> object:
        return model.processor(next(frames), None, resize=resize, device=device, dtype=dtype)

    first_calls = (_wall_ms(call, device), _wall_ms(call, device))
    out = [call() for _ in range(WARM_UP)][-1]
    grid, sequence = tuple(out.image_features.shape[2:4]), out.attention_mask.shape[1]
    del out
    back_to_back = Latency.of([_wall_ms(call, device) for _ in range(calls)])
    paced, missed_ticks = _paced(call, device, calls, hz)
    device_work = _device_work(call, device)
    tflops, gbps, rates_from = _rates(device, dtype, tflops, gbps)
    cells, tokens = batch * cameras * math.prod(grid), batch * sequence
    floors = stage_floors(model.config, cells, tokens, dtype.itemsize, tflops, gbps)
    # Last: with hooks, the model drops its graphs.
    eager_ms, stages = time_stages(model, call, pixels, min(calls, MOST_STAGED_CALLS), floors)
    described = {
        **{"device": _name(device), "torch": torch.__version__, "dtype": dtype_name(dtype)},
        **{"blocks": model.config.text.num_hidden_layers, "batch": batch, "cameras": cameras, "size": size},
        **{"resize": resize, "grid": grid, "text tokens": len(prompts.encode(text, "plain", 0)), "sequence": sequence},
        **{"frames on": "pinned host" if host and device.type == "cuda" else device.type, "calls": calls, "hz": hz},
    }
    floor_ms = sum(max(stage.product_ms, stage.weight_ms) for stage in stages)
    measured = (stages, eager_ms, back_to_back, paced, missed_ticks, device_work)
    return Profile(described, first_calls, *measured, floor_ms, tflops, gbps, rates_from)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stage_floors(config: QwenVLConfig, cells: int, tokens: int, itemsize: int, tflops: float, gbps: float) -> Floors:
    """By stage: GFLOP of the linear layers, their ms, GB of their weights of `itemsize` bytes, their ms.

    For merged cells and tokens of all samples. Biases, norms and embeddings are left out.
    """
    vision, text, patches = config.vision, config.text, cells * config.vision.cell_patches
    width, merged = vision.hidden_size, vision.hidden_size * vision.cell_patches
    q_width, kv_width = (heads * text.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    mergers, blocks = 1 + len(vision.deepstack_visual_indexes or ()), text.num_hidden_layers
    products = {  # rows, inner, columns, how many
        VISION: [
            (patches, vision.patch_dim, width, 1),
            *((cells, merged, merged, mergers), (cells, merged, text.hidden_size, mergers)),
            (patches, width, width, 4 * vision.depth),  # queries, keys, values, output
            (patches, width, vision.intermediate_size, (3 if vision.hidden_act == GATED else 2) * vision.depth),
        ],
        DECODER: [
            (tokens, text.hidden_size, q_width, 2 * blocks),  # queries, output
            (tokens, text.hidden_size, kv_width, 2 * blocks),  # keys, values
            (tokens, text.hidden_size, text.intermediate_size, 3 * blocks),
        ],
    }
    found = {}
    for stage in STAGES:
        layers = products.get(stage, [])
        gflop = sum(2 * rows * inner * columns * count for rows, inner, columns, count in layers) / 1e9
        weight_gb = sum(inner * columns * count for _, inner, columns, count in layers) * itemsize / 1e9
        found[stage] = (gflop, gflop / tflops, weight_gb, weight_gb / gbps * 1e3)
    return found


def _text_of(prompts: PromptEncoder, tokens: int) -> str:
    """A text of exactly so many tokens."""
    ids = prompts.encode(SENTENCE * (tokens // WORDS + 3), "plain", 0)
    for first in range(len(ids) - tokens):
        text = prompts.decode(ids[first : first + tokens])
        if len(prompts.encode(text, "plain", 0)) == tokens:
            return text
    raise ValueError(f"found no text of {tokens} tokens: give one as text")


def _wall_ms(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def _device_ms(call: Callable[[], object], device: torch.device) -> float:
    """Between events on a GPU's stream, from an idle device; elsewhere wall time."""
    if device.type != "cuda":
        return _wall_ms(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    synchronize(device)
    start.record(stream)
    call()
    end.record(stream)
    synchronize(device)
    return start.elapsed_time(end)


def _paced(call: Callable[[], object], device: torch.device, calls: int, hz: float) -> tuple[Latency, int]:
    """Calls at the ticks of a clock, and how many ticks passed while a call was running."""
    period, tick, missed, times = 1 / hz, time.perf_counter(), 0, []
    for _ in range(calls):
        late = time.perf_counter() - (tick + period)
        skipped = max(0, math.ceil(late / period))
        missed, tick = missed + skipped, tick + (1 + skipped) * period
        time.sleep(max(0.0, tick - time.perf_counter()))
        times.append(_wall_ms(call, device))
    return Latency.of(times), missed


def time_stages(
    model: QwenBatchedVL, call: Callable[[], object], pixels: Callable[[], object], calls: int, floors: Floors
) -> tuple[float, tuple[Stage, ...]]:
    """Median ms of the call run eagerly, and its stages one by one; what the others do not take is the placing.

    `pixels` runs the first stage. The networks' come from hooks on the call, which also keep it from being a graph.
    """
    device, parts = model.device, {PLACING: call, PIXELS: pixels}

    def keep(network: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts[VISION if network is model.visual else DECODER] = functools.partial(network, *args, **kwargs)

    tower, decoder = (x.register_forward_pre_hook(keep, with_kwargs=True) for x in (model.visual, model.model))
    with tower, decoder:
        call()
        rows = [{name: _device_ms(parts[name], device) for name in STAGES} for _ in range(calls + 1)][1:]
        work = {name: _device_work(parts[name], device) for name in STAGES}
    eager_ms = statistics.median(row[PLACING] for row in rows)
    kernels = {name: done.kernel_ms for name, done in work.items() if done}
    for whole in (*rows, kernels) if len(kernels) == len(STAGES) else rows:
        whole[PLACING] = max(0.0, 2 * whole[PLACING] - sum(whole.values()))
    times = {name: statistics.median(row[name] for row in rows) for name in STAGES}
    total = sum(times.values())
    return eager_ms, tuple(Stage(name, ms, kernels.get(name), ms / total, *floors[name]) for name, ms in times.items())


def _device_work(call: Callable[[], object], device: torch.device) -> DeviceWork | None:
    if device.type != "cuda":
        return None
    for _ in range(2):  # the profiler's first time is slow
        synchronize(device)
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return work_in_trace(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def work_in_trace(events: Iterable[Mapping[str, Any]]) -> DeviceWork | None:
    """The kernels, copies and gaps among the events (microseconds) of torch.profiler's trace; None without kernels."""
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [event["dur"] for event in work if event["cat"] == "kernel"]
    if not kernels:
        return None
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in work)
    ends = itertools.accumulate((end for _, end in spans), max)  # kernels may overlap
    gaps = [max(0.0, start - end) for end, (start, _) in zip(ends, spans[1:], strict=False)]
    return DeviceWork(len(kernels), len(work) - len(kernels), sum(kernels) / 1e3, sum(gaps) / 1e3)


def _rates(
    device: torch.device, dtype: torch.dtype, tflops: float | None, gbps: float | None
) -> tuple[float, float, str]:
    """Peak rates as given, else as known, else measured; and which it is."""
    known = KNOWN_RATES.get((_name(device), dtype), (None, None))
    pairs = ((tflops, known[0]), (gbps, known[1]))
    sources = ["given" if given else "known" if rate else "measured here" for given, rate in pairs]
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)

    def best_ms(operation: Callable[..., object], *shape: int, dtype: torch.dtype) -> float:
        # Random values: products of constants take less power, and run at a clock that real ones never see.
        a, b = (torch.randint(0, 9, shape, dtype=dtype, device=device) for _ in range(2))
        return min(_wall_ms(lambda: operation(a, b), device) for _ in range(5))

    tflops = tflops or known[0] or 2 * side**3 / best_ms(F.linear, side, side, dtype=dtype) / 1e9
    gbps = gbps or known[1] or 2 * size / best_ms(Tensor.copy_, size, dtype=torch.uint8) / 1e6
    return tflops, gbps, f"products {sources[0]}, copies {sources[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the profile. Returns 0; 2 where there is nothing to measure."""
    options = vars(_parser().parse_args(arguments))
    name, preset, report = (options.pop(key) for key in ("model", "preset", "json"))
    dtype, device, layers = (options.pop(key) for key in ("dtype", "device", "layers"))
    try:
        if name and preset:
            raise ValueError("--model and --preset cannot go together")
        if report and not report.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {report.absolute().parent} for the report")
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        device = resolve_device(device)
        with tempfile.TemporaryDirectory() as folder:
            if preset:
                write_checkpoint(folder, preset, dtype=torch.float32 if dtype == "auto" else dtype)
            stored = folder if preset else name or default_checkpoint()
            model = QwenBatchedVL.from_pretrained(stored, dtype, device, num_layers=layers)
        found = profile(model, **options)
        if report:
            report.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"profile: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    measured = name or f"{f'preset {preset}' if preset else 'embedded default'}, random weights"
    print(f"Profile of a call ({measured})\n{found.text()}")
    return 0


def _resize(text: str) -> Resize:
    return {"hf": "hf", "none": None}[text] if text in ("hf", "none") else frame_size(text)


def frame_size(text: str) -> tuple[int, int]:
    """Height and width, of an argument on the command line."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected pixels as 224 or 480x640 (height x width), got {text!r}")
    return int(sides[0]), int(sides[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_batched.profile", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"profile: {message}\n")  # one line, without the usage
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub id; the embedded default with random weights where left out")
    add("--preset", choices=sorted(PRESETS), help="in place of --model: shapes of random weights, of any family")
    add("--batch", type=int, default=1, help="samples")
    add("--cameras", type=int, default=3, help="frames of a sample")
    add("--size", type=frame_size, default=(224, 224), help="of the frames in pixels: 224 or 480x640 (height x width)")
    add("--resize", type=_resize, default="hf", help="hf (the checkpoint's rule), none, or a size")
    add("--text-tokens", type=int, default=40, help="length of the text")
    add("--text", help="the text itself")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--device", help="cuda or cpu; cuda where there is one")
    add("--layers", type=int, help="keep the first N decoder blocks")
    add("--calls", type=int, default=200, help="how many are timed, back to back and again paced")
    add("--hz", type=float, default=30.0, help="ticks per second of the paced calls")
    add("--host", action="store_true", help="frames from pinned host memory")
    add("--tflops", type=float, help="peak rate of products for the floor; known or measured where left out")
    add("--gbps", type=float, help="peak rate of memory, GB/s; known or measured where left out")
    add("--json", type=Path, help="write all numbers to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

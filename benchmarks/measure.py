"""What the benchmarks share: times, peak memory, distances, goals, tables, and the facts of a run.

In: callables, each with the inputs that it takes in turn. Out: medians with their spread, in milliseconds; bytes; text.
A benchmark prints numbers and whether goals are met; it asserts on results only, never on time.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
INSTRUCTION = "pick up the red cube and put it into the box on the left then open the drawer and move the arm"
# Which layers get adapters, by peft's `target_modules`: the decoder's linear ones.
LORA_LAYERS = r".*layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
COMMIT_VARIABLE = "BENCHMARK_COMMIT"
PACKAGES = ("torch", "triton", "transformers", "torchvision", "pillow")


@dataclass(frozen=True)
class Work:
    """One call: `batch` samples of `cameras` frames of one size."""

    batch: int
    cameras: int
    size: tuple[int, int]

    @property
    def images(self) -> int:
        return self.batch * self.cameras

    def __str__(self) -> str:
        return f"{self.images} x {self.size[0]}x{self.size[1]}"


class Rotation:
    """Calls `run` with the next of `inputs`, round and round: what one call leaves in L2 is no use to the next."""

    def __init__(self, run: Callable[[Any], object], inputs: Sequence[Any]) -> None:
        self.run, self.inputs = run, inputs
        self._next = itertools.cycle(inputs)

    def __call__(self) -> object:
        return self.run(next(self._next))


@dataclass(frozen=True)
class Spread:
    """Milliseconds per call: the median, and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Spread:
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
        return cls(statistics.median(milliseconds), tenths[0], tenths[-1], len(milliseconds))

    def __str__(self) -> str:
        return f"{self.median:9.3f} ms ({self.p10:.3f} to {self.p90:.3f}, n={self.samples})"


def random_frames(work: Work, count: int, device: torch.device) -> list[Tensor]:
    """`count` batches (B, V, 3, H, W), uint8 noise."""
    shape = (work.batch, work.cameras, 3, *work.size)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(count)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_times(call: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Milliseconds of each of `calls` calls, between CUDA events; the host runs ahead as far as it can.

    Where the host is slower than the device this is the host's pace. On the CPU it is wall time.
    """
    if device.type != "cuda":
        return [_wall(call, device) for _ in range(calls)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronize(device)
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def back_to_back_times(call: Callable[[], object], device: torch.device, calls: int, blocks: int = 1) -> list[float]:
    """Wall milliseconds per call of `calls` calls with one synchronisation at their end, for each of the blocks."""

    def block() -> None:
        for _ in range(calls):
            call()

    return [_wall(block, device) / calls for _ in range(blocks)]


def single_times(call: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Wall milliseconds of each call from an idle device to an idle device: what one caller waits."""
    return [_wall(call, device) for _ in range(calls)]


def paced_times(call: Callable[[], object], device: torch.device, calls: int, hz: float) -> list[float]:
    """As `single_times`, each call begun at a tick of a clock, as in a control loop: the device rests in between."""
    times, tick = [], time.perf_counter()
    for _ in range(calls):
        tick = max(tick + 1 / hz, time.perf_counter())  # a tick that a call has run over is lost
        time.sleep(max(0.0, tick - time.perf_counter()))
        times.append(_wall(call, device))
    return times


def _wall(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    take: Callable[[Callable[[], object], torch.device, int], list[float]] = device_times,
    warm_up: int = 3,
    rounds: int = 2,
    seconds: float = 1.0,
    most: int = 50,
) -> dict[str, Spread]:
    """Times all of `calls`, in turns within each round, so that what the clocks do hits every one of them.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        take: Takes (call, device, how many) and returns milliseconds per call.
        warm_up: Calls of each beforehand; a CUDA graph must have been captured after them.
        rounds: How often each gets its turn.
        seconds: About how long a turn lasts.
        most: Most calls of a turn.
    """
    turns, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(warm_up - 1):
            call()
        turns[name] = max(3, min(most, int(seconds * 1e3 / _wall(call, device))))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name] += take(call, device, turns[name])
    return {name: Spread.of(taken) for name, taken in times.items()}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of one `call`. What the call reads and returns lives as long as the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would leave its own stream the current one where a capture fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        results = call()

    def replay(kept: object = (call, results)) -> None:
        graph.replay()

    return replay


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`; then `peak.bytes`: the most allocated inside, above what was before.

    A CUDA graph's pool counts as allocated only while it is captured, not in replays: `peak.kept`, what the allocator
    still holds beyond before when its caches are emptied, has the pool in it. Both are 0 on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = self.kept = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            release(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device)
            self._reserved = torch.cuda.memory_reserved(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._allocated
            release(self.device)
            self.kept = max(0, torch.cuda.memory_reserved(self.device) - self._reserved)


def first_calls(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Wall milliseconds of the first three calls, and GiB: the peak of the three, and what is held afterwards."""
    with PeakMemory(device) as peak:
        first, second, third = single_times(call, device, 3)
    gib = {"peak_gib": peak.bytes / GIB, "kept_gib": peak.kept / GIB}
    return {"first_ms": first, "second_ms": second, "third_ms": third, **gib}


def peak_gib(call: Callable[[], object], device: torch.device) -> float:
    """The most that one call allocates, in GiB."""
    with PeakMemory(device) as peak:
        call()
    return peak.bytes / GIB


def held_mib(device: torch.device) -> dict[str, float]:
    """What is allocated and what the allocator holds; 0 on the CPU."""
    if device.type != "cuda":
        return {"allocated": 0.0, "reserved": 0.0}
    held = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return {name: size / 2**20 for name, size in held.items()}


def release(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()


def relative_l2(values: Tensor, yardstick: Tensor) -> float:
    """Norm of the difference over norm of the yardstick, in float64; NaN where a value is not finite."""
    values, yardstick = values.double(), yardstick.double()
    return float((values - yardstick).norm() / yardstick.norm())


@dataclass(frozen=True)
class Goal:
    """A number beside what it must be and what it should be.

    Attributes:
        what: What was measured.
        value: None where it was not measured.
        must: The bound that a release needs.
        aim: The bound to strive for; None where there is none.
        unit: "ms", "x", ...
        at_least: Whether larger is better.
    """

    what: str
    value: float | None
    must: float
    aim: float | None = None
    unit: str = ""
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if not self._reaches(self.must):
            return "MISSED"
        return "met, aim too" if self.aim is not None and self._reaches(self.aim) else "met"

    def _reaches(self, bound: float) -> bool:
        return self.value >= bound if self.at_least else self.value <= bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def finish(
    report: Mapping[str, Any], goals: Sequence[Goal], missing: Mapping[str, str], wrong: Sequence[str], claims: bool
) -> int:
    """Prints the goals, what could not be measured and why, what was wrong, and all of it as JSON in the last line.

    Returns:
        The exit code: 1 where a result was wrong.
    """
    if goals:
        _print_goals(goals, claims)
    for name, reason in missing.items():
        print(f"not measured: {name}: {reason}")
    for reason in wrong:
        print(f"WRONG: {reason}")
    verdicts = [goal.as_dict() for goal in goals] if claims else []
    found = {**report, "goals": verdicts, "missing": missing, "wrong": wrong}
    print(json.dumps(_finite(found), allow_nan=False), flush=True)
    return 1 if wrong else 0


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_goals(goals: Sequence[Goal], claims: bool) -> None:
    """A table for people. Without `claims` (a smoke run) no verdict is given."""
    rows = []
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        value = "-" if goal.value is None else f"{goal.value:.4g} {goal.unit}"
        aim = "" if goal.aim is None else f"{sign} {goal.aim:g}"
        verdict = goal.verdict if claims else "(smoke)"
        rows.append((goal.what, value, f"{sign} {goal.must:g} {goal.unit}", aim, verdict))
    print_table(("goal", "measured", "must", "aim", ""), rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need; the first to the left, numbers to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        print("  ".join(cells).rstrip())
    print(flush=True)


# Ways of timing, in the order of the columns.
KINDS = {"gpu": "ms", "back_to_back": "wall ms back to back", "single": "wall ms single", "kernels": "kernels ms"}


def print_times(title: str, found: Mapping[str, Any]) -> None:
    """A table of what was timed on `found["images"]` images, each beside ours.

    Args:
        title: Stands above.
        found: For each of `KINDS` that was measured, `Spread`s as dicts by name, "gpu" and "ours" among them. At
            will, "peak_gib" by name.
    """
    kinds = [kind for kind in KINDS if kind in found]
    ours, rows = found["gpu"]["ours"]["median"], []
    for name, times in found["gpu"].items():
        others = [f"{found[kind][name]['median']:.3f}" if name in found[kind] else "" for kind in kinds[1:]]
        peak = found.get("peak_gib", {}).get(name)
        rows.append(
            (
                name,
                f"{times['median']:.3f}",
                f"{times['p10']:.3f} .. {times['p90']:.3f}",
                *others,
                f"{found['images'] / times['median'] * 1e3:.1f}",
                f"{times['median'] / ours:.2f} x as fast",
                "" if peak is None else f"{peak:.2f}",
            )
        )
    print(title)
    print_table(("", "ms", "p10 .. p90", *(KINDS[kind] for kind in kinds[1:]), "img/s", "ours is", "peak GiB"), rows)


def note(text: str) -> None:
    """What the run is doing, to the error stream: no results."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def environment(benchmark: str, device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Commit, machine and versions. `commit`: what to say where the code lies outside its repository."""
    on_gpu = device.type == "cuda"
    return {
        "benchmark": benchmark,
        "commit": commit or os.environ.get(COMMIT_VARIABLE) or _git_commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "device_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 1) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _git_commit() -> str:
    """The checked-out commit, "-dirty" where the tree differs from it, "unknown" outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain") else commit


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    # torch's own knows its build ("+cu130").
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""The vision tower and the image processor beside transformers', in one run on one GPU.

    python benchmarks/vision.py [--preset 3b] [--model FOLDER] [--quick] [--compile-seconds 150] [--commit HASH]

Real shapes of the 3B model, or of another --preset of any family, whose frames are the nearest multiples of its merged
cells; bfloat16, random weights unless --model names a checkpoint. Results are compared with transformers in float32
before any time is printed; a wrong one ends the run with exit code 1. The tables say what was measured and which goals
are met, where the model has goals; a missed goal changes no exit code. The last line is JSON.

transformers' tower is given its patches ready made; ours starts from uint8 frames of the final size, and makes them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import peers
import runs
import torch
from measure import Goal, Rotation, Spread, Work, note, print_table
from peers import TowerInputs
from torch import Tensor, nn

from qwen_batched import QwenBatchedVL
from qwen_batched.checkpoint.config import VisionConfig
from qwen_batched.model.geometry import smart_resize
from qwen_batched.transformers_reference import TransformersReference

ROTATION = 6  # inputs in turn: together well beyond an H200's 50 MB of L2
ACCURACY_MUST = 1.02  # our deviation from transformers in float32, over that of transformers in our dtype
# A tower in bfloat16 deviates by 1e-2; a wrong index or a wrong window by 1e-1 and more.
PEER_BOUND = 0.05
# The processors round to 8 bits at different points: here and there a pixel differs by one step.
PROCESSOR_BOUND = 0.01


@dataclass(frozen=True)
class Shapes:
    """What is measured."""

    fitted: ClassVar = ("large", "middle", "control", "uneven", "even", "target", "accuracy")
    large: Work
    middle: Work
    control: Work
    uneven: Work
    even: Work
    raw: Work
    target: tuple[int, int]
    accuracy: tuple[tuple[int, int], ...]
    accuracy_frames: int


FULL = Shapes(
    large=Work(64, 1, (448, 448)),
    middle=Work(16, 1, (448, 448)),
    control=Work(1, 3, (224, 224)),
    uneven=Work(32, 1, (476, 644)),  # 50048 patches, partial windows on two sides
    even=Work(49, 1, (448, 448)),  # 50176 patches
    raw=Work(24, 1, (480, 640)),
    target=(448, 448),
    accuracy=((224, 224), (252, 252), (448, 448), (252, 308), (476, 644)),
    accuracy_frames=4,
)
SMOKE = Shapes(
    large=Work(3, 1, (112, 112)),
    middle=Work(2, 1, (112, 112)),
    control=Work(1, 2, (56, 56)),
    uneven=Work(2, 1, (84, 140)),
    even=Work(3, 1, (112, 112)),
    raw=Work(2, 1, (120, 160)),
    target=(112, 112),
    accuracy=((112, 112), (84, 140)),
    accuracy_frames=16,  # of few values the ratio of two deviations is chance
)


@dataclass
class Run(runs.Run):
    """With what the steps ask of the vision tower."""

    @property
    def vision(self) -> VisionConfig:
        return self.model.config.vision

    def encode(self, frames: Tensor, graph: bool = True) -> Tensor:
        return self.model.encode_images(frames, resize=None, cuda_graph=graph)

    def frames(self, work: Work) -> list[Tensor]:
        return measure.random_frames(work, ROTATION, self.device)

    def inputs(self, work: Work) -> list[TowerInputs]:
        return peers.random_inputs(self.vision, work, self.like, ROTATION)

    @property
    def pixels(self) -> int:
        """Of a resized frame."""
        return self.shapes.target[0] * self.shapes.target[1]

    def kept_aspect(self) -> tuple[int, int]:
        """What transformers makes of the raw frames, which it lets nobody bring to another aspect."""
        return smart_resize(*self.shapes.raw.size, self.vision.cell_size, self.pixels, self.pixels)


@torch.no_grad()
def run_all(options: argparse.Namespace, temporary: str) -> int:
    started = time.perf_counter()
    os.environ["TRITON_CACHE_DIR"] = f"{temporary}/triton"  # else an earlier run has compiled for this one
    device = torch.device("cpu" if options.smoke else "cuda")
    torch.manual_seed(0)
    folder = options.model or runs.written(
        f"{temporary}/checkpoint", runs.preset_of(options), shards=1, text={"num_hidden_layers": 1}
    )
    note("checkpoint ready")
    model = QwenBatchedVL.from_pretrained(folder, num_layers=1, dtype=torch.bfloat16, device=device)
    shapes = runs.fitted(SMOKE if options.smoke else FULL, model.config.vision.cell_size)
    run = Run(options, shapes, device, model.requires_grad_(False), started)
    first = first_calls(run)
    towers, processors = check_results(run, str(folder))
    if not run.wrong:
        measure_times(run, first, towers, processors)
        set_goals(run)
    return run.finish("vision")


def measure_times(run: Run, first: dict[str, Any], towers: dict[str, nn.Module], processors: dict[str, Any]) -> None:
    print_first_calls(run, first)
    measure_towers(run, towers)
    measure_partial_windows(run)
    measure_processor(run, processors)
    if "varlen" in towers and not run.options.quick:
        measure_compiled(run, towers["varlen"])


# --- the first calls: time and memory ---


def first_calls(run: Run) -> dict[str, Any]:
    """The first calls after loading: kernels compiled in the first, the CUDA graph captured in the second."""
    note("first calls")
    found = {}
    for work in (run.shapes.large, run.shapes.control):
        frames = Rotation(run.encode, run.frames(work))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            row = found[str(work)] = measure.first_calls(frames, run.device)
        run.missing |= {f"CUDA graph, {work}": str(one.message) for one in caught if "CUDA graph" in str(one.message)}
        row["peak_without_graph_gib"] = measure.peak_gib(partial(run.encode, frames.inputs[0], graph=False), run.device)
    return found


def print_first_calls(run: Run, found: dict[str, Any]) -> None:
    """Also sets the report: nothing of it is said before the results are known to be right."""
    run.report["first_calls"] = found
    print("First calls after loading (ms), and memory above what was there before (GiB)")
    print("peak: most allocated in these three calls; kept: held afterwards, the graph's pool included")
    rows = [
        (work, *(f"{value:.1f}" if name.endswith("_ms") else f"{value:.3f}" for name, value in row.items()))
        for work, row in found.items()
    ]
    print_table(("work", "first", "second", "third", "peak", "kept", "peak without graph"), rows)


# --- results, before any time ---


def check_results(run: Run, folder: str) -> tuple[dict[str, nn.Module], dict[str, Callable]]:
    """Compares features and patches with transformers'. Returns its towers and image processors, ready to be timed."""
    note("results against transformers in float32")
    yardsticks = peers.float32_features(folder, run.shapes.accuracy, run.shapes.accuracy_frames, run.device)
    reference = TransformersReference.from_pretrained(folder, dtype=run.model.dtype, device=run.device)
    modules = {"default": reference.visual}
    if run.device.type == "cuda":
        varlen = run.attempt("varlen", lambda: peers.with_varlen_attention(reference.visual))
        modules |= {} if varlen is None else {"varlen": varlen}
    rows, report = [], {}
    for size, (frames, inputs, expected) in yardsticks.items():
        errors = {"ours": measure.relative_l2(run.encode(frames).flatten(0, 3), expected)}
        for name, module in modules.items():
            tower = peers.default_tower(module)
            errors[name] = measure.relative_l2(torch.cat([tower(one)[0] for one in inputs]), expected)
            if not errors[name] <= PEER_BOUND:
                run.wrong.append(f"transformers' {name} tower deviates by {errors[name]:.1e} at {size}")
        ratio = errors["ours"] / errors["default"]
        if not ratio <= ACCURACY_MUST:
            run.wrong.append(f"our deviation is {ratio:.3f} times transformers' at {size}")
        report["x".join(map(str, size))] = errors | {"ratio": ratio}
        rows.append(("x".join(map(str, size)), *(f"{error:.2e}" for error in errors.values()), f"{ratio:.3f}"))
    run.report["accuracy"] = report
    print(f"Features' relative L2 deviation from transformers in float32; ratio: ours / default, <= {ACCURACY_MUST}")
    print_table(("size", "ours", *modules, "ratio"), rows)
    check_graphs(run)
    processors = check_processor(run, folder)
    measure.release(run.device)
    return modules, processors


def check_graphs(run: Run) -> None:
    """Equal to the last bit with and without a CUDA graph, with all sizes and their transposes replayed in between."""
    sizes = list(dict.fromkeys(size for pair in run.shapes.accuracy for size in (pair, pair[::-1])))
    frames = {size: peers.soft_frames(2, size, run.device)[:, None] for size in sizes}
    expected = {size: run.encode(frames[size], graph=False) for size in sizes}
    calls = [size for size in sizes for _ in range(3)] + sizes
    equal = run.report["graph_equals_eager"] = all(torch.equal(run.encode(frames[x]), expected[x]) for x in calls)
    print(f"With a CUDA graph and without: {'equal to the last bit' if equal else 'DIFFERENT'}\n", flush=True)
    if not equal:
        run.wrong.append("features differ between graph and eager")


def check_processor(run: Run, folder: str) -> dict[str, Callable]:
    """Our patches against those of transformers' processors, at the size that its rule makes of these frames."""
    makers = {"transformers, PIL": partial(peers.pil_image_processor, folder, run.pixels, run.device)}
    if run.device.type == "cuda":
        makers["transformers, GPU"] = partial(peers.gpu_image_processor, folder, run.pixels)
    frames = peers.soft_frames(2, run.shapes.raw.size, run.device)
    batch = run.model.processor(frames[:, None], None, resize=run.kept_aspect(), device=run.device, dtype=torch.float32)
    ours = peers.in_transformers_order(batch, run.vision.cell_patches)
    processors = {}
    for name, make in makers.items():
        processor = run.attempt(name, make)
        theirs = processor and run.attempt(name, partial(processor, peers.as_pil(frames) if "PIL" in name else frames))
        if theirs is None:
            continue
        processors[name] = processor
        error = measure.relative_l2(ours, theirs.to(ours)) if ours.shape == theirs.shape else math.inf
        run.report.setdefault("processor_deviation", {})[name] = error
        print(f"Patches against {name}: relative L2 {error:.1e}\n", flush=True)
        if not error <= PROCESSOR_BOUND:
            run.wrong.append(f"patches differ from those of {name}: {error:.1e}")
    return processors


# --- times ---


def measure_towers(run: Run, modules: dict[str, nn.Module]) -> None:
    """Ours, transformers' uncompiled towers and the products alone, in turns."""
    run.report["tower"] = {}
    for work in dict.fromkeys((run.shapes.control, run.shapes.middle, run.shapes.large)):
        note(f"times, {work}")
        passes = peers.passes_of(run.vision, work)
        calls: dict[str, Callable[[], object]] = {
            "ours": Rotation(run.encode, run.frames(work)),
            "products": peers.products(run.vision, passes, run.like),
            "products of the blocks": peers.products(run.vision, passes, run.like, ends=False),
        }
        if not run.options.quick:
            inputs = run.inputs(work)
            calls |= {name: Rotation(peers.default_tower(module), inputs) for name, module in modules.items()}
        found = {"images": work.images, "patches": sum(passes), "passes": passes, "gpu": run.times(calls)}
        if work == run.shapes.control:
            found |= small_times(run, calls)
        if work == run.shapes.large:
            found["peak_gib"] = {name: measure.peak_gib(calls[name], run.device) for name in modules if name in calls}
        run.report["tower"][str(work)] = found
        measure.print_times(str(work), found)
        del calls
        measure.release(run.device)


def small_times(run: Run, calls: dict[str, Callable[[], object]]) -> dict[str, Any]:
    """Where launches count: wall time back to back and of a single call, and what our kernels alone take."""
    blocks = partial(measure.back_to_back_times, blocks=10)
    found = {
        "back_to_back": run.times(calls, seconds=0.2, most=20, take=blocks),
        "single": run.times(calls, seconds=0.2, most=30, take=measure.single_times),
    }
    if run.device.type == "cuda":
        frames = calls["ours"].inputs[0]
        replay = run.attempt("kernels alone", lambda: measure.captured(lambda: run.encode(frames, graph=False)))
        if replay is not None:
            found["kernels"] = run.times({"ours": replay})
    return found


def measure_partial_windows(run: Run) -> None:
    """Time per patch with partial windows over that with full ones only, at nearly the same number of patches."""
    note("partial windows")
    works = {"partial windows": run.shapes.uneven, "full windows": run.shapes.even}
    calls = {name: Rotation(run.encode, run.frames(work)) for name, work in works.items()}
    found = run.times(calls)
    for name, work in works.items():
        patches = sum(peers.passes_of(run.vision, work))
        found[name] |= {"work": str(work), "us_per_patch": 1e3 * found[name]["median"] / patches}
    ratio = found["partial windows"]["us_per_patch"] / found["full windows"]["us_per_patch"]
    run.report["partial_windows"] = found | {"ratio": ratio}
    rows = [
        (f"{name}, {row['work']}", f"{row['median']:.3f}", f"{row['us_per_patch']:.4f}") for name, row in found.items()
    ]
    print_table(("", "ms", "us per patch"), rows)


def measure_processor(run: Run, processors: dict[str, Callable]) -> None:
    """uint8 frames to patches: wall time per call back to back, and our kernels alone."""
    note("processor")
    frames = run.frames(run.shapes.raw)
    ours = partial(run.model.processor, texts=None, resize=run.shapes.target, device=run.device, dtype=run.model.dtype)
    calls: dict[str, Callable[[], object]] = {"ours": Rotation(ours, frames)}
    if not run.options.quick:
        for name, processor in processors.items():
            flat = [one.flatten(0, 1) for one in frames]
            calls[name] = Rotation(processor, [peers.as_pil(one) for one in flat] if "PIL" in name else flat)
    blocks = partial(measure.back_to_back_times, blocks=5)
    times = run.times(calls, seconds=0.2, most=40, take=blocks)
    if run.device.type == "cuda":
        replay = run.attempt("processor's kernels", lambda: measure.captured(lambda: [ours(one) for one in frames]))
        if replay is not None:
            whole = measure.device_times(replay, run.device, 20)
            times["ours, kernels alone"] = asdict(Spread.of([time / ROTATION for time in whole]))
    run.report["processor"] = times
    target, theirs = ("x".join(map(str, size)) for size in (run.shapes.target, run.kept_aspect()))
    print(f"{run.shapes.raw} uint8 to {target} (transformers keeps the aspect: to {theirs}); wall time back to back")
    rows = [(name, *(f"{row[key]:.4f}" for key in ("median", "p10", "p90"))) for name, row in times.items()]
    print_table(("", "ms", "p10", "p90"), rows)


def measure_compiled(run: Run, varlen: nn.Module) -> None:
    """transformers' compiled tower with ours in turns, as many shapes as the time for compiling allows."""
    found = run.report["compiled"] = {}
    started = time.perf_counter()
    for work in (run.shapes.large, run.shapes.control, run.shapes.middle):
        if time.perf_counter() - started > run.options.compile_seconds:
            run.missing[f"compiled, {work}"] = "no time left for compiling it (--compile-seconds)"
            continue
        note(f"compiling transformers' tower for {work}")
        result = run.attempt(f"compiled, {work}", partial(compiled_times, run, varlen, work))
        if result is not None:
            found[str(work)] = result
            measure.print_times(f"{work}, beside transformers compiled in {result['compile_seconds']:.0f} s", result)
    torch.compiler.reset()
    measure.release(run.device)


def compiled_times(run: Run, varlen: nn.Module, work: Work) -> dict[str, Any] | None:
    inputs = run.inputs(work)
    tower, seconds, error = peers.compiled_tower(varlen, inputs[0])
    if not error <= PEER_BOUND:
        run.wrong.append(f"transformers' compiled tower deviates by {error:.1e} from itself uncompiled, {work}")
        return None
    calls = {"ours": Rotation(run.encode, run.frames(work)), "compiled": Rotation(tower, inputs)}
    found = {"images": work.images, "compile_seconds": seconds, "deviation": error, "gpu": run.times(calls)}
    return found | (small_times(run, calls) if work == run.shapes.control else {})


# --- goals ---


def set_goals(run: Run) -> None:
    report, shapes = run.report, run.shapes
    large, control = report["tower"][str(shapes.large)], report["tower"][str(shapes.control)]
    compiled = report.get("compiled", {}).get(str(shapes.large))

    def ratio(found: dict[str, Any] | None, name: str) -> float | None:
        """How many times faster ours is."""
        times = {} if found is None else found["gpu"]
        return times[name]["median"] / times["ours"]["median"] if name in times else None

    first = report["first_calls"][str(shapes.large)]
    memory = first["peak_gib"]  # allocated, as theirs; what the graph's pool reserves is in the table of first calls
    theirs = large["peak_gib"].get("varlen")
    processor = {name: row["median"] for name, row in report["processor"].items()}
    on_gpu = processor.get("transformers, GPU")
    faster = None if on_gpu is None else on_gpu / processor["ours"]
    partial_windows = report["partial_windows"]["ratio"]
    worst = max(row["ratio"] for row in report["accuracy"].values())
    speed = shapes.large.images / large["gpu"]["ours"]["median"] * 1e3
    at = f"tower, {shapes.large}"
    run.goals.append(Goal("deviation over transformers' own, worst size", worst, ACCURACY_MUST, None, "x"))
    if not run.has_goals:
        return
    run.goals += [
        Goal(at, speed, 380, 400, "img/s", at_least=True),
        Goal(f"{at}: over transformers' default", ratio(large, "default"), 7, None, "x", at_least=True),
        Goal(f"{at}: over its varlen", ratio(large, "varlen"), 2.8, None, "x", at_least=True),
        Goal(f"{at}: over its compiled", ratio(compiled, "compiled"), 1.15, None, "x", at_least=True),
        Goal(f"{at}: of the products alone", ratio(large, "products"), 0.75, 0.82, "x", at_least=True),
        Goal(f"time per patch, {shapes.uneven} over {shapes.even}", partial_windows, 1.12, 1.06, "x"),
        Goal(f"tower, {shapes.control}, wall", control["back_to_back"]["ours"]["median"], 2.4, 2.0, "ms"),
        Goal(f"processor, {shapes.raw}, wall", processor["ours"], 0.25, 0.12, "ms"),
        Goal("processor: over transformers' on GPU", faster, 5, None, "x", at_least=True),
        Goal(f"{at}: peak memory over varlen's", memory / theirs if theirs else None, 0.65, 0.45, "x"),
        Goal(f"first two calls, {shapes.large}", (first["first_ms"] + first["second_ms"]) / 1e3, 15, 5, "s"),
    ]


if __name__ == "__main__":
    runs.main(runs.parser(__doc__), run_all)

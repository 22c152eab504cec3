"""Calls that do not repeat: new texts, masks and short generations, beside one call again and again, on one GPU.

    python benchmarks/every_call.py [--preset 3b] [--model FOLDER] [--num-layers N] [--commit HASH] [--calls 10000]

bfloat16, random weights unless --model names a checkpoint; uint8 frames on the GPU. Every call is timed by itself, from
an idle GPU to an idle GPU, in the order given: what a call costs because it is new stays in. `warmup` comes after the
rows that are said to be without it. Milliseconds; ratios are to one text again and again. The last line is JSON.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import peers
import runs
import torch
import whole_peers
from measure import Goal, Work, note, print_table
from torch import Tensor

WORDS = [
    *("pick", "place", "red", "blue", "green", "block", "cube", "drawer", "door", "left", "right", "open", "close"),
    *("push", "pull", "the", "a", "on", "into", "under", "box", "cup", "plate", "robot", "arm", "slowly", "carefully"),
    *("grasp", "lift", "move", "put", "down", "handle", "table", "corner", "near", "far", "first", "then", "next"),
]
WORD_BOUNDS, LONG_BOUNDS = (6, 60), (1, 200)


@dataclass(frozen=True)
class Shapes:
    """The control loop's frames, sizes of the long run, the simulator's batch, calls a row and generations a row."""

    fitted: ClassVar = ("camera", "sizes")
    camera: Work
    sizes: tuple[tuple[int, int], ...]
    environments: int
    calls: int
    generations: int


FULL = Shapes(Work(1, 3, (224, 224)), ((224, 224), (224, 280)), 64, 200, 12)
SMOKE = Shapes(Work(1, 1, (56, 56)), ((56, 56), (56, 84)), 2, 6, 2)


class Run(runs.Run):
    """With what the rows ask of the model."""

    def most_tokens(self, words: int) -> int:
        """Of a text of so many words."""
        encode = self.model.processor.prompts.encode
        return words * max(len(encode(f" {word}", "plain", 0)) for word in WORDS)

    def frames(self, batch: int, cameras: int, size: tuple[int, int]) -> Tensor:
        return measure.random_frames(Work(batch, cameras, size), 1, self.device)[0]


def texts(low: int, high: int, seed: int) -> Iterator[str]:
    """New texts of `low` to `high` words without end."""
    rng = random.Random(seed)
    while True:
        yield " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def timed(run: Run, call: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of `count` calls, in order."""
    return [time for _ in range(count) for time in measure.single_times(call, run.device, 1)]


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(len(times) - 1, int(q * len(times)))]


def measure_loop(run: Run, title: str) -> dict[str, Any]:
    """The control loop with texts and masks of every kind."""
    camera, count, model = run.shapes.camera, run.shapes.calls, run.model
    frames = run.frames(camera.batch, camera.cameras, camera.size)

    def call(text: str, mask: Tensor | None = None) -> object:
        return model(frames, [text], camera_mask=mask, resize=None)

    fixed = next(texts(12, 12, 0))
    known = [next(texts(n, n, n)) for n in range(6, 46, 2)]
    masks = [torch.tensor([[i != missing for i in range(camera.cameras)]]) for missing in range(camera.cameras)]
    on_device = [mask.to(run.device) for mask in masks]
    twelve, many, others = texts(12, 12, 1), texts(*WORD_BOUNDS, 2), texts(*WORD_BOUNDS, 3)
    for _ in range(5):
        call(fixed)
        for text in known if title == "before" else ():
            call(text)
    turn = iter(range(10**9))
    rows: dict[str, Callable[[], object]] = {
        "one text again and again": lambda: call(fixed),
        "20 known texts in turn": lambda: call(known[next(turn) % len(known)]),
        "a new text of 12 words": lambda: call(next(twelve)),
        "a new text of 6 to 60 words": lambda: call(next(many)),
        "a mask on the host": lambda: call(fixed, masks[next(turn) % len(masks)]),
        "a mask on the device": lambda: call(next(others), on_device[next(turn) % len(masks)]),
    }
    found = {}
    for name, one in rows.items():
        times = timed(run, one, count)
        found[name] = {
            "p50": quantile(times, 0.5),
            "p99": quantile(times, 0.99),
            "later": quantile(times[50:] or times, 0.5),
        }
        found[name]["later p99"] = quantile(times[50:] or times, 0.99)
    base = found["one text again and again"]["p50"]
    print_table(
        (title, "p50", "p99", "p50 x", "p99 x", "calls 50 on: p50 x", "p99 x"),
        [
            (name, *(f"{row[key]:.2f}" for key in ("p50", "p99")), *(f"{row[key] / base:.2f}" for key in row))
            for name, row in found.items()
        ],
    )
    return found


def measure_generation(run: Run, title: str) -> dict[str, Any]:
    """Short generations, of new texts; and what a step takes."""
    model, camera = run.model, run.shapes.camera
    found: dict[str, Any] = {}
    for batch, lengths in ((1, (1, 8, 32)), (16 if not run.options.smoke else 2, (1, 8))):
        frames, new = run.frames(batch, camera.cameras, camera.size), texts(12, 12, 7)
        fixed = [next(new) for _ in range(batch)]

        def generate(tokens: int, given: list[str], frames: Tensor = frames) -> object:
            return model.generate(frames, given, resize=None, max_new_tokens=tokens, allowed_tokens=[5])

        for tokens in (*lengths, 80):
            for _ in range(3):
                generate(tokens, fixed)
        step = [timed(run, lambda n=n: generate(n, fixed), 5) for n in (16, 80)]  # noqa: B023
        found[f"B={batch}: a step"] = (quantile(step[1], 0.5) - quantile(step[0], 0.5)) / 64
        for tokens in lengths:
            same = timed(run, lambda n=tokens: generate(n, fixed), run.shapes.generations)  # noqa: B023
            fresh = timed(
                run,
                lambda n=tokens, b=batch: generate(n, [next(new) for _ in range(b)]),  # noqa: B023
                run.shapes.generations,
            )
            found[f"B={batch}: {tokens} tokens"] = quantile(same, 0.5)
            found[f"B={batch}: {tokens} tokens, new texts"] = quantile(fresh, 0.5)
    print_table((title, "ms"), [(name, f"{value:.2f}") for name, value in found.items()])
    return found


def measure_environments(run: Run, title: str) -> dict[str, Any]:
    """A simulator's batch: new texts every call, beside the same texts again and again."""
    batch, camera = run.shapes.environments, run.shapes.camera
    frames, new = run.frames(batch, camera.cameras, camera.size), texts(12, 12, 11)
    equal = [next(new)] * batch
    count = max(4, run.shapes.calls // 8)
    for _ in range(4):
        run.model(frames, equal, resize=None)
    known = timed(run, lambda: run.model(frames, equal, resize=None), count)
    for _ in range(4):
        run.model(frames, [next(new) for _ in range(batch)], resize=None)
    fresh = timed(run, lambda: run.model(frames, [next(new) for _ in range(batch)], resize=None), count)
    found = {"equal known texts": quantile(known, 0.5), "new texts": quantile(fresh, 0.5)}
    print_table((f"{title}, B={batch}", "p50"), [(name, f"{value:.2f}") for name, value in found.items()])
    return found


def measure_long_run(run: Run, calls: int) -> dict[str, Any]:
    """Everything in turn: 1 to 4 cameras of two sizes, texts of 1 to 200 words."""
    rng, new = random.Random(5), texts(*LONG_BOUNDS, 6)
    cases = {(c, size): run.frames(1, c, size) for c in range(1, 5) for size in run.shapes.sizes}
    times: dict[Any, list[float]] = {}
    held = 0.0
    for index in range(calls):
        case = rng.choice([*cases])
        times.setdefault(case, []).extend(timed(run, lambda c=case: run.model(cases[c], [next(new)], resize=None), 1))
        if index == min(1000, calls // 2):
            measure.release(run.device)
            held = measure.held_mib(run.device)["allocated"] if run.device.type == "cuda" else 0.0
    measure.release(run.device)
    grown = (measure.held_mib(run.device)["allocated"] if run.device.type == "cuda" else 0.0) - held
    relative = [t / quantile(row, 0.5) for row in times.values() for t in row]
    found = {"graphs": run.model.graph_count, "grown_mib": grown, "p99.9": quantile(relative, 0.999)}
    print_table((f"{calls} calls", ""), [(name, f"{value:.2f}") for name, value in found.items()])
    return found


def measure_floors(run: Run, step: float) -> dict[str, Any]:
    """The loop beside its matrix products alone, timed alike; a decoding step beside reading the weights once."""
    config, camera, model = run.model.config, run.shapes.camera, run.model
    frames, text = run.frames(camera.batch, camera.cameras, camera.size), next(texts(12, 12, 0))
    tokens = model.processor(frames, [text], resize=None, device=run.device, dtype=model.dtype)["input_ids"].numel()
    tower = peers.products(config.vision, peers.passes_of(config.vision, camera), run.like)
    decoder = whole_peers.products(config.text, tokens, run.like)

    def products() -> None:
        tower()
        decoder()

    loop = {"loop": lambda: model(frames, [text], resize=None), "products alone": products}
    found = {name: row["median"] for name, row in run.times(loop, take=measure.single_times).items()}
    source = torch.empty(2**31 if run.device.type == "cuda" else 2**20, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = run.times({"copy": lambda: target.copy_(source)}, take=measure.device_times)["copy"]["median"]
    read = [*model.language_model.layers.parameters(), model.lm_head.weight]
    found["weights by the copy's bandwidth"] = sum(tensor.nbytes for tensor in read) / (2 * source.nbytes / copy)
    found["a step"] = step
    print_table(("floors", "ms"), [(name, f"{value:.3f}") for name, value in found.items()])
    run.goals += [
        Goal("control loop over the products alone", found["loop"] / found["products alone"], 1.42, 1.25, "x"),
        Goal("decoding step over its weights' bytes", step / found["weights by the copy's bandwidth"], 1.2, 1.08, "x"),
    ]
    return found


@torch.inference_mode()
def run_all(options: Namespace, temporary: str) -> int:
    run, _ = Run.begin(options, SMOKE if options.smoke else FULL, temporary)
    note("without warmup")
    before = run.report["before"] = measure_loop(run, "before")
    has_warmup = hasattr(run.model, "warmup")
    after = before
    if has_warmup:
        camera = run.shapes.camera
        frames = run.frames(camera.batch, camera.cameras, camera.size)
        masks = torch.ones(1, camera.cameras, dtype=torch.bool)
        for mask in (None, masks, masks.to(run.device)):
            options_of_loop = {"max_text_tokens": run.most_tokens(WORD_BOUNDS[1]), "progress": False, "resize": None}
            run.report["warmup"] = str(run.model.warmup(frames, camera_mask=mask, **options_of_loop))
            note(run.report["warmup"])
        after = run.report["after"] = measure_loop(run, "after warmup")
    run.report["generation"] = generation = measure_generation(run, "generate")
    run.report["environments"] = environments = measure_environments(run, "environments")
    run.report["floors"] = measure_floors(run, generation["B=1: a step"])
    if has_warmup and options.calls:
        run.model.clear_graphs()
        for c in range(1, 5):
            for size in run.shapes.sizes:
                run.model.warmup(
                    run.frames(1, c, size), max_text_tokens=run.most_tokens(LONG_BOUNDS[1]), progress=False, resize=None
                )
        run.report["long"] = long = measure_long_run(run, options.calls)
        run.goals += [
            Goal("graphs after the long run", long["graphs"], 64, 40, ""),
            Goal("memory grown after call 1000", long["grown_mib"], 0, None, "MiB"),
            Goal("p99.9 over the shape's own p50", long["p99.9"], 3, 1.5, "x"),
        ]
    set_goals(run, before, after, generation, environments)
    return run.finish("every_call")


def set_goals(run: Run, before: dict, after: dict, generation: dict, environments: dict) -> None:
    fixed = "one text again and again"
    base = after[fixed]["p50"]
    for name, p50, p99 in (
        ("a new text of 12 words", (1.10, 1.05), (1.5, 1.2)),
        ("a new text of 6 to 60 words", (1.20, 1.10), (1.6, 1.3)),
        ("a mask on the host", (1.20, 1.10), (1.6, 1.3)),
        ("a mask on the device", (1.20, 1.10), (1.6, 1.3)),
    ):
        run.goals.append(Goal(f"after warmup: {name}, p50", after[name]["p50"] / base, *p50, "x"))
        run.goals.append(Goal("  p99", after[name]["p99"] / base, *p99, "x"))
        later = before[name]["later"] / before[fixed]["p50"], before[name]["later p99"] / before[fixed]["p50"]
        run.goals.append(Goal("  without, calls 50 on, p50", later[0], 1.3, 1.1, "x"))
        run.goals.append(Goal("  p99", later[1], 3, 1.5, "x"))
    step = generation["B=1: a step"]
    first = generation["B=1: 1 tokens"]
    run.goals.append(Goal("first token beyond the loop, in steps", (first - base) / step, 1.5, 1.1, ""))
    for tokens in (8, 32):
        ratio = (generation[f"B=1: {tokens} tokens"] - first) / (tokens - 1) / step
        run.goals.append(Goal(f"{tokens} tokens beyond the first, a token in steps", ratio, 1.1, 1.05, "x"))
    batch = 2 if run.options.smoke else 16
    ratio = (
        (generation[f"B={batch}: 8 tokens"] - generation[f"B={batch}: 1 tokens"]) / 7 / generation[f"B={batch}: a step"]
    )
    run.goals.append(Goal(f"B={batch}: 8 tokens beyond 1, a token in steps", ratio, 1.15, None, "x"))
    ratio = environments["new texts"] / environments["equal known texts"]
    run.goals.append(Goal("environments: new texts over equal known ones", ratio, 1.03, 1.01, "x"))


if __name__ == "__main__":
    parser = runs.whole_model_parser(__doc__)
    parser.add_argument("--calls", type=int, default=0, help="of the long run after warmup; 0 leaves it out")
    runs.main(parser, run_all)

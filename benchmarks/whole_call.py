"""The whole call, frames in and hidden states out, beside transformers', in one run on one GPU.

    python benchmarks/whole_call.py [--preset 3b] [--keep-checkpoint FOLDER] [--quick]
        [--compiled none|control|batch|all] [--num-layers N] [--norm post|pre]

Real shapes of the 3B model, or of another --preset of any family, whose frames are the nearest multiples of its merged
cells; bfloat16, random weights unless --model names a checkpoint. Hidden states are compared with transformers in
float32 before any time is printed; a wrong one ends the run with exit code 1. The tables say what was measured and
which goals are met, where the model has goals; a missed goal changes no exit code. The last line is JSON.
GR00T N1.7's backbone is --preset cosmos-reason2-2b --num-layers 16 --norm pre.

What each side does within its time, on the same machine, the device idle before and after each call:
  ours      uint8 frames, in pinned host memory or on the GPU, and texts; resize, patches, prompts, both networks
  default   transformers as it loads: the same frames copied to the GPU, resized and cut into patches there by its image
            processor, its model. Token ids and mask are given to it ready made.
  varlen    the same with torch's variable-length attention in the vision tower
  compiled  both networks under torch.compile(mode="reduce-overhead") for this one shape. Pixels, token ids, the vision
            tower's geometry and rope positions are given ready made: it is asked for less than ours is.

Prompts are laid out as "plain", 241 tokens for three views of 224x224 and 40 of text. The published chat template adds
16; that of a written checkpoint, whose small tokenizer cuts its words into letters, 50.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
import whole_peers
from measure import Goal, Rotation, Work, note, print_table
from runs import print_beside_ours, ratio_to_ours, text_of
from torch import Tensor, nn
from waits import traced_waits, waits_raise

from qwen_batched.outputs import VLOutput
from qwen_batched.profile import Latency
from qwen_batched.runtime.cuda_graphs import MAX_GRAPHS
from qwen_batched.transformers_reference import TransformersReference

ROTATION = 6  # batches of frames in turn
ACCURACY_MUST = 1.02  # our deviation from transformers in float32, over that of transformers in our dtype
# A model in bfloat16 deviates by 1.5e-2; frames in the wrong order or a wrong prompt by 1e-1 and more.
PEER_BOUND = 0.05
TEMPLATE = "plain"
HZ = 30.0  # of a robot's control loop
EARLY = 0.2  # of the calls over many shapes: from then on memory may grow no more
FLAT_MIB = 32  # and by so much it may still differ: a few allocator blocks, and a graph for a longer prompt

Size = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """What is measured. `lengths`: of ragged texts, in tokens; `small`: one camera of the calls over `many` shapes."""

    fitted: ClassVar = ("target", "batch", "ragged", "accuracy", "small")
    control: Work
    target: Size
    text_tokens: int
    batch: Work
    ragged: Work
    lengths: tuple[int, int]
    accuracy: tuple[Size, ...]
    calls: int
    paced_calls: int
    small: Size
    many: int


FULL = Shapes(
    control=Work(1, 3, (480, 640)),
    target=(224, 224),
    text_tokens=40,
    batch=Work(8, 3, (448, 448)),
    ragged=Work(16, 2, (224, 224)),
    lengths=(10, 200),
    accuracy=((224, 224), (448, 448)),
    calls=1000,
    paced_calls=300,
    small=(56, 56),
    many=50,
)
SMOKE = Shapes(
    control=Work(1, 2, (60, 80)),
    target=(56, 56),
    text_tokens=6,
    batch=Work(2, 2, (84, 84)),
    ragged=Work(3, 1, (56, 56)),
    lengths=(2, 9),
    accuracy=((56, 56),),
    calls=3,
    paced_calls=2,
    small=(56, 56),
    many=4,
)


@dataclass(frozen=True)
class Case:
    """A call that is timed: batches of frames in turn, and what comes with each."""

    title: str
    frames: list[Tensor]
    texts: list[str]
    size: Size
    resize: Size | None = None


def title_of(work: Work) -> str:
    return f"B={work.batch}, {work.cameras} cameras {work.size[0]}x{work.size[1]}"


@dataclass
class Run(runs.Run):
    """With what the steps ask of the model."""

    def text(self, tokens: int, seed: int = 0) -> str:
        return text_of(self.model.processor.prompts, tokens, seed)

    def call(self, case: Case, **options: Any) -> Callable[[Tensor], VLOutput]:
        options = {"resize": case.resize, "template": TEMPLATE, "norm": self.options.norm} | options
        return lambda frames: self.model(frames, case.texts, **options)

    def ours(self, case: Case) -> Rotation:
        return Rotation(self.call(case), case.frames)

    def control(self, extra_tokens: int = 0, seed: int = 0) -> Case:
        """Frames in host memory, pinned where there is a GPU, to be resized."""
        shapes = self.shapes
        frames = measure.random_frames(shapes.control, ROTATION, torch.device("cpu"))
        frames = [one.pin_memory() for one in frames] if self.device.type == "cuda" else frames
        texts = [self.text(shapes.text_tokens + extra_tokens, seed)] * shapes.control.batch
        title = f"{title_of(shapes.control)} on the host, to {shapes.target[0]}x{shapes.target[1]}"
        return Case(title, frames, texts, shapes.target, resize=shapes.target)

    def batch(self, seed: int = 0) -> Case:
        work = self.shapes.batch
        return self._on_device(work, [self.shapes.text_tokens] * work.batch, seed)

    def ragged(self, equal: bool = False) -> Case:
        """Texts of different lengths; or of one length, with as many tokens together."""
        work, chance = self.shapes.ragged, random.Random(0)
        lengths = [chance.randint(*self.shapes.lengths) for _ in range(work.batch)]
        lengths[lengths.index(max(lengths))] -= sum(lengths) % work.batch
        return self._on_device(work, [sum(lengths) // work.batch] * work.batch if equal else lengths)

    def _on_device(self, work: Work, lengths: Sequence[int], seed: int = 0) -> Case:
        texts = [self.text(tokens, seed + index) for index, tokens in enumerate(lengths)]
        return Case(title_of(work), measure.random_frames(work, ROTATION, self.device), texts, work.size)

    def prepared(self, case: Case) -> dict[str, Tensor]:
        """Our processor's batch."""
        options = {"resize": case.resize, "template": TEMPLATE, "device": self.device, "dtype": self.model.dtype}
        return self.model.processor(case.frames[0], case.texts, **options)

    def prompts(self, case: Case) -> whole_peers.Prompts:
        return whole_peers.Prompts.of(self.prepared(case), self.model.config.vision)


@torch.no_grad()
def run_all(options: argparse.Namespace, temporary: str) -> int:
    run, folder = Run.begin(options, SMOKE if options.smoke else FULL, temporary)
    run.model.requires_grad_(False)
    reference = check_accuracy(run, folder)
    check_graphs(run)
    if options.quick:
        reference = None
        measure.release(run.device)
    if not run.wrong:
        measure_times(run, reference)
        set_goals(run)
    return run.finish("whole_call")


def measure_times(run: Run, reference: TransformersReference | None) -> None:
    towers = {} if reference is None else {"default": reference.visual}
    if towers and run.device.type == "cuda":
        varlen = run.attempt("varlen", partial(peers.with_varlen_attention, reference.visual))
        towers |= {} if varlen is None else {"varlen": varlen}
    cases = {"control": run.control(), "batch": run.batch()}
    run.report["times"] = {name: measure_case(run, name, case, reference, towers) for name, case in cases.items()}
    measure_latency(run, cases["control"])
    measure_ragged(run)
    measure_depth(run, cases)
    count_waits(run)
    measure_memory(run)
    if "varlen" in towers:
        measure_compiled(run, cases, reference, towers["varlen"])


# --- results, before any time ---


def check_accuracy(run: Run, folder: str) -> TransformersReference:
    """Compares last hidden states with transformers in float32. Returns transformers in our dtype."""
    note("hidden states against transformers in float32")
    texts = [run.text(run.shapes.text_tokens), run.text(run.shapes.text_tokens // 3, seed=1)]
    frames = {
        size: peers.soft_frames(2 * run.shapes.control.cameras, size, run.device).unflatten(0, (2, -1))
        for size in run.shapes.accuracy
    }
    load = partial(whole_peers.load, folder, run.options.num_layers, run.options.norm, device=run.device)
    reference = load(dtype=torch.float32)
    expected = {size: whole_peers.hidden_states(reference, x, texts) for size, x in frames.items()}
    del reference
    measure.release(run.device)
    reference = load(dtype=run.model.dtype)
    rows, report = [], run.report.setdefault("accuracy", {})
    for size, x in frames.items():
        out = run.model(x, texts, norm=run.options.norm)
        ours = torch.cat([states[mask] for states, mask in zip(out.last_hidden_state, out.attention_mask, strict=True)])
        theirs = whole_peers.hidden_states(reference, x, texts)
        errors = {name: measure.relative_l2(y, expected[size]) for name, y in (("ours", ours), ("default", theirs))}
        label, ratio = "x".join(map(str, size)), errors["ours"] / errors["default"]
        if not ratio <= ACCURACY_MUST:
            run.wrong.append(f"our deviation is {ratio:.3f} times transformers' at {label}")
        report[label] = errors | {"ratio": ratio}
        rows.append((label, *(f"{error:.2e}" for error in errors.values()), f"{ratio:.3f}"))
    print(
        f"Hidden states' relative L2 distance from transformers' in float32; ratio: ours / default, <= {ACCURACY_MUST}"
    )
    print_table(("size", "ours", "default", "ratio"), rows)
    return reference


def check_graphs(run: Run) -> None:
    """Equal to the last bit with and without a CUDA graph; other shapes, frames and texts are replayed in between."""
    cases = [run.control(), run.control(seed=1), run.batch(), run.batch(seed=1), run.ragged(), run.ragged(equal=True)]
    expected = [run.call(case, cuda_graph=False)(case.frames[0]) for case in cases]

    def equal(index: int) -> bool:
        out, wanted = run.call(cases[index])(cases[index].frames[0]), expected[index]
        pairs = [(getattr(out, name), getattr(wanted, name)) for name in ("last_hidden_state", "image_features")]
        return all(torch.equal(a, b) for a, b in pairs)

    indices = range(len(cases))
    calls = [index for index in indices for _ in range(3)] + list(indices)
    same = run.report["graph_equals_eager"] = all([equal(index) for index in calls])
    print(f"With a CUDA graph and without: {'equal to the last bit' if same else 'DIFFERENT'}\n", flush=True)
    if not same:
        run.wrong.append("hidden states or features differ between graph and eager")


# --- times ---


def measure_case(
    run: Run, name: str, case: Case, reference: TransformersReference | None, towers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Ours and transformers' uncompiled, in turns: wall time of single calls."""
    note(f"times, {name}")
    ours, calls = run.ours(case), {}
    expected = run.call(case)(case.frames[0]).last_hidden_state
    for peer, tower in towers.items():
        model = whole_peers.from_frames(reference, tower, run.prompts(case), case.size)
        states = run.attempt(f"{peer}, {name}", partial(model, case.frames[0]))
        if states is not None and is_right(run, f"{peer}, {name}", measure.relative_l2(states, expected)):
            calls[peer] = Rotation(model, case.frames)
    if calls:
        processor = partial(whole_peers.processed, reference, size=case.size)
        calls["its processor alone"] = Rotation(processor, case.frames)
    times = run.times({"ours": ours, **calls}, take=measure.single_times)
    print_beside_ours(f"{case.title}, to hidden states; wall time of single calls", times)
    return times


def is_right(run: Run, what: str, error: float) -> bool:
    if not error <= PEER_BOUND:
        run.wrong.append(f"transformers' {what} deviates by {error:.1e}")
    return error <= PEER_BOUND


def measure_latency(run: Run, case: Case) -> None:
    """What one caller waits, a thousand times: back to back, and paced as a robot's control loop."""
    note("latency")
    call, shapes = run.ours(case), run.shapes
    found = {
        "back to back": measure.single_times(call, run.device, shapes.calls),
        f"at {HZ:.0f} Hz": measure.paced_times(call, run.device, shapes.paced_calls, HZ),
    }
    run.report["latency"] = {name: asdict(Latency.of(times)) | {"calls": len(times)} for name, times in found.items()}
    print(f"{case.title}: ours, wall ms of single calls, each with other frames")
    columns = ("calls", "p50", "p90", "p99", "worst")
    rows = [(name, *(f"{row[key]:.5g}" for key in columns)) for name, row in run.report["latency"].items()]
    print_table(("", *columns), rows)


def measure_ragged(run: Run) -> None:
    """Texts of different lengths beside texts of one length, as many tokens together."""
    note("ragged texts")
    cases = {"equal lengths": run.ragged(equal=True), "ragged": run.ragged()}
    times = run.times({name: run.ours(case) for name, case in cases.items()}, take=measure.single_times)
    ratio = times["ragged"]["median"] / times["equal lengths"]["median"]
    run.report["ragged"] = times | {"ratio": ratio}
    least, most = run.shapes.lengths
    print(f"{cases['ragged'].title}, texts of {least} to {most} tokens")
    print_table(("", "ms"), [(name, f"{row['median']:.3f}") for name, row in times.items()])


def measure_depth(run: Run, cases: Mapping[str, Case]) -> None:
    """The decoder alone, half of its blocks beside all of them, as CUDA graphs of our own making."""
    note("depth of the decoder")
    decoder, rows = run.model.model, []
    depth = run.model.config.text.num_hidden_layers
    for name, case in cases.items():
        batch = run.prepared(case)
        embeds = torch.randn(*batch["input_ids"].shape, run.model.config.text.hidden_size).to(run.like)
        inputs = {"position_ids": batch["rope_positions"].transpose(0, 1), "attention_mask": batch["attention_mask"]}
        inputs["tokens"] = batch["prepared"].tokens
        run_down_to = partial(decoder, embeds, **inputs)
        calls = {f"{blocks} blocks": partial(run_down_to, layers=(blocks,)) for blocks in (depth // 2, depth)}
        if run.device.type == "cuda":
            calls = {key: measure.captured(call) for key, call in calls.items()}
        times = run.times(calls)
        half, whole = (row["median"] for row in times.values())
        run.report.setdefault("depth", {})[name] = times | {"ratio": half / whole}
        rows.append((case.title, f"{half:.3f}", f"{whole:.3f}", f"{half / whole:.3f}"))
    print_table(("decoder alone, ms", *times, "ratio"), rows)


def measure_compiled(run: Run, cases: Mapping[str, Case], reference: TransformersReference, varlen: nn.Module) -> None:
    """transformers compiled with ours in turns, as many shapes as are asked for and the time for compiling allows."""
    found, started = run.report.setdefault("compiled", {}), time.perf_counter()
    for name, case in cases.items():
        if run.options.compiled not in (name, "all"):
            run.missing[f"compiled, {name}"] = f"--compiled {run.options.compiled}"
            continue
        if time.perf_counter() - started > run.options.compile_seconds:
            run.missing[f"compiled, {name}"] = "no time left for compiling it (--compile-seconds)"
            continue
        note(f"compiling transformers for {name}")
        pixels = [whole_peers.processed(reference, frames, case.size).to(run.model.dtype) for frames in case.frames]
        make = partial(whole_peers.compiled_model, reference, varlen, run.prompts(case), pixels[0])
        made = run.attempt(f"compiled, {name}", make)
        if made is not None and is_right(run, f"compiled, {name}", made[2]):
            calls = {"ours": run.ours(case), "compiled": Rotation(made[0], pixels)}
            found[name] = times = run.times(calls, take=measure.single_times)
            print_beside_ours(f"{case.title}, beside transformers compiled in {made[1]:.0f} s", times)
        del made
    torch.compiler.reset()
    measure.release(run.device)


# --- waits ---


def count_waits(run: Run) -> None:
    """What the second and the third call of a shape wait for: PyTorch is to raise, and a trace to show."""
    note("synchronisations and copies to the host")
    found = run.report["waits"] = {"raised": None, "traced": None}
    calls = []
    for extra in (1, 2):  # two shapes that have not been seen
        case = run.control(extra)
        calls.append(run.ours(case))
        calls[-1]()
    try:
        with waits_raise(run.device):
            for _ in range(2):
                calls[0]()
    except RuntimeError as error:
        found["raised"] = str(error).splitlines()[0]
    found["traced"] = run.attempt("trace of a call", partial(traced_waits, calls[1], run.device))
    print(f"Second and third call of a shape: {found['raised'] or 'no wait raised'}; trace: {found['traced']}\n")


# --- memory ---


def measure_memory(run: Run) -> None:
    """Calls over many shapes in random order: text alone, and with a small camera, through two decoder blocks."""
    note("memory over many shapes")
    options, shapes, chance, device = run.options, run.shapes, random.Random(0), run.device
    frames = measure.random_frames(Work(1, 1, shapes.small), 1, device)[0]
    texts = [run.text(tokens) for tokens in range(1, shapes.many + 1)]
    calls = [partial(run.model, frames if i % 2 else None, [text], layers=(2,)) for i, text in enumerate(texts)]
    run.model.to(device)  # lets go of the graphs that there are
    measure.release(device)
    limit = 3 * len(calls) if options.smoke else options.memory_calls
    started, samples = time.perf_counter(), []
    for done in range(1, limit + 1):
        chance.choice(calls)()
        late = time.perf_counter() - started > options.memory_seconds
        if done % max(1, limit // 500) == 0 or done == limit or late:
            samples.append({"calls": done, **measure.held_mib(device), "graphs": len(run.model._calls.decoder)})
        if late:
            break
    last = samples[-1]
    early = next(sample for sample in samples if sample["calls"] >= EARLY * last["calls"])
    seconds = time.perf_counter() - started
    run.report["memory"] = {"early": early, "last": last, "shapes": len(calls), "seconds": seconds}
    print(f"Memory (MiB) over {len(calls)} shapes in random order, {seconds:.0f} s")
    print_table(
        tuple(last), [tuple(f"{value:.1f}".removesuffix(".0") for value in row.values()) for row in (early, last)]
    )


# --- goals ---


def set_goals(run: Run) -> None:
    report = run.report
    control, batch = report["times"]["control"], report["times"]["batch"]
    compiled = report.get("compiled", {})
    latency, memory, waits = report["latency"]["back to back"], report["memory"], report["waits"]
    grown = max(memory["last"][kind] - memory["early"][kind] for kind in ("allocated", "reserved"))
    seen = (waits["raised"] is not None) + sum((waits["traced"] or {}).values())
    seen = None if waits["traced"] is None and not seen else seen
    at, batch_at = title_of(run.shapes.control), title_of(run.shapes.batch)
    worst = max(row["ratio"] for row in report["accuracy"].values())
    depth = max(row["ratio"] for row in report["depth"].values())
    run.goals += [
        Goal("deviation over transformers' own, worst size", worst, ACCURACY_MUST, None, "x"),
        Goal("waits and copies to the host, second and third call", seen, 0, 0),
        Goal(f"memory, {memory['early']['calls']} to {memory['last']['calls']} calls", grown, FLAT_MIB, 0, "MiB grown"),
        Goal("graphs held after them", memory["last"]["graphs"], MAX_GRAPHS),
        Goal(f"B={run.shapes.ragged.batch}, ragged over equal lengths", report["ragged"]["ratio"], 1.15, 1.05, "x"),
        Goal("decoder, half of its blocks over all", depth, 0.55, 0.51, "x"),
    ]
    if not run.has_goals:
        return
    run.goals += [
        Goal(f"{at}: p50", latency["p50"], 6.5, 5.3, "ms"),
        Goal("  over transformers' default", ratio_to_ours(control, "default"), 12, None, "x", at_least=True),
        Goal("  over its compiled", ratio_to_ours(compiled.get("control"), "compiled"), 1.9, None, "x", at_least=True),
        Goal("  p99 / p50", latency["p99"] / latency["p50"], 1.15, 1.05, "x"),
        Goal(batch_at, batch["ours"]["median"], 130, 115, "ms"),
        Goal("  over transformers' varlen", ratio_to_ours(batch, "varlen"), 2.2, None, "x", at_least=True),
        Goal("  over its compiled", ratio_to_ours(compiled.get("batch"), "compiled"), 1.2, None, "x", at_least=True),
    ]


if __name__ == "__main__":
    parser = runs.whole_model_parser(__doc__)
    parser.add_argument("--norm", choices=("post", "pre"), default="post", help="hidden states after the final norm")
    parser.add_argument("--memory-calls", type=int, default=10_000, help="calls over many shapes")
    parser.add_argument("--memory-seconds", type=float, default=30, help="no more of them after that long")
    runs.main(parser, run_all)

"""Generation beside transformers', in one run on one GPU: milliseconds a decoding step, and time to the first token.

    python benchmarks/generation.py [--preset 3b] [--keep-checkpoint FOLDER] [--quick] [--batches 1 16 64]
        [--compiled none|control|batch|all]

Real shapes of the 3B model, or of another --preset of any family, whose frames are the nearest multiples of its merged
cells; bfloat16, random weights unless --model names a checkpoint. Before any time is printed, greedy tokens in float32
are compared with transformers', and a CUDA graph's tokens with those made without; a wrong one ends the run with exit
code 1. The tables say what was measured and which goals are met, where the model has goals; a missed goal changes no
exit code. The last line is JSON.

A step's time is the difference of a long and a short `generate` over the difference of their tokens: prompts, a graph's
capture and all else that a call does once drop out. No token ends a sample. All are greedy:
  ours      `model.generate`, from uint8 frames on the GPU
  default   transformers' `generate` with the dynamic cache that it takes by itself
  compiled  the same with cache_implementation="static", whose steps transformers compiles by itself, with CUDA graphs
  products  the matrix products of one step and nothing else, in one CUDA graph: the packed ones of every block, and the
            output projection. PyTorch's own; kernels made for few rows can be faster.
transformers gets pixels and token ids ready made, so that its first token is asked for less than ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
import transformers
import whole_peers
from measure import Goal, Work, note
from runs import print_beside_ours, ratio_to_ours, text_of
from torch import Tensor

from qwen_batched import QwenBatchedVL, TensorProcessor
from qwen_batched.transformers_reference import TransformersReference

PADDING_SIDES = ("left", "right")
# Milliseconds a step that must be reached, and should be, by batch.
STEP_GOALS = {1: (2.6, 1.8), 16: (2.9, 2.2), 64: (3.6, 2.8)}
COMPILED_MUST = 1.8  # times as fast as transformers' compiled static cache, B=1


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Attributes:
        camera: One sample's frames.
        context: Tokens of each prompt, images included.
        batches: Samples. transformers is timed at the first two, called control and batch.
        short, long: New tokens of the two calls whose difference is timed.
        checked: New tokens that are compared in float32.
        checked_size: Of the frames there.
        lengths: Of the texts there, in tokens.
    """

    fitted: ClassVar = ("camera", "checked_size")
    camera: Work
    context: int
    batches: tuple[int, ...]
    short: int
    long: int
    checked: int
    checked_size: tuple[int, int]
    lengths: tuple[int, ...]


FULL = Shapes(
    camera=Work(1, 3, (224, 224)),
    context=300,
    batches=(1, 16, 64),
    short=16,
    long=80,
    checked=64,
    checked_size=(140, 196),
    lengths=(5, 40, 110),
)
SMOKE = Shapes(
    camera=Work(1, 2, (56, 56)),
    context=60,
    batches=(1, 2),
    short=2,
    long=5,
    checked=6,
    checked_size=(56, 84),
    lengths=(2, 9),
)

Generate = Callable[[int], Tensor]  # the number of new tokens to the tokens (B, count)


@dataclass(frozen=True)
class Inputs:
    """Frames (B, V, 3, H, W), uint8 noise, and B texts."""

    frames: Tensor
    texts: list[str]


@dataclass
class Run(runs.Run):
    """With what the steps ask of the model."""

    @property
    def steps(self) -> int:
        """Whose time the difference of two calls is."""
        return self.shapes.long - self.shapes.short

    def text(self, tokens: int, seed: int = 0) -> str:
        return text_of(self.model.processor.prompts, tokens, seed)

    def inputs(self, batch: int) -> Inputs:
        """`batch` prompts of `context` tokens."""
        camera, context = self.shapes.camera, self.shapes.context
        frames = measure.random_frames(dataclasses.replace(camera, batch=batch), 1, self.device)[0]
        besides = self.prepared(Inputs(frames[:1], [self.text(1)]))["input_ids"].shape[1] - 1
        inputs = Inputs(frames, [self.text(context - besides, seed) for seed in range(batch)])
        found = self.prepared(inputs)["input_ids"].shape[1]
        if found != context:
            raise RuntimeError(f"prompts have {found} tokens, not {context}")
        return inputs

    def prepared(self, inputs: Inputs) -> dict[str, Tensor]:
        """Our processor's batch."""
        options = {"resize": None, "device": self.device, "dtype": self.model.dtype}
        return self.model.processor(inputs.frames, inputs.texts, **options)

    def ours(self, inputs: Inputs, **options: Any) -> Generate:
        def generate(count: int) -> Tensor:
            out = self.model.generate(inputs.frames, inputs.texts, max_new_tokens=count, resize=None, **options)
            return torch.stack(out.token_ids)

        return generate

    def theirs(self, reference: TransformersReference, inputs: Inputs, **options: Any) -> Generate:
        pixels = whole_peers.processed(reference, inputs.frames, self.shapes.camera.size).to(self.model.dtype)
        prompts = whole_peers.Prompts.of(self.prepared(inputs), self.model.config.vision)
        return whole_peers.generation(reference, prompts, pixels, **options)

    def step_times(self, calls: dict[str, Generate], **options: Any) -> dict[str, Any]:
        """Spreads of milliseconds a step, by name."""
        shapes, steps = self.shapes, self.steps

        def take(call: Callable[..., Tensor], device: torch.device, turns: int) -> list[float]:
            found = []
            for _ in range(turns):
                short, long = (
                    measure.single_times(partial(call, count), device, 1)[0] for count in (shapes.short, shapes.long)
                )
                found.append((long - short) / steps)
            return found

        def timed(generate: Generate) -> Callable[..., Tensor]:
            return lambda count=shapes.long: generate(count)  # warmed up with long ones

        timed_calls = {name: timed(generate) for name, generate in calls.items()}
        return self.times(timed_calls, seconds=2.0, take=take, warm_up=2, most=8, **options)


@torch.no_grad()
def run_all(options: argparse.Namespace, temporary: str) -> int:
    transformers.logging.set_verbosity_error()
    shapes = SMOKE if options.smoke else FULL
    if options.batches:
        shapes = dataclasses.replace(shapes, batches=tuple(options.batches))
    run, folder = Run.begin(options, shapes, temporary)
    run.model.requires_grad_(False)
    check_identity(run, folder)
    run.model.generation_config = dataclasses.replace(run.model.generation_config, eos_token_ids=())
    check_graphs(run)
    if not run.wrong:
        reference = None
        if not options.quick:
            reference = TransformersReference.from_pretrained(folder, dtype=run.model.dtype, device=run.device)
        for batch in shapes.batches:
            measure_batch(run, batch, reference if batch in shapes.batches[:2] else None)
        if reference is not None:
            measure_compiled(run, reference)
        set_goals(run)
    return run.finish("generation")


# --- results, before any time ---


def check_identity(run: Run, folder: str) -> None:
    """Greedy tokens in float32 beside transformers', a ragged batch on both padding sides and each sample alone."""
    note("greedy tokens in float32 against transformers")
    shapes = run.shapes
    frames = peers.soft_frames(len(shapes.lengths), shapes.checked_size, run.device)[:, None]
    inputs = Inputs(frames, [run.text(tokens, seed) for seed, tokens in enumerate(shapes.lengths)])
    expected = their_float32_tokens(run, folder, inputs)
    measure.release(run.device)
    found = our_float32_tokens(run, folder, inputs)
    measure.release(run.device)
    equal = {name: rows == expected for name, rows in found.items()}
    for name, rows in found.items():
        for index, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
            same = next((i for i, (a, b) in enumerate(zip(row, wanted, strict=False)) if a != b), None)
            if row != wanted:
                run.wrong.append(f"float32 tokens of sample {index}, {name}, leave transformers' at token {same}")
    tokens = sum(map(len, expected))
    run.report["identity"] = {"tokens": tokens, "text_tokens": shapes.lengths, "equal": equal}
    outcome = "equal to transformers'" if all(equal.values()) else "DIFFERENT from transformers'"
    print(f"{tokens} greedy tokens in float32, {', '.join(found)}: {outcome}\n", flush=True)


def their_float32_tokens(run: Run, folder: str, inputs: Inputs) -> list[list[int]]:
    """Sample by sample."""
    reference = TransformersReference.from_pretrained(folder, dtype=torch.float32, device=run.device)
    prepared = (
        reference.processor_inputs(list(one), text) for one, text in zip(inputs.frames, inputs.texts, strict=True)
    )
    return [reference.greedy(one, run.shapes.checked).tolist() for one in prepared]


def our_float32_tokens(run: Run, folder: str, inputs: Inputs) -> dict[str, list[list[int]]]:
    model = QwenBatchedVL.from_pretrained(folder, dtype=torch.float32, device=run.device).requires_grad_(False)

    def generate(samples: slice) -> list[list[int]]:
        out = model.generate(inputs.frames[samples], inputs.texts[samples], max_new_tokens=run.shapes.checked)
        return [row.tolist() for row in out.token_ids]

    found = {"alone": [row for index in range(len(inputs.texts)) for row in generate(slice(index, index + 1))]}
    for side in PADDING_SIDES:
        model.processor = TensorProcessor.from_pretrained(folder, padding_side=side)
        found[f"padding on the {side}"] = generate(slice(None))
    return found


def check_graphs(run: Run) -> None:
    """The same greedy tokens with and without a CUDA graph."""
    note("tokens with and without a CUDA graph")
    equal = run.report["graph_equals_eager"] = {}
    for batch in run.shapes.batches:
        inputs = run.inputs(batch)
        with_graph, without = (run.ours(inputs, cuda_graph=graph)(run.shapes.long) for graph in (True, False))
        equal[str(batch)] = torch.equal(with_graph, without)
        if not equal[str(batch)]:
            run.wrong.append(f"tokens differ between graph and eager, B={batch}")
    outcome = "equal" if all(equal.values()) else f"DIFFERENT: {equal}"
    print(f"Greedy tokens in {run.model.dtype}, with a CUDA graph and without: {outcome}\n", flush=True)


# --- times ---


def measure_batch(run: Run, batch: int, reference: TransformersReference | None) -> None:
    """A step and the first token: ours, transformers' uncompiled, and the products alone."""
    note(f"times, B={batch}")
    inputs = run.inputs(batch)
    calls = {"ours": run.ours(inputs)}
    if reference is not None:
        default = run.attempt(f"default, B={batch}", partial(warmed, run, run.theirs(reference, inputs)))
        calls |= {} if default is None else {"default": default}
    steps = run.step_times(calls, rounds=1)
    products = whole_peers.products(run.model.config.text, batch, run.like, head=True)
    steps |= run.times({"products": products})
    first = run.times({name: partial(call, 1) for name, call in calls.items()}, take=measure.single_times)
    run.report.setdefault("step", {})[str(batch)] = steps
    run.report.setdefault("first_token", {})[str(batch)] = first
    print_beside_ours(f"{title(run, batch)}: a step; {tokens_per_second(steps, batch)}", steps)
    print_beside_ours(f"{title(run, batch)}: to the first token", first)
    del products
    measure.release(run.device)


def warmed(run: Run, generate: Generate) -> Generate:
    """The same, after a call that shows whether it runs at all."""
    generate(run.shapes.short)
    return generate


def measure_compiled(run: Run, reference: TransformersReference) -> None:
    """transformers' compiled static cache with ours in turns, as many batches as the time for compiling allows."""
    found, started = run.report.setdefault("compiled", {}), time.perf_counter()
    for name, batch in zip(("control", "batch"), run.shapes.batches, strict=False):
        label = f"compiled, B={batch}"
        if run.device.type != "cuda":
            run.missing[label] = "transformers compiles on a GPU only"
        elif run.options.compiled not in (name, "all"):
            run.missing[label] = f"--compiled {run.options.compiled}"
        elif time.perf_counter() - started > run.options.compile_seconds:
            run.missing[label] = "no time left for compiling it (--compile-seconds)"
        else:
            times = run.attempt(label, partial(compiled_times, run, reference, batch))
            found |= {} if times is None else {str(batch): times}


def compiled_times(run: Run, reference: TransformersReference, batch: int) -> dict[str, Any]:
    note(f"compiling transformers' step, B={batch}")
    inputs, started = run.inputs(batch), time.perf_counter()
    # A second batch size of one function would be compiled for any, slower.
    torch.compiler.reset()
    vars(reference.model).pop("_compiled_call", None)
    compiled = run.theirs(reference, inputs, cache_implementation="static")
    compiled(run.shapes.long)  # the longest first: later caches are no shorter, and nothing is compiled again
    seconds = time.perf_counter() - started
    steps = run.step_times({"ours": run.ours(inputs), "compiled": compiled}, rounds=1)
    print_beside_ours(f"{title(run, batch)}: a step, beside transformers compiled in {seconds:.0f} s", steps)
    return steps | {"compile_seconds": seconds}


def title(run: Run, batch: int) -> str:
    shapes = run.shapes
    camera = shapes.camera
    return f"B={batch}, context {shapes.context} with {camera.cameras} cameras {camera.size[0]}x{camera.size[1]}"


def tokens_per_second(steps: dict[str, Any], batch: int) -> str:
    return f"ours makes {batch * 1e3 / steps['ours']['median']:.0f} tokens/s"


# --- goals ---


def set_goals(run: Run) -> None:
    if not run.has_goals:
        return
    report = run.report
    for batch, (must, aim) in STEP_GOALS.items():
        label = str(batch)
        if label in report["step"]:
            run.goals.append(Goal(f"step, B={batch}", report["step"][label]["ours"]["median"], must, aim, "ms"))
    ratio = ratio_to_ours(report.get("compiled", {}).get("1"), "compiled")
    run.goals.append(Goal("step, B=1, over transformers' compiled", ratio, COMPILED_MUST, None, "x", at_least=True))


if __name__ == "__main__":
    parser = runs.whole_model_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", help="which batch sizes; left out: 1, 16 and 64")
    runs.main(parser, run_all)

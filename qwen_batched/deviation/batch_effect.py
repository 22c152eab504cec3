"""How much a sample's result changes with the batch that it is in: its neighbours, padding, and how many they are.

Each implementation is measured from its own result for the sample alone, in the same dtype: final hidden states on the
sample's own tokens. transformers' batches are padded on the left, as its processor pads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.cases import Case
from qwen_batched.deviation.comparison import FLOAT32_BOUND, OURS, THEIRS, Plan
from qwen_batched.deviation.loading import load_ours, load_theirs
from qwen_batched.deviation.measures import Distance
from qwen_batched.deviation.ours import call
from qwen_batched.transformers_reference import without_tf32

LONG_TEXT = " ".join(["then open the drawer and move the arm to the sink"] * 12)
COPIES = 4

NEIGHBOURS, OTHERS = "beside its neighbours", "beside other neighbours"
LONG, COPIED = "beside a long text", f"in a batch of {COPIES} times as many"
SITUATIONS = (NEIGHBOURS, OTHERS, LONG, COPIED)

RunBatch = Callable[[Case], list[Tensor]]  # final hidden states (T, D) of each sample


@dataclass(frozen=True)
class Change:
    """What a situation does to the samples of a case."""

    distance: Distance  # from the samples alone, over all their tokens
    worst: float  # largest relative L2 of a sample
    exact: int  # how many samples are the same to the last bit
    samples: int


Changes = dict[tuple[str, torch.dtype, str, str], Change]  # by whose, dtype, case and situation


def measure_batch_effect(plan: Plan, bar: tqdm) -> Changes:
    """Runs every situation of every case, in both implementations and all dtypes."""
    changes: Changes = {}
    bar.reset(total=2 * len(plan.dtypes) * sum(case.pixels for case in plan.cases))
    for dtype in plan.dtypes:
        for who, run in ((OURS, _our_batches), (THEIRS, _their_batches)):
            run_batch = run(plan, dtype)
            for case in plan.cases:
                bar.set_description(f"{who} {dtype_name(dtype)} {case.label}")
                for situation, change in _changes(case, run_batch):
                    changes[who, dtype, case.label, situation] = change
                bar.update(case.pixels)
            del run_batch
    return changes


def text(plan: Plan, changes: Changes, title: str) -> str:
    """A table, and whether ours keeps its promise."""
    width = max(map(len, SITUATIONS))
    heads = "".join(f"   {dtype_name(dtype):<21}" for dtype in plan.dtypes)
    columns = f"   {'ours':>10} {'theirs':>10}" * len(plan.dtypes)
    lines = [
        "What a sample's final hidden states are moved by: relative L2 from the sample alone, the worst of any sample",
        title,
        "",
        f"{'':<{width}}  {'':>9}{heads}".rstrip(),
        f"{'':<{width}}  {'size':>9}{columns}",
        "-" * (width + 11 + len(columns)),
    ]
    for situation in SITUATIONS:
        for case in plan.cases:
            name = situation if case is plan.cases[0] else ""
            pairs = [[changes[who, dtype, case.label, situation] for who in (OURS, THEIRS)] for dtype in plan.dtypes]
            cells = "".join("  " + "".join(f" {_in_short(change):>10}" for change in pair) for pair in pairs)
            lines.append(f"{name:<{width}}  {case.label:>9}{cells}")
    broken = broken_promises(changes)
    shown = [f"  {case}, {situation}: {change.worst:.2e}" for (_, _, case, situation), change in broken]
    verdict = f"MISSED: ours in float32 moves by more than {FLOAT32_BOUND:.0e}:" if broken else "All bounds hold: "
    if not broken and torch.float32 in plan.dtypes:
        verdict += f"ours in float32 moves by {FLOAT32_BOUND:.0e} at most."
    return "\n".join([*lines, "", verdict, *shown])


def broken_promises(changes: Changes) -> list[tuple[tuple[str, torch.dtype, str, str], Change]]:
    """Where a sample feels its batch, in our float32."""
    ours = [(key, change) for key, change in changes.items() if key[:2] == (OURS, torch.float32)]
    return [(key, change) for key, change in ours if not change.worst <= FLOAT32_BOUND]


def as_json(changes: Changes) -> list[dict[str, Any]]:
    """One row for each."""
    names = ("run", "size", "situation", "worst_relative_l2", "min_cosine", "equal_to_the_last_bit", "samples")
    rows = (
        (f"{who} {dtype_name(dtype)}", *where, change.worst, change.distance.min_cosine, change.exact, change.samples)
        for (who, dtype, *where), change in changes.items()
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


def _changes(case: Case, run_batch: RunBatch) -> Iterator[tuple[str, Change]]:
    samples = range(len(case.texts))
    alone = [run_batch(case.part([sample]))[0] for sample in samples]
    yield NEIGHBOURS, _change(run_batch(case), alone)

    def with_other_neighbours(sample: int) -> Tensor:
        """Those of the next samples turned upside down, with their texts turned round."""
        rest = [(sample + 1 + step) % len(samples) for step in range(max(1, len(samples) - 1))]
        batch = case.part([sample, *rest])
        cameras = tuple(torch.cat((frames[:1], frames[1:].flip(2))) for frames in batch.cameras)
        return run_batch(Case(case.label, cameras, (batch.texts[0], *(other[::-1] for other in batch.texts[1:]))))[0]

    yield OTHERS, _change([with_other_neighbours(sample) for sample in samples], alone)

    def beside_a_long_text(sample: int) -> Tensor:
        batch = case.part([sample, (sample + 1) % len(samples)])
        return run_batch(Case(case.label, batch.cameras, (batch.texts[0], LONG_TEXT)))[0]

    yield LONG, _change([beside_a_long_text(sample) for sample in samples], alone)

    yield COPIED, _change(run_batch(case.part([*samples] * COPIES)), alone * COPIES)


def _change(values: Sequence[Tensor], alone: Sequence[Tensor]) -> Change:
    each = [Distance() for _ in alone]
    for distance, value, single in zip(each, values, alone, strict=True):
        distance.add(value, single)
    exact = sum(torch.equal(value, single) for value, single in zip(values, alone, strict=True))
    return Change(Distance.pooled(each), max(distance.relative_l2 for distance in each), exact, len(each))


def _our_batches(plan: Plan, dtype: torch.dtype) -> RunBatch:
    model = load_ours(plan.folder, dtype, plan.device, plan.processor.resample_backend)

    @torch.inference_mode()
    @without_tf32()
    def run_batch(case: Case) -> list[Tensor]:
        out = call(model, case)
        return [rows[own] for rows, own in zip(out.last_hidden_state, out.attention_mask, strict=True)]

    return run_batch


def _their_batches(plan: Plan, dtype: torch.dtype) -> RunBatch:
    reference = load_theirs(plan.folder, dtype, plan.device, plan.processor.resample_backend)

    def run_batch(case: Case) -> list[Tensor]:
        samples = range(len(case.texts))
        inputs = [reference.processor_inputs(case.frames(i), case.texts[i], resize_on_gpu=True) for i in samples]
        return reference.final_hidden_states(inputs)

    return run_batch


def _in_short(change: Change) -> str:
    return "none" if change.exact == change.samples else f"{change.worst:.2e}"

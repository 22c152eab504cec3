"""The findings as a table for people and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.bounds import Miss, ratio
from qwen_batched.deviation.comparison import OURS, THEIRS, Findings, Plan
from qwen_batched.deviation.measures import Continuation, Distance, Equality, Measure
from qwen_batched.deviation.stages import FINAL

Find = Callable[[str, torch.dtype], Measure | None]  # by whose run it is and in which dtype

MOST_MISSES = 10  # that are printed; JSON has all
RELATIVE, COSINES, MEANS = "{:>8}", "{:>7}", "{:>7}"


def table(plan: Plan, findings: Findings, misses: Sequence[Miss], title: str) -> str:
    """Every stage over all sizes, then the final hidden states size by size, then what was missed."""
    with_float64 = any(run == (THEIRS, torch.float32) for run, _, _ in findings.measures)
    missed = {name for miss in misses for name in (miss.first, miss.stage)}
    width = max(len(name) for name in (*plan.stages.names, *(case.label for case in plan.cases)))

    def row(name: str, find: Find) -> str:
        return f"{name:<{width}}" + "".join(_cells(find, dtype, with_float64) for dtype in plan.dtypes)

    stages = [row(stage, lambda *run, stage=stage: findings.pooled(run, stage)) for stage in plan.stages.names]
    sizes = [row(case.label, lambda *run, case=case: findings.get(run, case.label, FINAL)) for case in plan.cases]
    marks = ["  MISSED" if stage in missed else "" for stage in plan.stages.names]
    lines = [
        f"Deviation from transformers {transformers.__version__} in float32, one sample at a time",
        title,
        "Ours and theirs are both measured from that; ratio: ours over theirs; mean d: mean of |d| / (|r| + 1).",
        *["In float32, theirs is transformers' own deviation from its float64."] * with_float64,
        "",
        *_heads("all sizes together", width, plan.dtypes, with_float64),
        *((line + mark).rstrip() for line, mark in zip(stages, marks, strict=True)),
        "",
        *_heads(FINAL, width, plan.dtypes, with_float64),
        *map(str.rstrip, sizes),
        "",
        *findings.notes,
        *verdict(plan, misses),
    ]
    return "\n".join(lines)


def verdict(plan: Plan, misses: Sequence[Miss]) -> list[str]:
    """Whether all bounds hold, and which do not."""
    if not misses:
        return [f"All bounds hold, at {len(plan.stages.names)} stages and {len(plan.cases)} sizes."]
    shown = [f"  {miss}" for miss in misses[:MOST_MISSES]]
    more = [f"  and {len(misses) - len(shown)} more"] * (len(misses) > len(shown))
    return [f"MISSED {len(misses)} bounds. It first went wrong at: {misses[0].first}", *shown, *more]


def as_json(plan: Plan, findings: Findings, misses: Sequence[Miss]) -> dict[str, Any]:
    """Everything that was measured."""
    runs = sorted({run for run, _, _ in findings.measures}, key=str)
    sizes = [case.label for case in plan.cases]

    def numbers(stage: str, size: str | None = None) -> dict[str, Any]:
        find = (lambda run: findings.get(run, size, stage)) if size else lambda run: findings.pooled(run, stage)
        found = {f"{who} {dtype_name(dtype)}": find((who, dtype)) for who, dtype in runs}
        return {name: _finite(measure.numbers()) for name, measure in found.items() if measure is not None}

    return {
        "stages": list(plan.stages.names),
        "sizes": sizes,
        "all_sizes": {stage: numbers(stage) for stage in plan.stages.names},
        "by_size": {size: {stage: numbers(stage, size) for stage in plan.stages.names} for size in sizes},
        "notes": findings.notes,
        "missed": [_finite(vars(miss)) for miss in misses],
        "first_wrong": misses[0].first if misses else None,
    }


def environment(device: torch.device) -> dict[str, str]:
    """Versions and the machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def dumps(facts: Any, depth: int = 3) -> str:
    """JSON with a line for each value down to that depth, so that a file can be read and compared by lines."""
    if depth == 0 or not facts or not isinstance(facts, dict | list):
        return json.dumps(facts, allow_nan=False, default=str)
    indent = " " * (4 - depth)
    if isinstance(facts, list):
        return "[\n" + ",\n".join(f"{indent}{dumps(value, 0)}" for value in facts) + f"\n{indent[1:]}]"
    lines = [f"{indent}{json.dumps(name)}: {dumps(value, depth - 1)}" for name, value in facts.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent[1:]}}}"


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither infinity nor NaN: they become words."""
    return {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in numbers.items()}


# --- the table ---


def _groups(dtype: torch.dtype, with_float64: bool) -> list[tuple[str, str]]:
    """Titles of groups of columns, and the columns'."""
    pair = " ".join(COSINES.format(who) for who in (OURS, THEIRS))
    both = " ".join(RELATIVE.format(who) for who in (OURS, THEIRS)) + f" {'ratio':>5}"
    if dtype == torch.float32:
        return [("float32 rel. L2", both if with_float64 else RELATIVE.format(OURS)), ("mean d", MEANS.format(OURS))]
    others = ("1 - cosine, worst", "1 - cosine, median", "mean d")
    return [(f"{dtype_name(dtype)} relative L2", both), *((title, pair) for title in others)]


def _heads(first: str, width: int, dtypes: Sequence[torch.dtype], with_float64: bool) -> list[str]:
    groups = [group for dtype in dtypes for group in _groups(dtype, with_float64)]
    widths = [max(len(title), len(columns)) for title, columns in groups]
    upper = "".join(f"   {title:<{size}}" for (title, _), size in zip(groups, widths, strict=True))
    lower = "".join(f"   {columns:>{size}}" for (_, columns), size in zip(groups, widths, strict=True))
    return [f"{'':<{width}}{upper}".rstrip(), f"{first:<{width}}{lower}", "-" * (width + len(lower))]


def _cells(find: Find, dtype: torch.dtype, with_float64: bool) -> str:
    ours, theirs = find(OURS, dtype), find(THEIRS, dtype)
    groups = _groups(dtype, with_float64)
    widths = [max(len(title), len(columns)) for title, columns in groups]
    if not isinstance(ours, Distance):
        return f"   {_in_words(ours, theirs):<{sum(widths) + 3 * (len(groups) - 1)}}"
    relative, mean = [RELATIVE.format(f"{ours.relative_l2:.2e}")], [MEANS.format(f"{ours.mean_relative:.1e}")]
    cells = [relative, mean]
    if with_float64 or dtype != torch.float32:
        relative += [RELATIVE.format("" if theirs is None else f"{theirs.relative_l2:.2e}"), _ratio(ours, theirs)]
    if dtype != torch.float32:
        pairs = [(ours.min_cosine, theirs.min_cosine), (ours.median_cosine, theirs.median_cosine)]
        cells = [relative, *([COSINES.format(f"{1 - cosine:.1e}") for cosine in pair] for pair in pairs), mean]
        mean.append(MEANS.format(f"{theirs.mean_relative:.1e}"))
    return "".join(f"   {' '.join(group):>{size}}" for group, size in zip(cells, widths, strict=True))


def _ratio(ours: Distance, theirs: Distance | None) -> str:
    quotient = ratio(ours, theirs)
    return f"{quotient:5.3f}" if quotient is not None and quotient < 100 else " " * 5


def _in_words(ours: Measure | None, theirs: Measure | None) -> str:
    if isinstance(ours, Equality):
        return f"{ours.different} of {ours.total} differ" if ours.different else "equal"
    if isinstance(ours, Continuation):
        ties = f", {ours.ties} ties" if ours.ties else ""
        own = f", of theirs {theirs.agreeing}" if isinstance(theirs, Continuation) else ""
        return f"{ours.agreeing} of {ours.total} agree{own}{ties}"
    return "not measured"

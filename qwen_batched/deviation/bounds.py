"""What must hold of the findings, and where it first does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.comparison import FLOAT32_BOUND, OURS, THEIRS, Findings, Plan
from qwen_batched.deviation.measures import Continuation, Distance, Equality
from qwen_batched.deviation.stages import FEATURES, FINAL, LOGITS, PIXELS, decoder_stage

# float32: relative L2 of every stage, or so many times transformers' own float32 against float64 where that is larger.
OWN_FACTOR = 2.0
# float32, final hidden states, mean |d| / (|r| + 1): a hundredth of what an earlier implementation reported.
MEAN_RELATIVE_BOUND = 4.4e-6
# Other dtypes: our relative L2 over transformers' own, of the final hidden states and of what else callers take.
FINAL_RATIO_BOUND, RATIO_BOUND = 1.02, 1.05
# Our worst token's 1 - cosine over transformers' own worst token's, of the final hidden states. With trained-like
# weights in a model of a real width ours must be no worse. Elsewhere chance has room: with 512 channels the worst
# tokens of two runs that are equally good differ by 10% or so.
COSINE_FACTOR, COSINE_FACTOR_BY_CHANCE, REAL_WIDTH = 1.0, 1.25, 2048
ALL_CASES = "all sizes together"


@dataclass(frozen=True)
class Miss:
    """A bound that does not hold."""

    stage: str  # where it was looked at
    case: str  # on which frames
    what: str  # the number's name
    value: float
    bound: float  # what it should be at most, or at least
    first: str  # the stage where it first went wrong, which may be an earlier one

    def __str__(self) -> str:
        return f"{self.stage}, {self.case}: {self.what} {self.value:.7g}, bound {self.bound:.7g}"


def misses(plan: Plan, findings: Findings) -> list[Miss]:
    """All bounds that do not hold, the earliest stage first."""
    found: list[Miss] = []
    order = {stage: index for index, stage in enumerate(plan.stages.names)}
    for case in plan.cases:
        for stage in order:
            found += _exact_misses(plan, findings, case.label, stage)
            if torch.float32 in plan.dtypes:
                found += _float32_misses(findings, case.label, stage)
    for dtype in plan.dtypes:
        if dtype != torch.float32:
            found += _low_precision_misses(plan, findings, dtype)
    return sorted(found, key=lambda miss: order[miss.first])


def ratio(ours: Distance | None, theirs: Distance | None) -> float | None:
    """Of the two relative L2 distances; None where one was not measured."""
    if ours is None or theirs is None:
        return None
    if theirs.relative_l2 == 0:
        return 1.0 if ours.relative_l2 == 0 else float("inf")
    return ours.relative_l2 / theirs.relative_l2


def _exact_misses(plan: Plan, findings: Findings, case: str, stage: str) -> Iterable[Miss]:
    for dtype in plan.dtypes:
        measure = findings.get((OURS, dtype), case, stage)
        if isinstance(measure, Equality) and measure.different:
            yield Miss(stage, case, f"{dtype_name(dtype)}, values that differ", measure.different, 0, stage)


def _float32_misses(findings: Findings, case: str, stage: str) -> Iterable[Miss]:
    measure = findings.get((OURS, torch.float32), case, stage)
    if isinstance(measure, Continuation) and measure.differing > measure.ties:
        yield Miss(stage, case, "float32, samples that differ", measure.differing, measure.ties, stage)
    if not isinstance(measure, Distance) or (stage == PIXELS and case in findings.resized_apart):
        return
    own = findings.get((THEIRS, torch.float32), case, stage)
    bound = max(FLOAT32_BOUND, OWN_FACTOR * own.relative_l2 if isinstance(own, Distance) else 0.0)
    if not measure.relative_l2 <= bound:  # which is not the same as > where it is not a number
        yield Miss(stage, case, "float32 relative L2", measure.relative_l2, bound, stage)
    if stage == FINAL and not measure.mean_relative <= MEAN_RELATIVE_BOUND:
        yield Miss(stage, case, "float32 mean |d|/(|r|+1)", measure.mean_relative, MEAN_RELATIVE_BOUND, stage)


def _low_precision_misses(plan: Plan, findings: Findings, dtype: torch.dtype) -> Iterable[Miss]:
    bounds = {FEATURES: RATIO_BOUND, FINAL: FINAL_RATIO_BOUND, LOGITS: RATIO_BOUND}
    middle = plan.processor.config.text.num_hidden_layers // 2
    if middle in plan.stages.decoder_blocks:
        bounds[decoder_stage(middle)] = RATIO_BOUND
    for case in plan.cases:
        ratios = {}
        for stage in plan.stages.names:
            ours, theirs = (findings.get((who, dtype), case.label, stage) for who in (OURS, THEIRS))
            if isinstance(ours, Distance):
                ratios[stage] = ratio(ours, theirs)
        for stage, bound in bounds.items():
            if not ratios[stage] <= bound:
                first = _first_above(ratios, stage, bound)
                yield Miss(stage, case.label, f"{dtype_name(dtype)} ratio", ratios[stage], bound, first)
    strict = plan.trained_like and plan.processor.config.text.hidden_size >= REAL_WIDTH
    factor = COSINE_FACTOR if strict else COSINE_FACTOR_BY_CHANCE
    ours, theirs = (findings.pooled((who, dtype), FINAL).min_cosine for who in (OURS, THEIRS))
    if not 1 - ours <= factor * (1 - theirs):
        bound = 1 - factor * (1 - theirs)
        yield Miss(FINAL, ALL_CASES, f"{dtype_name(dtype)} min cosine, at least", ours, bound, FINAL)


def _first_above(ratios: dict[str, float], stage: str, bound: float) -> str:
    """The stage from which on the ratio stays above the bound until `stage`."""
    names = list(ratios)
    before = reversed(names[: names.index(stage)])
    return [stage, *itertools.takewhile(lambda name: not ratios[name] <= bound, before)][-1]

"""How far what was written is from the live model, and whether that is near enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_batched.arguments import dtype_name
from qwen_batched.deviation.measures import Distance
from qwen_batched.export.genai.parts import GenaiParts
from qwen_batched.export.parts import Parts

FLOAT32_BOUND = 1e-5  # relative L2 from the live model in float32
# Times the live model's own deviation from a wider dtype: in half precision from float32; and in float32 from float64,
# where massive activations make rounding alone exceed the bound above.
OWN_BOUNDS = {torch.float32: 1.5, torch.float16: 1.1, torch.bfloat16: 1.1}

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """Arguments of a part, and what the live model gives for them."""

    arguments: Mapping[str, Tensor]
    live: Results
    exact: Results | None  # of the live model in float32, where its own dtype is a narrower one


@dataclass(frozen=True)
class Deviation:
    """Of one part, the worst of all batches, over its results."""

    measured: float  # relative L2
    bound: float
    measured_from: str  # "live model", or the dtype of the live model that both are compared with

    @property
    def is_within(self) -> bool:
        """Whether the bound holds; not where a value is no number."""
        return self.measured <= self.bound


@torch.no_grad()
def live_cases(name: str, parts: Parts | GenaiParts, batches: Sequence[int]) -> list[Case]:
    """What there is to compare a part with, for each number of samples; the wider copy of its weights does not stay."""
    program = parts.part(name).program
    arguments = [parts.arguments(name, batch, seed=batch) for batch in batches]
    live = [_results(program(*each.values())) for each in arguments]
    exact = [None] * len(live) if parts.dtype == torch.float32 else exact_results(name, parts, arguments)
    return [Case(*each) for each in zip(arguments, live, exact, strict=True)]


@torch.no_grad()
def exact_results(name: str, parts: Parts | GenaiParts, arguments: Sequence[Mapping[str, Tensor]]) -> list[Results]:
    """The live model's results in a wider dtype, float64 of a model in float32."""
    dtype = _wider(parts.dtype)
    wide = _widened(parts.part(name).program, dtype)
    return [_results(wide(*(_to(x, dtype) for x in each.values()))) for each in arguments]


def measure(
    cases: Sequence[Case], written: Sequence[Results], dtype: torch.dtype, exact: Callable[[], list[Results]]
) -> Deviation:
    """The deviation of what a written part gives for each case; `exact` is called where float64 has to decide."""
    pairs = list(zip(cases, written, strict=True))
    near = [Deviation(relative_l2(ours, case.live), FLOAT32_BOUND, "live model") for case, ours in pairs]
    if dtype == torch.float32 and all(each.is_within for each in near):
        return _worst(near)
    wide = exact() if dtype == torch.float32 else [case.exact for case in cases]
    found = [_measure_from(wider, case.live, ours, dtype) for wider, (case, ours) in zip(wide, pairs, strict=True)]
    if dtype == torch.float32:
        found = [each if each.is_within else other for each, other in zip(near, found, strict=True)]
    return _worst(found)


def _measure_from(exact: Results, live: Results, written: Results, dtype: torch.dtype) -> Deviation:
    own = OWN_BOUNDS[dtype] * relative_l2(live, exact)
    return Deviation(relative_l2(written, exact), own, dtype_name(_wider(dtype)))


def _worst(found: Sequence[Deviation]) -> Deviation:
    return max(found, key=lambda each: math.inf if not each.is_within else each.measured / max(each.bound, 1e-30))


def relative_l2(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst of several results; no number where one of them is none."""
    distances = []
    for x, y in zip(values, expected, strict=True):
        distance = Distance()
        distance.add(x.flatten(0, -2), y.flatten(0, -2))
        distances.append(distance.relative_l2)
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _widened(program: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its weights in `dtype`, and its constants as they are."""
    return copy.deepcopy(program, {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in program.parameters()})


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _results(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results

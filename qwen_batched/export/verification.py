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

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


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
def measure(name: str, parts: Parts | GenaiParts, run: Run, batches: Sequence[int]) -> Deviation:
    """The deviation of a part that was written, run by `run`."""
    program, dtype = parts.part(name).program, parts.model.dtype
    wide, found = None, []
    for batch in batches:
        arguments = parts.arguments(name, batch, seed=batch)
        live, written = _results(program(*arguments.values())), run(arguments)
        found.append(Deviation(relative_l2(written, live), FLOAT32_BOUND, "live model"))
        if dtype == torch.float32 and found[-1].is_within:
            continue
        wider = torch.float64 if dtype == torch.float32 else torch.float32
        wide = _widened(program, wider) if wide is None else wide
        exact = _results(wide(*(_to(x, wider) for x in arguments.values())))
        own = OWN_BOUNDS[dtype] * relative_l2(live, exact)
        found[-1] = Deviation(relative_l2(written, exact), own, dtype_name(wider))
    return max(found, key=lambda each: math.inf if not each.is_within else each.measured / max(each.bound, 1e-30))


def relative_l2(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst of several results; no number where one of them is none."""
    distances = []
    for x, y in zip(values, expected, strict=True):
        distance = Distance()
        distance.add(x.flatten(0, -2), y.flatten(0, -2))
        distances.append(distance.relative_l2)
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def _widened(program: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its weights in `dtype`, and its constants as they are."""
    return copy.deepcopy(program, {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in program.parameters()})


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _results(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results

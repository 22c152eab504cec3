"""How far what was written is from the live model, and whether that is near enough."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen_batched.export.parts import Parts

FLOAT32_BOUND = 1e-5  # relative L2 from the live model in float32
HALF_BOUND = 1.1  # in float16 and bfloat16: times the live model's own deviation from float32

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Deviation:
    """Of one part, the worst over its results and over batches."""

    measured: float  # relative L2 from the live model; in half precision from the live model in float32
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether the bound holds; not where a value is no number."""
        return self.measured <= self.bound


@torch.no_grad()
def measure(name: str, parts: Parts, run: Run, batches: Sequence[int]) -> Deviation:
    """The deviation of a part that was written, run by `run`."""
    program = parts.part(name).program
    wide = None if parts.model.dtype == torch.float32 else _in_float32(program)
    worst = Deviation(0.0, FLOAT32_BOUND if wide is None else 0.0)
    for batch in batches:
        arguments = parts.arguments(name, batch, seed=batch)
        live, written = _results(program(*arguments.values())), run(arguments)
        if wide is None:
            found = Deviation(relative_l2(written, live), FLOAT32_BOUND)
        else:
            widened = {key: x.float() if x.is_floating_point() else x for key, x in arguments.items()}
            if "frames" in widened:
                widened["frames"] = arguments["frames"]
            exact = _results(wide(*widened.values()))
            found = Deviation(relative_l2(written, exact), HALF_BOUND * relative_l2(live, exact))
        if not found.measured - found.bound <= worst.measured - worst.bound or worst.measured == 0.0:
            worst = found
    return worst


def relative_l2(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The worst of several results."""
    distances = []
    for x, y in zip(values, expected, strict=True):
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        distances.append(float((x - y).norm() / y.norm()) if x.shape == y.shape else float("inf"))
    return max(distances)


def _in_float32(program: nn.Module) -> nn.Module:
    """A copy with its weights in float32, and its constants as they are."""
    return copy.deepcopy(program, {id(p): nn.Parameter(p.float(), requires_grad=False) for p in program.parameters()})


def _results(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results

"""How far values are from a yardstick's: what is summed up while they come, and what is made of the sums."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

M = TypeVar("M")

CHUNK = 2**22  # elements that are widened to float64 at once


class _Sums:
    """A record of sums."""

    @classmethod
    def pooled(cls: type[M], parts: Iterable[M]) -> M:
        """Over all parts."""
        total = cls()
        for part in parts:
            for field_ in fields(part):
                setattr(total, field_.name, getattr(total, field_.name) + getattr(part, field_.name))
        return total

    def numbers(self) -> dict[str, float]:
        """What a report tells, by name."""
        return dict(vars(self))


@dataclass
class Distance(_Sums):
    """Of some outputs from the yardstick's, over all tokens so far. Sums are taken in float64, where the values are."""

    squared_error: float = 0.0  # of the difference
    squared_norm: float = 0.0  # of the yardstick
    relative: float = 0.0  # sum of |difference| / (|yardstick| + 1)
    elements: int = 0  # how many
    cosines: list[Tensor] = field(default_factory=list)  # one for each token, in parts

    def add(self, values: Tensor, yardstick: Tensor) -> None:
        """Takes tokens (T, width) of each, on any devices; the work is done where `values` are."""
        if values.shape != yardstick.shape:
            # A wrong shape is as wrong as can be, and no reason to stop before the report.
            self.squared_error, self.squared_norm, self.relative = math.inf, 1.0, math.inf
            self.elements += yardstick.numel()
            self.cosines.append(torch.full((len(yardstick),), -1.0))
            return
        rows = max(1, CHUNK // max(1, values.shape[-1]))
        for ours, theirs in zip(values.split(rows), yardstick.split(rows), strict=True):
            ours, theirs = ours.double(), theirs.to(ours.device).double()
            difference = ours - theirs
            sums = torch.stack(
                [difference.square().sum(), theirs.square().sum(), (difference.abs() / (theirs.abs() + 1)).sum()]
            ).tolist()
            self.squared_error += sums[0]
            self.squared_norm += sums[1]
            self.relative += sums[2]
            self.elements += theirs.numel()
            self.cosines.append(F.cosine_similarity(ours, theirs, dim=-1).cpu())

    @property
    def relative_l2(self) -> float:
        """Norm of the difference over norm of the yardstick."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else math.nan

    @property
    def min_cosine(self) -> float:
        """Of the worst token."""
        return float(torch.cat(self.cosines).min())

    @property
    def median_cosine(self) -> float:
        """Of a token in the middle."""
        return float(torch.cat(self.cosines).median())

    @property
    def mean_relative(self) -> float:
        """Mean of |difference| / (|yardstick| + 1), as an earlier implementation reported it."""
        return self.relative / self.elements if self.elements else math.nan

    def numbers(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("relative_l2", "min_cosine", "median_cosine", "mean_relative")}


@dataclass
class Equality(_Sums):
    """Of integers: how many there are, and how many differ."""

    total: int = 0
    different: int = 0

    def add(self, values: Tensor, yardstick: Tensor) -> None:
        """Takes tensors that should be equal; where shapes differ, all values do."""
        self.total += yardstick.numel()
        same_shape = values.shape == yardstick.shape
        self.different += int((values.cpu() != yardstick.cpu()).sum()) if same_shape else yardstick.numel()


@dataclass
class Continuation(_Sums):
    """Greedy tokens: how many agree until the first that differs, which may be a tie."""

    total: int = 0  # tokens of the yardstick
    agreeing: int = 0  # those before the first difference, over all samples
    differing: int = 0  # samples that differ somewhere
    # Of those, the samples whose first difference is between two tokens that the yardstick finds equally likely, but
    # for rounding.
    ties: int = 0

    # Logits' distance of the two best tokens, over the logits' deviation: float32 rounding moves it by 1e-6 or so.
    TIE: ClassVar[float] = 1e-4

    def add(self, tokens: Tensor, yardstick: Tensor, scores: Tensor) -> None:
        """Takes new tokens (T,) of each, and the scores (T, vocabulary) by which the yardstick chose its own."""
        self.total += len(yardstick)
        tokens, yardstick = tokens.cpu(), yardstick.cpu()
        common = min(len(tokens), len(yardstick))
        unequal = (tokens[:common] != yardstick[:common]).nonzero()
        first = int(unequal[0]) if len(unequal) else common
        self.agreeing += first
        if first == len(yardstick) == len(tokens):
            return
        self.differing += 1
        if first < common:
            row = scores[first].double().cpu()
            gap = row[yardstick[first]] - row[tokens[first]]
            self.ties += bool(gap <= self.TIE * row[row.isfinite()].std())


Measure = Distance | Equality | Continuation

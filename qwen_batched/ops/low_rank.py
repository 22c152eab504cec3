"""What an adapter adds to a linear layer: the product of two low-rank matrices (LoRA; Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LowRankUpdate(NamedTuple):
    """`scaling * (x A^T) B^T`, added to some columns of a linear layer's result, in the matrices' dtype."""

    a: Tensor  # (R, D); where `x` is wider, its first D columns are taken
    b: Tensor  # (F, R)
    scaling: float
    start: int = 0  # the first of the F columns

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.b))

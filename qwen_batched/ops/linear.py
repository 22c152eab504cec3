"""linear: PyTorch's product, and a kernel of its own for a single row, where cuBLAS would leave memory idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.adapted_linear import adapted_linear
from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.operator import Operator
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, route


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()) -> Tensor:
    """See `reference.linear`."""
    if updates:
        return adapted_linear(x, weight, bias, updates)
    way = route_of_one_row(x, weight, bias)
    if way == REFERENCE:
        return F.linear(x, weight, bias)
    return (_forward.kernel if way == KERNEL else _forward.traced)(x, weight, bias)


def route_of_one_row(x: Tensor, weight: Tensor, *biases: Tensor | None) -> int:
    """`route` of a single row (1, D) times a weight; the reference for more rows.

    What fits nowhere is left to PyTorch, which says why.
    """
    if x.ndim != 2 or x.shape[0] != 1:
        return REFERENCE
    biases = [bias for bias in biases if bias is not None]
    parameters = (weight, *biases)
    if (
        weight.ndim == 2
        and x.shape[1] == weight.shape[1]
        and weight.is_contiguous()
        and all(bias.shape == (weight.shape[0] // len(biases),) for bias in biases)
        and all(parameter.dtype == x.dtype and parameter.device == x.device for parameter in parameters)
        and x.device.type != "meta"
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return route((x,), parameters)
    return REFERENCE


_forward = Operator(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)

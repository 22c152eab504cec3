"""swiglu_linear: the gated product of an MLP and its activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.adapted_linear import adapted_linear
from qwen_batched.ops.linear import route_of_one_row
from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.operator import Operator
from qwen_batched.ops.swiglu import swiglu
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, wants_gradient


def swiglu_linear(
    x: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """See `reference.swiglu_linear`."""
    if updates or wants_gradient(x, gate_up, gate_bias, up_bias):
        bias = None if gate_bias is None else torch.cat((gate_bias, up_bias))
        if updates:
            return adapted_linear(x, gate_up, bias, updates, gated=True)
        return swiglu(F.linear(x, gate_up, bias))
    way = route_of_one_row(x, gate_up, gate_bias, up_bias)
    if way == REFERENCE:
        # The bias goes in with the gate: on an H200 the product with a bias takes 23 us for 768 tokens, without 21 us.
        return swiglu(F.linear(x, gate_up), None, gate_bias, up_bias)
    return (_forward.kernel if way == KERNEL else _forward.traced)(x, gate_up, gate_bias, up_bias)


_forward = Operator(
    "swiglu_linear(Tensor x, Tensor gate_up, Tensor? gate_bias, Tensor? up_bias) -> Tensor",
    fake=lambda x, gate_up, gate_bias, up_bias: x.new_empty(*x.shape[:-1], gate_up.shape[0] // 2),
    file="linear",
)

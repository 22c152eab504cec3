"""add_low_rank: a low-rank product added in place to a tensor of another dtype."""

from __future__ import annotations

from qwen_batched.ops.operator import Operator

# See `reference.add_low_rank`. `adapted_linear` has the derivative.
add_low_rank = Operator(
    "add_low_rank(Tensor(a!) out, Tensor low, Tensor factor, float scaling) -> ()",
    fake=lambda out, low, factor, scaling: None,
)

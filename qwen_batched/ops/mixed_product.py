"""mixed_product: a matrix of a half type times one in float32."""

from __future__ import annotations

from qwen_batched.ops.operator import Operator

# See `reference.mixed_product`. `adapted_linear` has the derivative.
mixed_product = Operator(
    "mixed_product(Tensor x, Tensor y, float scaling, bool turned) -> Tensor",
    fake=lambda x, y, scaling, turned: y.new_empty((y.shape[1], x.shape[0]) if turned else (x.shape[0], y.shape[1])),
)

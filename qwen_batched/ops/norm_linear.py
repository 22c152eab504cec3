"""norm_linear: the residual addition, the norm and the product behind it; for a single row in one launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qwen_batched.ops.add_norm import add_norm
from qwen_batched.ops.linear import linear, route_of_one_row
from qwen_batched.ops.operator import Operator, like
from qwen_batched.ops.swiglu_linear import swiglu_linear
from qwen_batched.runtime.fast_path import KERNEL, REFERENCE, wants_gradient

WIDEST = 2048  # of the rows that the kernel was measured at; each of its programs holds one


def norm_linear(
    update: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    is_gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_linear`."""
    may_fuse = not (is_gated and bias is not None) and _fit(update, residual, norm)
    way = route_of_one_row(update, weight, bias) if may_fuse else REFERENCE
    if way == REFERENCE:
        normed, stream = add_norm(update, residual, norm, None, eps)
        if not is_gated:
            return linear(normed, weight, bias), stream
        return swiglu_linear(normed, weight, *((None, None) if bias is None else bias.chunk(2))), stream
    return (_forward.kernel if way == KERNEL else _forward.traced)(update, residual, norm, eps, weight, bias, is_gated)


def _fit(update: Tensor, residual: Tensor | None, norm: Tensor) -> bool:
    return (
        update.shape[-1] <= WIDEST
        and norm.shape == update.shape[-1:]
        and (norm.dtype, norm.device) == (update.dtype, update.device)
        and (residual is None or (residual.shape, residual.dtype) == (update.shape, update.dtype))
        and not wants_gradient(residual, norm)
    )


def _without_alias(compute: Any, update: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """An operator's result must not be its input, as the stream of the reference is without a residual."""
    out, stream = compute(update, residual, *rest)
    return out, stream.clone() if stream is update else stream


_forward = Operator(
    "norm_linear(Tensor update, Tensor? residual, Tensor norm, float eps, Tensor weight, Tensor? bias, bool is_gated) "
    "-> (Tensor, Tensor)",
    fake=lambda update, residual, norm, eps, weight, bias, is_gated: (
        update.new_empty(1, weight.shape[0] // (2 if is_gated else 1)),
        like(update),
    ),
    adapt=_without_alias,
)

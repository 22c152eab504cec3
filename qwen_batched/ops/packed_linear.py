"""A linear layer whose weight is a buffer that holds several parameters, with a gradient for each of them.

One product forward and two backward, whatever the number of parameters; nothing is copied but what has to be joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from qwen_batched.ops.column_sums import column_sums
from qwen_batched.ops.linear import linear
from qwen_batched.runtime.fast_path import wants_gradient


def packed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    parameters: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[slice],
    transposed: bool = False,
    total: int | None = None,
) -> Tensor:
    """`F.linear` of one weight whose rows are those of `parameters`.

    Args:
        x: (..., D).
        weight: (R, D), whose `rows` are the memory of `parameters`, zero in between. None to join the parameters here,
            and again in the backward pass: for memory that is freed in between.
        bias: (R,), likewise of `biases`; None where there are none, or no `weight`.
        parameters: Each (rows, D).
        biases: Each (rows,), one for each parameter or none.
        rows: The place of each parameter in the weight, in ascending order.
        transposed: The parameters are (F, rows), `weight` is (R, F) with their transposes in its `rows`, and `x` is
            (..., R); the only bias is (F,).
        total: R; needed where `weight` is None and padding follows the last parameter.

    Returns:
        (..., R); (..., F) if `transposed`.
    """
    if total is None:
        total = x.shape[-1] if transposed else rows[-1].stop if weight is None else weight.shape[0]
    wants = wants_gradient(x, *parameters, *biases)
    if weight is not None and not wants:
        return linear(x, weight.t() if transposed else weight, bias)
    if (
        not wants
        or torch.compiler.is_dynamo_compiling()
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return _joined_linear(x, parameters, biases, rows, transposed, total)
    return _apply(x, weight, bias, rows, transposed, total, *parameters, *biases)


class PackedLinear(Function):
    """See `packed_linear`. A backward pass that is to be differentiated is that of the joined parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Sequence[slice],
        transposed: bool,
        total: int,
        *tensors: Tensor,
    ) -> Tensor:
        parameters, biases = tensors[: len(rows)], tensors[len(rows) :]
        wants_x, *wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]
        ctx.layout = rows, transposed, total, x.shape
        kept = (weight, *parameters) if wants_x else ()
        ctx.save_for_backward(x if any(wanted[: len(rows)]) else None, *kept)
        if weight is None:
            return _joined_linear(x, parameters, biases, rows, transposed, total)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(grad.device.type):  # it was off in the forward pass
            with torch.autocast(grad.device.type, enabled=False):
                return PackedLinear.backward(ctx, grad)
        rows, transposed, total, x_shape = ctx.layout
        wanted = ctx.needs_input_grad[6:]
        x, *kept = ctx.saved_tensors
        grad, grads, grad_x = grad.reshape(-1, grad.shape[-1]), [None] * len(wanted), None
        if kept:
            weight, *parameters = kept
            # The gradient's own gradient belongs to the parameters, of which the buffer knows nothing.
            if weight is None or torch.is_grad_enabled():
                weight = join_parameters(parameters, rows, total, transposed)
            elif transposed:
                weight = weight.t()
            grad_x = (grad @ weight).view(x_shape)
        if x is not None:
            x = x.reshape(-1, x_shape[-1])
            # In the memory layout of the parameters, so that autograd takes it as it is.
            product = x.t() @ grad if transposed else grad.t() @ x
            grads[: len(rows)] = [product[place].t() if transposed else product[place] for place in rows]
        if any(wanted[len(rows) :]):
            of_bias = column_sums(grad)
            grads[len(rows) :] = [of_bias] if transposed else [of_bias[place] for place in rows]
        return grad_x, None, None, None, None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True))


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, PackedLinear).apply


def _joined_linear(
    x: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Sequence[slice],
    transposed: bool,
    total: int,
) -> Tensor:
    """The same by operations that autograd sees through."""
    bias = None
    if biases:
        bias = biases[0] if transposed else join_parameters(biases, rows, total)
    return F.linear(x, join_parameters(parameters, rows, total, transposed), bias)


def join_parameters(
    parameters: Sequence[Tensor], rows: Sequence[slice], total: int, transposed: bool = False
) -> Tensor:
    """The weight or bias that `packed_linear` takes, as a differentiable function of its parameters.

    Returns:
        (total, ...), the parameters in their `rows` and zeros in between; (F, total) if `transposed`.
    """
    dim, parts, end = int(transposed), [], 0
    for parameter, place in zip(parameters, rows, strict=True):
        parts += [*_zeros(parameter, dim, place.start - end), parameter]
        end = place.stop
    parts += _zeros(parameters[-1], dim, total - end)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _zeros(parameter: Tensor, dim: int, count: int) -> list[Tensor]:
    """Padding of so many rows or columns; none for zero."""
    shape = [*parameter.shape[:dim], count, *parameter.shape[dim + 1 :]]
    return [parameter.new_zeros(shape)] if count else []

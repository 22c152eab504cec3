"""A frozen linear layer with low-rank updates, in as few products as there can be, forward and backward.

Updates are added in place to what the layer's own products gave: none of them writes a tensor of the layer's width.
Those of one call share its input, and the product of all their first matrices. See `reference.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from qwen_batched.ops import reference
from qwen_batched.ops.add_low_rank import add_low_rank
from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.mixed_product import mixed_product
from qwen_batched.ops.swiglu import swiglu, swiglu_backward
from qwen_batched.runtime.fast_path import wants_gradient

# Beside float32 matrices, what has fewer elements is copied in float32: a kernel that reads it as it is saves the GPU
# less than it costs the host.
LEAST_WIDE = 2**24


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRankUpdate], gated: bool = False
) -> Tensor:
    """`reference.linear` with updates, or `gated` by `reference.swiglu` of its halves.

    By the reference itself where something else is wanted than what adapters train, or what kernels cannot compute.
    """
    kind = updates[0].a.dtype
    if (
        wants_gradient(weight, bias)
        or any(update.a.dtype != kind for update in updates)
        or x.device.type == "meta"
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (gated and torch.float64 in (x.dtype, kind))
    ):
        return _by_the_reference(x, weight, bias, updates, gated)
    factors = [factor for update in updates for factor in (update.a, update.b)]
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
        factors = [factor.to(dtype) for factor in factors]
    places = [(update.scaling, update.start) for update in updates]
    apply = AdaptedLinear.apply if torch.compiler.is_dynamo_compiling() else _apply
    if x.ndim == 2:
        return apply(x, weight, bias, places, gated, *factors)
    out = apply(x.reshape(-1, x.shape[-1]), weight, bias, places, gated, *factors)
    return out.view(*x.shape[:-1], out.shape[-1])


def _by_the_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRankUpdate], gated: bool
) -> Tensor:
    out = reference.linear(x, weight, bias, updates)
    return reference.swiglu(*out.chunk(2, dim=-1)) if gated else out


class AdaptedLinear(Function):
    """The same for (T, D); the weight and the bias get no gradient.

    Takes each update's scaling and start in `places`, its matrices in `factors`. Keeps all x A^T, the matrices A of
    more than one update, stacked, and what is gated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        places: Sequence[tuple[float, int]],
        gated: bool,
        *factors: Tensor,
    ) -> Tensor:
        stacked, bs = _stacked(factors), factors[1::2]
        out = F.linear(x, weight, bias)
        low = _product(_as_factor(_columns(x, stacked.shape[1]), stacked), stacked.t())
        for (scaling, start), b, part in zip(places, bs, _parts(low, bs), strict=True):
            _add_product(_columns(out, b.shape[0], start), part, b.t(), scaling)
        ctx.places, ctx.gated = places, gated
        ctx.set_materialize_grads(False)
        kept = low, None if stacked is factors[0] else stacked, out if gated else None
        ctx.save_for_backward(*kept, x, weight, bias, *factors)
        return swiglu(out) if gated else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = _, _, product, x, *_ = ctx.saved_tensors
        if torch.is_autocast_enabled(x.device.type):  # the forward pass has chosen the dtypes
            with torch.autocast(x.device.type, enabled=False):
                return AdaptedLinear.backward(ctx, grad)
        wanted = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        if grad is None:
            grads = [None] * len(wanted)
        elif torch.is_grad_enabled():  # the gradients are to be differentiated themselves
            grads = _differentiable_grads(grad, saved, ctx.places, ctx.gated, wanted)
        else:
            grad = swiglu_backward(grad, product, None) if ctx.gated else grad
            grads = _grads(grad, saved, ctx.places, wanted)
        return grads[0], None, None, None, None, *grads[1:]


# `Function.apply` without what it does for functorch, which takes the host longer than a launch.
_apply = super(Function, AdaptedLinear).apply


def _grads(
    grad: Tensor, saved: Sequence[Tensor | None], places: Sequence[tuple[float, int]], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `x` and of all matrices, in the order of `wanted`."""
    low, stacked, _, x, weight, _, *factors = saved
    stacked, bs = factors[0] if stacked is None else stacked, factors[1::2]
    trains = any(wanted[1:])
    wide_grad, grad_lows, grad_bs = _as_factor(grad, low), [], []
    for (scaling, start), b, part in zip(places, bs, _parts(low, bs), strict=True):
        grad_out = _columns(wide_grad, b.shape[0], start)
        grad_lows.append(_product(grad_out, b, scaling, like=part))
        grad_bs.append(_product(grad_out.t(), part, scaling, like=b) if trains else None)
    grad_low = grad_lows[0] if len(bs) == 1 else torch.cat(grad_lows, dim=1)
    grad_as, narrow = [None] * len(bs), stacked.shape[1]
    if trains:  # rows of one tensor: autograd takes them as they are
        grad_as = _product(_as_factor(_columns(x, narrow), stacked).t(), grad_low, turned=True)
        grad_as = grad_as.split_with_sizes([b.shape[1] for b in bs])
    grad_x = None
    if wanted[0]:
        grad_x = grad @ weight
        _add_product(_columns(grad_x, narrow), grad_low, stacked)
    return [grad_x, *(each for pair in zip(grad_as, grad_bs, strict=True) for each in pair)]


def _differentiable_grads(
    grad: Tensor,
    saved: Sequence[Tensor | None],
    places: Sequence[tuple[float, int]],
    gated: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The same by autograd."""
    _, _, _, x, weight, bias, *factors = saved
    updates = [LowRankUpdate(a, b, *place) for a, b, place in zip(factors[::2], factors[1::2], places, strict=True)]
    out = _by_the_reference(x, weight, bias, updates, gated)
    chosen = [tensor for tensor, is_wanted in zip((x, *factors), wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """The first matrices of all updates, (R, D)."""
    return factors[0] if len(factors) == 2 else torch.cat(factors[::2])


def _columns(x: Tensor, count: int, start: int = 0) -> Tensor:
    return x if x.shape[1] == count else x.narrow(1, start, count)


def _parts(low: Tensor, bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns of each update."""
    return (low,) if len(bs) == 1 else low.split_with_sizes([b.shape[1] for b in bs], dim=1)


def _add_product(out: Tensor, x: Tensor, y: Tensor, scaling: float = 1.0) -> None:
    """out += scaling * x @ y, rounding to the dtype of `out` once, at the end."""
    if out.dtype == x.dtype:
        out.addmm_(x, y, alpha=scaling)
    else:
        add_low_rank(out, x, y, scaling)


def _as_factor(x: Tensor, y: Tensor) -> Tensor:
    """`x` in the dtype of `y`, or as it is where a kernel multiplies it with `y` so."""
    is_half_beside_wide = y.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    return x if is_half_beside_wide and x.numel() >= LEAST_WIDE else x.to(y.dtype)


def _product(x: Tensor, y: Tensor, scaling: float = 1.0, like: Tensor | None = None, turned: bool = False) -> Tensor:
    """`reference.mixed_product` of what `_as_factor` gave; where `scaling` is given, `like` has the result's shape."""
    if x.dtype != y.dtype:
        return mixed_product(x, y, scaling, turned)
    x, y = (y.t(), x.t()) if turned else (x, y)
    return x @ y if like is None else torch.addmm(like, x, y, beta=0, alpha=scaling)

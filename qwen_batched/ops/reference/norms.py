"""Norms. See the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.resize import widen


def add_norm(
    update: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds `update` to the residual stream and normalises the sum: LayerNorm with a bias, RMSNorm without.

    Ba et al. 2016 (arXiv:1607.06450), Zhang and Sennrich 2019 (arXiv:1910.07467). `update` and `residual` (..., D), the
    latter None at the start, where the former is the stream; `weight` and `bias` (D,). Returns the normalised stream,
    and the stream itself, both (..., D).
    """
    stream = update if residual is None else residual + update
    x = widen(stream)
    if bias is not None:
        normed = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
        return normed.to(stream.dtype), stream
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * widen(weight)).to(stream.dtype), stream


def add_norm_backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `add_norm`, from those of its results (`grad_stream` None for zeros) and from its stream.

    Returns (..., D), of the update and of the residual alike; and (D,), of the weight and of the bias, (0,) where they
    are not wanted or there is none.
    """
    x, grad = widen(stream), widen(grad_normed)
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, scaled = x * scale, grad * weight
    out = scaled - unit * (scaled * unit).mean(-1, keepdim=True)
    out = scale * (out if bias is None else out - scaled.mean(-1, keepdim=True))
    out = out if grad_stream is None else out + grad_stream
    of_weight, of_bias = weight.new_empty(0), weight.new_empty(0)
    if for_weight:
        of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
    if for_weight and bias is not None:
        of_bias = grad.flatten(0, -2).sum(0).to(bias.dtype)
    return out.to(stream.dtype), of_weight, of_bias

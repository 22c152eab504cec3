"""Linear layers, with what adapters add and the activation behind them. See the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from qwen_batched.ops.low_rank import LowRankUpdate
from qwen_batched.ops.reference.activations import gelu, swiglu
from qwen_batched.ops.reference.norms import add_norm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()) -> Tensor:
    """(..., D) to (..., F), with `weight` (F, D) and `bias` (F,), and what adapters add to that."""
    product = out = F.linear(x, weight, bias)
    for update in updates:
        low = F.linear(x[..., : update.a.shape[1]].to(update.a.dtype), update.a)
        added = F.linear(low, update.b) * update.scaling
        out = out + F.pad(added, (update.start, out.shape[-1] - update.columns.stop))
    return out.to(product.dtype)


def add_low_rank(out: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """Adds `scaling * low @ factor` to `out` in place, (T, R) and (R, F) to (T, F); rounds once, at the end."""
    out.add_(low @ factor, alpha=scaling)


def mixed_product(x: Tensor, y: Tensor, scaling: float, turned: bool) -> Tensor:
    """`scaling * x @ y` in the dtype of `y`, which is wider: (I, K) and (K, R) to (I, R), or to (R, I) if `turned`."""
    out = scaling * (x.to(y.dtype) @ y)
    return out.t().contiguous() if turned else out


def swiglu_linear(
    x: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """`swiglu` of the two halves of one product: (..., D) to (..., F), with `gate_up` (2F, D)."""
    return swiglu(*linear(x, gate_up, None, updates).chunk(2, dim=-1), gate_bias, up_bias)


def norm_linear(
    update: Tensor,
    residual: Tensor | None,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    is_gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear`, or `swiglu_linear` where `is_gated`, of what `add_norm` by root mean square makes of its inputs.

    `update` and `residual` (..., D), `norm` (D,), `weight` (F, D) or (2F, D), `bias` as long. Returns (..., F), and the
    stream (..., D).
    """
    normed, stream = add_norm(update, residual, norm, None, eps)
    if not is_gated:
        return linear(normed, weight, bias), stream
    return swiglu_linear(normed, weight, *((None, None) if bias is None else bias.chunk(2))), stream


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRankUpdate] = (), form: str = "gelu"
) -> Tensor:
    """`gelu` of `linear`: (..., D) to (..., F)."""
    return gelu(linear(x, weight, bias, updates), form)

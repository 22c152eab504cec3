"""The choice of tokens. See the package."""

from __future__ import annotations

import torch
from torch import Tensor


def likeliest_token(logits: Tensor, forbidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The place of the highest logit, the first of equal ones, among those that are not `forbidden`.

    `logits` (R, W), `forbidden` bool (R or 1, W). Returns int64 (R,), and bool (R,), whether all logits of a row are
    finite. Of a row that is not, comes any place, but always one of the W.
    """
    # One pass: a sum is finite where every logit is. In float64, so that large logits do not overflow it.
    is_finite = logits.sum(dim=-1, dtype=torch.float64).abs() < torch.inf
    allowed = logits if forbidden is None else logits.masked_fill(forbidden, -torch.inf)
    return allowed.argmax(dim=-1), is_finite

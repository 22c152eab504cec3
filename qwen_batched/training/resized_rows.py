"""An embedding's or output projection's weight with another number of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS_AT_A_TIME = 16384  # that are held in float32 beside the weight
# New rows have this share of the covariance of the old ones, as in transformers: near their mean, but not equal.
COVARIANCE_SHARE = 1e-9


def check_resizable(name: str, layer: nn.Module | None) -> None:
    """Raises `ValueError` where a layer is not as it was loaded: wrapped, sharded, quantised, without values."""
    if layer is None:
        return
    weight = layer._parameters.get("weight")
    plain = type(layer) in (nn.Embedding, nn.Linear) and type(weight) is nn.Parameter
    if not plain or weight.is_meta or not weight.is_floating_point() or weight.ndim != 2:
        kind = f"{type(layer).__name__} with a {type(weight).__name__} on {getattr(weight, 'device', 'no device')}"
        raise ValueError(f"{name} must be as loaded (add tokens before adapters and sharding), got a {kind}")


@torch.inference_mode(False)
@torch.no_grad()
def resized(weight: Tensor, rows: int) -> Tensor:
    """The first `rows` of a weight (W, D), and new ones where it has fewer.

    New rows follow a normal distribution with the mean of the old ones and a small share of their covariance (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models").
    """
    old = weight.detach()
    if rows <= len(old):
        return old[:rows].clone()
    mean_D = old.mean(dim=0, dtype=torch.float32)
    covariance_DD = old.new_zeros(old.shape[1], old.shape[1], dtype=torch.float32)
    for part in old.split(ROWS_AT_A_TIME):
        centred = part.float() - mean_D
        covariance_DD.addmm_(centred.T, centred, alpha=1 / len(old))
    factor_DD, failed = torch.linalg.cholesky_ex(covariance_DD)
    new_ND = mean_D.repeat(rows - len(old), 1)
    if not failed:  # else there are fewer rows than columns, or the rows are not finite
        new_ND += COVARIANCE_SHARE**0.5 * torch.randn_like(new_ND) @ factor_DD.T
    return torch.cat((old, new_ND.to(old.dtype)))

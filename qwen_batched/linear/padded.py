"""Linear layers whose input is wider than they are: padded with zero columns to a width that products are fast at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.linear.lora import unwrap_lora
from qwen_batched.linear.packed import PackedParameters
from qwen_batched.runtime import fast_path
from qwen_batched.runtime.arena import synchronize


class PaddedLinear(nn.Linear):
    """`nn.Linear` whose weight may lie, transposed, in memory that is padded to `padded` input features.

    Columns lie together only as rows, so that a packed weight is not contiguous. Who shards, wraps or saves a model
    finds it contiguous: FSDP, DDP and DeepSpeed ask each module for its own parameters, and `state_dict` each for its
    tensors; both restore the weight's own memory. So do training mode, if the weight is trained, and a call that wants
    its gradient, since fused optimisers need the strides that a weight had when its first gradient came.
    """

    is_trained = False

    def __init__(self, in_features: int, out_features: int, bias: bool, padded: int) -> None:
        super().__init__(in_features, out_features, bias)
        self._columns = PackedParameters(padded, [slice(0, in_features)], transposed=True)

    @property
    def padded_weight(self) -> Tensor | None:
        """(out_features, padded); None unless the weight is packed."""
        weight = self._parameters.get("weight")
        packed = self._columns.tensor([weight]) if type(weight) is nn.Parameter else None
        return None if packed is None else packed.t()

    def pack(self) -> None:
        """Packs the weight, unless it is trained or cannot be packed."""
        if not self.is_trained and fast_path.can_pack([self]) and not (self.training and self.weight.requires_grad):
            self._columns.pack([self.weight])

    def restore(self) -> None:
        """Gives the weight contiguous memory of its own."""
        weight = self._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.is_contiguous():
            return
        with torch.inference_mode(False), torch.no_grad():
            value = weight.data
            weight.data = value.contiguous()
        synchronize(value.device)  # as in `PackedParameters.pack`
        self._columns.release()

    def keep_contiguous(self) -> None:
        """Restores the weight for good: it is trained."""
        if not self.is_trained:
            self.is_trained = True
            self.restore()

    def train(self, mode: bool = True) -> PaddedLinear:
        super().train(mode)
        weight = self._parameters.get("weight")
        if mode and weight is not None and weight.requires_grad:
            self.restore()
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if not recurse:
            self.restore()
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _save_to_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*arguments, **keywords)

    def _apply(self, *arguments: Any, **keywords: Any) -> PaddedLinear:
        super()._apply(*arguments, **keywords)
        if self.padded_weight is None:  # it was moved, with the strides that it had
            self.restore()
            self._columns.release()
            self.pack()
        return self


fast_path.plain_linear_types.add(PaddedLinear)


def apply_padded_linear(layer: nn.Module, x: Tensor, width: int) -> Tensor:
    """`layer` of the first `width` columns of `x`; any others are zero."""
    base, updates = unwrap_lora(layer)
    plain = fast_path.plain_linear(base)
    total = x.shape[-1]
    if plain is None or (updates and not plain[0].is_cuda):  # like the layers of a `FusedLinear`
        return layer(x if total <= width else x[..., :width])
    weight, bias = plain
    if total <= weight.shape[1]:
        return ops.linear(x, weight, bias, updates)
    padded = None
    if fast_path.wants_gradient(weight, bias):
        if type(base) is PaddedLinear:
            base.keep_contiguous()
        if not updates:
            biases, places = () if bias is None else (bias,), (slice(0, weight.shape[1]),)
            return ops.packed_linear(x, None, None, (weight,), biases, places, transposed=True, total=total)
    elif type(base) is PaddedLinear:
        padded = base.padded_weight
    if padded is None:  # columns together, as they are packed: the layout chooses a product's kernel, and so its bits
        padded = F.pad(weight.t(), (0, 0, 0, total - weight.shape[1])).t()
    return ops.linear(x, padded, bias, updates)

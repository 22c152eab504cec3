"""Linear layers that share their input, run as one product.

The ways to run them: packed (the weights are rows of one tensor), joined (rows of a tensor made for the call), with
LoRA updates on top of either, or one after the other, as on a CPU, which has nothing to gain.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.linear.apply import Linear, resolve_linear
from qwen_batched.linear.lora import Updates, unwrap_lora
from qwen_batched.linear.packed import PackedParameters
from qwen_batched.linear.padded import PaddedLinear
from qwen_batched.runtime import backend, fast_path


class Operands(NamedTuple):
    """One product's."""

    weight: Tensor | None  # (R, D); None to join `trained` in the product
    bias: Tensor | None  # (R,)
    updates: Updates  # what adapters add
    # Weights and biases that want a gradient, which `weight` and `bias` do not pass on; None if none does.
    trained: tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]] | None
    is_made: bool = False  # whether a kernel of the call writes `weight`


class FusedLinear:
    """Some `nn.Linear` children of a module, with one input: (..., D) to (..., R), their outputs side by side.

    They are looked up at each call, since adapters and quantisers replace them. Weights are packed by `pack`, never in
    a call.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], multiple: int = 1, joins: bool = True) -> None:
        """Takes what the children of `owner` are built as; it is given to each call, and not kept.

        Where they are one product, each output is padded with zeros to a `multiple`. `joins` says whether, in training,
        a product of weights joined for the call is faster than one for each.
        """
        layers = [owner._modules[name] for name in names]
        padded = [-(-layer.out_features // multiple) * multiple for layer in layers]
        starts = itertools.accumulate(padded[:-1], initial=0)
        places = [slice(start, start + layer.out_features) for start, layer in zip(starts, layers, strict=True)]
        self.names, self.joins = tuple(names), joins
        self.in_features, self.has_bias = layers[0].in_features, layers[0].bias is not None
        self._weights, self._biases = PackedParameters(sum(padded), places), PackedParameters(sum(padded), places)

    def __call__(self, owner: nn.Module, x: Tensor) -> Tensor:
        """The outputs of all layers, side by side."""
        linears = [resolve_linear(owner._modules[name]) for name in self.names]
        operands = self._operands(owner, linears)
        if operands is None:
            return torch.cat(self._run_each(owner, linears, x), dim=-1)
        return self._product(x, operands)

    def swiglu(self, owner: nn.Module, x: Tensor) -> Tensor:
        """`ops.swiglu` of two layers' outputs; padded with zeros where they are one product."""
        linears = [resolve_linear(owner._modules[name]) for name in self.names]
        operands = self._operands(owner, linears)
        if operands is None:
            return ops.swiglu(*self._run_each(owner, linears, x))
        if operands.trained is not None:
            return ops.swiglu(self._product(x, operands))
        biases = (None, None) if operands.bias is None else operands.bias.chunk(2)
        with _reading(operands):
            return ops.swiglu_linear(x, operands.weight, *biases, operands.updates)

    def behind_norm(
        self,
        owner: nn.Module,
        update: Tensor,
        residual: Tensor | None,
        norm: Tensor,
        eps: float,
        is_gated: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """`ops.norm_linear` of all layers; None where they are not one plain product."""
        linears = [resolve_linear(owner._modules[name]) for name in self.names]
        if any(linear is None or linear[2] for linear in linears):
            return None
        operands = self._operands(owner, linears)
        if operands is None or operands.trained is not None:
            return None
        with _reading(operands):
            return ops.norm_linear(update, residual, norm, eps, operands.weight, operands.bias, is_gated)

    def pack(self, owner: nn.Module) -> None:
        """Packs weights and biases, unless they cannot be packed; releases memory that parameters have left."""
        self._weights.release_if_left()
        self._biases.release_if_left()
        layers = [unwrap_lora(owner._modules[name])[0] for name in self.names]
        if not fast_path.can_pack(layers):
            return
        weights, biases = ([layer._parameters[leaf] for layer in layers] for leaf in ("weight", "bias"))
        if self._fit(weights, biases):
            self._weights.pack(weights)
            if self.has_bias:
                self._biases.pack(biases)

    def _operands(self, owner: nn.Module, linears: Sequence[Linear | None]) -> Operands | None:
        """What one product of all layers takes; None if they must, or had better, run one after the other."""
        for linear in linears:
            if linear is None or (linear[1] is None) == self.has_bias or not linear[0].is_cuda:
                return None
        if torch.compiler.is_compiling():
            return None
        weights, biases, updates = zip(*linears, strict=True)
        weight = self._weights.tensor(weights)
        bias = self._biases.tensor(biases) if self.has_bias else None
        is_packed = weight is not None and (bias is not None) == self.has_bias
        is_adapted = any(updates)
        is_trained = fast_path.wants_gradient(*weights, *biases)
        has_to_join = not is_packed or (is_trained and is_adapted)
        # Without gradients they are joined at any price: one product and several differ in bits, and a graph has one.
        pays = self.joins or not is_trained
        if has_to_join and not (pays and self._may_join(owner, weights, biases, is_adapted)):
            return None
        if is_trained and not is_adapted:
            trained = weights, biases if self.has_bias else ()
            return Operands(weight, bias, (), trained) if is_packed else Operands(None, None, (), trained)
        if has_to_join:
            weight = self._weights.joined(weights)
            bias = self._biases.joined(biases) if self.has_bias else None
        return Operands(weight, bias, self._weights.placed(updates) if is_adapted else (), None, has_to_join)

    def _product(self, x: Tensor, operands: Operands) -> Tensor:
        weight, bias, updates, trained, _ = operands
        if trained is None:
            with _reading(operands):
                return ops.linear(x, weight, bias, updates)
        return ops.packed_linear(x, weight, bias, *trained, self._weights.places, total=self._weights.rows)

    def _run_each(self, owner: nn.Module, linears: Sequence[Linear | None], x: Tensor) -> list[Tensor]:
        """The layers' outputs; layers with updates run as they are."""
        return [
            owner._modules[name](x) if linear is None or linear[2] else ops.linear(x, linear[0], linear[1])
            for name, linear in zip(self.names, linears, strict=True)
        ]

    def _fit(self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None]) -> bool:
        """Whether the layers have the shapes that they were built with; others may have been put in their place."""
        return all(
            weight.shape == (place.stop - place.start, self.in_features)
            and (bias.shape == weight.shape[:1] if self.has_bias else bias is None)
            for weight, bias, place in zip(weights, biases, self._weights.places, strict=True)
        )

    def _may_join(
        self, owner: nn.Module, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter], is_adapted: bool
    ) -> bool:
        kinds = {(each.dtype, each.device) for each in (*weights, *biases) if each is not None}
        if len(kinds) > 1 or not self._fit(weights, biases):
            return False
        # Autograd would keep the joined weights of all blocks, which FSDP2 takes back one by one.
        keeps_joined = is_adapted or torch.is_autocast_enabled(weights[0].device.type)
        return not keeps_joined or not any(
            fast_path.has_fsdp_unsharded_params(module)
            for name in self.names
            for module in owner._modules[name].modules()
        )


def _reading(operands: Operands) -> contextlib.AbstractContextManager[None]:
    """In which kernels do not read a weight before the call has written it."""
    return backend.reading_ahead(False) if operands.is_made else contextlib.nullcontext()


def pack(*modules: nn.Module) -> None:
    """Packs whatever can be packed in `modules`. Without memory for all of it, the rest stays as it is."""
    with contextlib.suppress(torch.OutOfMemoryError):
        for child in (child for module in modules for child in module.modules()):
            if isinstance(child, PaddedLinear):
                child.pack()
            for fused in _fused_linears(child):
                fused.pack(child)


def pack_again(owner: nn.Module) -> None:
    """Packs what `.to()` and the like have moved out of packed memory; `owner._apply` calls it."""
    for fused in _fused_linears(owner):
        fused.pack(owner)


def _fused_linears(owner: nn.Module) -> list[FusedLinear]:
    return [value for value in vars(owner).values() if isinstance(value, FusedLinear)]

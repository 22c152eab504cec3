"""Parameters of several linear layers as parts of one padded tensor.

The checkpoint's names and shapes stay: `gate_proj.weight` is a parameter like any other. The GPU gets one product where
there were two, and rows that start at multiples of 16 bytes: with a width of 3420, products take 2.7 to 3.2 times as
long (H200, bf16).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from qwen_batched.linear.lora import Updates, take_apart
from qwen_batched.runtime.fast_path import has_lent_parameters, is_plain_linear

Layout = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


class PackedParameters:
    """A zero-padded tensor whose rows are the memory of parameters.

    A parameter found elsewhere, at first use or since it was moved, is copied in and from then on lies in the tensor.
    A copied or unpickled instance begins anew.
    """

    def __init__(self, rows: int, places: Sequence[slice], transposed: bool = False) -> None:
        """Takes how many rows there are and which of them each parameter has, or its transpose."""
        self.rows = rows
        self.places = tuple(places)
        self.transposed = transposed
        self._packed: Tensor | None = None
        self._layouts: list[Layout] = []
        self._owners: list[weakref.ref[nn.Parameter]] = []
        self._lock = threading.Lock()

    @classmethod
    def back_to_back(cls, *rows: int) -> PackedParameters:
        """One for parameters of so many rows, without padding."""
        ends = list(itertools.accumulate(rows, initial=0))
        return cls(ends[-1], [slice(start, stop) for start, stop in itertools.pairwise(ends)])

    def of(self, *parameters: nn.Parameter) -> Tensor:
        """The padded tensor that holds `parameters`, one for each place; transposed as they are."""
        with self._lock:
            if not self.holds(*parameters):
                self._pack(parameters)
            return self._turn(self._packed)

    def joined(self, *parameters: nn.Parameter) -> Tensor:
        """The same tensor made anew, so that gradients find their way back to `parameters`, which stay."""
        dim = 1 if self.transposed else 0
        parts, end = [], 0
        for parameter, place in zip(parameters, self.places, strict=True):
            parts += [_zeros_like(parameter, dim, place.start - end), parameter]
            end = place.stop
        parts.append(_zeros_like(parameters[-1], dim, self.rows - end))
        return torch.cat([part for part in parts if part is not None], dim=dim)

    def placed(self, *updates: Updates) -> Updates:
        """The updates of the layers that the parameters are of, as those of one layer with the padded tensor."""
        return tuple(
            update._replace(start=place.start)
            for place, own in zip(self.places, updates, strict=True)
            for update in own
        )

    def holds(self, *parameters: nn.Parameter) -> bool:
        """Whether `parameters` lie in the tensor already."""
        return self._packed is not None and list(map(_layout, parameters)) == self._layouts

    def forget_if_left(self) -> None:
        """Lets go of the tensor where a parameter has left it."""
        with self._lock:
            parameters = [owner() for owner in self._owners]
            if any(parameter is None for parameter in parameters) or not self.holds(*parameters):
                self._packed, self._layouts, self._owners = None, [], []

    def give_back(self, *parameters: nn.Parameter) -> None:
        """Gives `parameters` memory of their own again, row after row."""
        with self._lock, torch.no_grad():
            if self.holds(*parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
                self._packed, self._layouts, self._owners = None, [], []

    def _pack(self, parameters: Sequence[nn.Parameter]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            values = [self._turn(parameter) for parameter in parameters]
            packed = values[0].new_zeros(self.rows, *values[0].shape[1:])
            for parameter, value, place in zip(parameters, values, self.places, strict=True):
                packed[place].copy_(value)
                # By way of DLPack the part gets a storage of its own. Parameters that share one look tied to what
                # saves a state_dict (safetensors, accelerate), and all but one would be left out.
                parameter.data = self._turn(torch.from_dlpack(packed[place]))
        if packed.is_cuda:  # other streams may still read the memory that is let go, and must see the copies
            torch.cuda.synchronize(packed.device)
        self._packed = packed
        self._layouts = list(map(_layout, parameters))
        self._owners = list(map(weakref.ref, parameters))

    def _turn(self, x: Tensor) -> Tensor:
        return x.t() if self.transposed else x

    def __reduce__(self) -> tuple[type[PackedParameters], tuple[int, tuple[slice, ...], bool]]:
        return PackedParameters, (self.rows, self.places, self.transposed)


class Linears(NamedTuple):
    """The linear layers of a module, without what peft wrapped around them.

    Attributes:
        layers: In the order of `PackingModule._linears`.
        updates: What adapters add to each.
        packings: What is packed where.
        parameters: Of all layers.
        want_gradient: Whether autograd is to see any of them.
    """

    layers: list[nn.Linear]
    updates: list[Updates]
    packings: list[tuple[PackedParameters, tuple[nn.Parameter, ...]]]
    parameters: list[nn.Parameter]
    want_gradient: bool


class PackingModule(nn.Module):
    """A module that runs linear layers with packed weights where it can, and else as they are.

    It cannot where a layer was replaced, wrapped in more than LoRA, hooked, pruned, tied, sharded or quantised, or
    while compiling. Nor does it on a CPU, which has nothing to gain from it. Where gradients of the weights are wanted
    they stay where they are, and are joined anew at each call if that pays.
    """

    def _linears(self) -> list[tuple[nn.Module, int, int, bool]]:
        """The layers, each with the `in_features`, `out_features` and bias that it was built with."""
        raise NotImplementedError

    def _packings(self, *layers: nn.Linear) -> list[tuple[PackedParameters, tuple[nn.Parameter, ...]]]:
        """What is packed where, of layers in the order of `_linears`."""
        raise NotImplementedError

    def _joining_pays(self, *layers: nn.Linear) -> bool:
        """Whether the product of the joined weights saves more time than joining them costs; of layers as above."""
        return True

    def _packed(self) -> tuple[list[Tensor], list[Updates]] | None:
        """The tensors of `_packings`, and each layer's updates; None where the layers have to be called as they are."""
        linears = self._plain_linears()
        if linears is None:
            return None
        if self._can_be_packed(linears):
            return [packed.of(*parameters) for packed, parameters in linears.packings], linears.updates
        if linears.want_gradient and self._joining_pays(*linears.layers):
            return [packed.joined(*parameters) for packed, parameters in linears.packings], linears.updates
        return None

    def _can_be_packed(self, linears: Linears | None) -> bool:
        if linears is None or linears.want_gradient or any(map(has_lent_parameters, linears.layers)):
            return False
        if all(packed.holds(*parameters) for packed, parameters in linears.packings):
            return True
        parameters = linears.parameters
        return (
            len(set(map(id, parameters))) == len(parameters)
            # What is in somebody's buffer (ZeRO, flat optimisers) stays: its owner writes there, or frees it.
            and all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters)
            # In somebody's capture nothing is copied yet: parameters must not move into memory that has no values.
            and not torch.cuda.is_current_stream_capturing()
        )

    def _plain_linears(self) -> Linears | None:
        """The layers where all, on a GPU, are what they were built as, but for LoRA, and nobody listens to them."""
        if torch.compiler.is_compiling() or _has_any_global_hook():
            return None
        built = self._linears()
        layers, updates = map(list, zip(*(take_apart(layer) for layer, *_ in built), strict=True))
        if not all(
            is_plain_linear(layer) and _has_shape(layer, *shape)
            for layer, (_, *shape) in zip(layers, built, strict=True)
        ):
            return None
        parameters = [
            parameter for layer in layers for parameter in layer._parameters.values() if parameter is not None
        ]
        first = parameters[0]
        dtype, device = first.dtype, first.device
        if not first.is_cuda or any(each.dtype != dtype or each.device != device for each in parameters):
            return None
        wanted = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
        return Linears(layers, updates, self._packings(*layers), parameters, wanted)

    def _apply(self, *arguments: Any, **keywords: Any) -> PackingModule:
        """`.to()` and the like: parameters may leave the packed tensors, which must not stay behind on the GPU."""
        super()._apply(*arguments, **keywords)
        for value in vars(self).values():
            if isinstance(value, PackedParameters):
                value.forget_if_left()
        return self


def pack(*modules: nn.Module) -> None:
    """Packs what a call would pack at first use, so that none moves parameters later; to be called with gradients off.

    What there is no memory for is left to its first use.
    """
    packing = (child for module in modules for child in module.modules() if isinstance(child, PackingModule))
    with contextlib.suppress(torch.OutOfMemoryError):
        for child in packing:
            linears = child._plain_linears()
            if child._can_be_packed(linears):
                for packed, parameters in linears.packings:
                    packed.of(*parameters)


def unpack(*modules: nn.Module) -> None:
    """Undoes packing, for who takes parameters over: `fully_shard` wants them contiguous."""
    for child in (child for module in modules for child in module.modules() if isinstance(child, PackingModule)):
        linears = child._plain_linears()
        if linears is not None:
            for packed, parameters in linears.packings:
                packed.give_back(*parameters)


def _zeros_like(parameter: nn.Parameter, dim: int, count: int) -> Tensor | None:
    """Padding for `torch.cat` along `dim`; None for none."""
    if count == 0:
        return None
    return parameter.new_zeros(*parameter.shape[:dim], count, *parameter.shape[dim + 1 :])


def _has_shape(layer: nn.Linear, in_features: int, out_features: int, bias: bool) -> bool:
    """Whether a layer still is what it was built as; another may have been put in its place."""
    biases = layer.bias is None if not bias else layer.bias is not None and layer.bias.shape == (out_features,)
    return biases and layer.weight.shape == (out_features, in_features)


def _layout(parameter: nn.Parameter) -> Layout:
    return parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype, parameter.device

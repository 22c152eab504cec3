"""Parameters of several linear layers as parts of one padded tensor.

The checkpoint's names and shapes stay: `gate_proj.weight` is a parameter like any other. The GPU gets one product where
there were two, and rows that start at multiples of 16 bytes: with a width of 3420, products take 2.7 to 3.2 times as
long (H200, bf16).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen_batched import ops
from qwen_batched.linear.lora import Updates
from qwen_batched.runtime.arena import synchronize

Layout = tuple[int, torch.Size, tuple[int, ...], torch.dtype]  # address, shape, strides, dtype


class Packing(NamedTuple):
    """A padded tensor, how each parameter lies in it, and what releases it when a parameter is gone."""

    tensor: Tensor
    layouts: list[Layout]
    owners: list[weakref.ref[nn.Parameter]]


class PackedParameters:
    """A zero-padded tensor whose rows are the memory of parameters.

    Updates in place are seen on both sides. The tensor is released when a parameter is gone. A copied or unpickled
    instance begins without one.
    """

    def __init__(self, rows: int, places: Sequence[slice], transposed: bool = False) -> None:
        """Takes the number of rows, and which of them hold each parameter, or its transpose."""
        self.rows = rows
        self.places = tuple(places)
        self.transposed = transposed
        self._packing: Packing | None = None
        self._lock = threading.Lock()

    def tensor(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """The padded tensor, one parameter for each place; None unless all of them lie in it."""
        packing = self._packing
        if packing is None:
            return None
        for parameter, layout in zip(parameters, packing.layouts, strict=True):
            if (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype) != layout:
                return None
        return packing.tensor

    def pack(self, parameters: Sequence[nn.Parameter]) -> None:
        """Moves `parameters` into a new tensor, unless they lie in this one."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.tensor(parameters) is not None:
                return
            values = [self._turn(parameter) for parameter in parameters]
            packed = values[0].new_zeros(self.rows, *values[0].shape[1:])
            for parameter, value, place in zip(parameters, values, self.places, strict=True):
                packed[place].copy_(value)
                # By way of DLPack the part gets a storage of its own. Parameters that share one look tied to what
                # saves a state_dict (safetensors, accelerate), and all but one would be left out.
                parameter.data = self._turn(torch.from_dlpack(packed[place]))
            synchronize(packed.device)  # other streams may still read the released memory, and must see the copies
            layouts = [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in parameters]
            # Not a bound method: the tensor would wait for the garbage collector.
            release = functools.partial(_release, weakref.ref(self))
            self._packing = Packing(packed, layouts, [weakref.ref(each, release) for each in parameters])

    def release_if_left(self) -> None:
        """Releases the tensor if a parameter has left it."""
        packing = self._packing
        if packing is not None:
            parameters = [owner() for owner in packing.owners]
            if any(parameter is None for parameter in parameters) or self.tensor(parameters) is None:
                self.release()

    def release(self) -> None:
        """Releases the tensor; parameters that lie in it keep their memory."""
        self._packing = None

    def joined(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The same tensor made anew, as a differentiable function of `parameters`, which stay where they are."""
        return ops.join_parameters(parameters, self.places, self.rows, self.transposed)

    def placed(self, updates: Sequence[Updates]) -> Updates:
        """The updates of the layers that the parameters are of, as those of one layer with the padded tensor."""
        return tuple(
            update._replace(start=place.start)
            for place, own in zip(self.places, updates, strict=True)
            for update in own
        )

    def _turn(self, x: Tensor) -> Tensor:
        return x.t() if self.transposed else x

    def __reduce__(self) -> tuple[type[PackedParameters], tuple[int, tuple[slice, ...], bool]]:
        return PackedParameters, (self.rows, self.places, self.transposed)


def _release(holder: weakref.ref[PackedParameters], _: object) -> None:
    packed = holder()
    if packed is not None:
        packed.release()

"""Programs -> what PyTorch's exporters take: graphs of PyTorch's own operations, for sizes that may vary."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qwen_batched.arguments import dtype_name
from qwen_batched.ops import use_backend


@dataclass(frozen=True)
class Part:
    """A program, and how it is called."""

    program: nn.Module
    examples: Mapping[str, Tensor]  # its arguments in their order; dimensions that may vary are 2 or more
    dynamic: Mapping[str, Mapping[int, object]]  # by argument: the dimensions that may vary, as `torch.export.Dim`
    results: tuple[str, ...]  # names of its results

    def arguments(self) -> dict[str, dict[str, object]]:
        """Dtype and shape of each argument: numbers, names of sizes that may vary, and a sum of two of these."""
        return {
            name: {
                "dtype": dtype_name(x.dtype),
                "shape": [_size(self.dynamic.get(name, {}).get(dim, size)) for dim, size in enumerate(x.shape)],
            }
            for name, x in self.examples.items()
        }


def _size(size: object) -> int | str:
    if isinstance(size, int):
        return size
    return "past + tokens" if size is Dim.AUTO else size.__name__  # the one size that is derived from others


def trace(part: Part) -> ExportedProgram:
    """Exports a part's program."""
    shapes = [dict(part.dynamic.get(name, {})) for name in part.examples]
    named = [x for x in inspect.signature(part.program.forward).parameters.values() if x.kind is not x.VAR_POSITIONAL]
    if len(named) < len(shapes):  # the rest are those of `*arguments`, which take theirs as one
        shapes[len(named) :] = [tuple(shapes[len(named) :])]
    with ExitStack() as stack:
        stack.enter_context(use_backend("reference"))
        # No parameter wants a gradient. Inside `torch.no_grad` the program would come wrapped in an operation.
        stack.enter_context(torch.enable_grad())
        return torch.export.export(
            part.program, tuple(part.examples.values()), dynamic_shapes=tuple(shapes), strict=False
        )

"""A fused operation as a kernel, and as a PyTorch operator `qwen_batched::<name>` that tracers see whole."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_batched.ops import reference
from qwen_batched.runtime.backend import has_kernels
from qwen_batched.runtime.fast_path import can_bypass_dispatcher

_library = torch.library.Library("qwen_batched", "DEF")


class Operator:
    """Runs an operation's Triton kernel, or its reference where there is none. It has no derivative."""

    def __init__(
        self,
        schema: str,
        fake: Callable[..., object],
        file: str | None = None,
        adapt: Callable[..., object] = lambda compute, *arguments: compute(*arguments),
    ) -> None:
        """Defines PyTorch's operator: by the name in `schema`, that of the reference and of the kernel's launcher.

        `fake` makes its results without values; `file` is the launcher's in `ops.triton`, where not the name. `adapt`
        calls its first argument, launcher or reference, where their arguments are not those that the schema can say.
        """
        self.name = schema.partition("(")[0]
        self._file = file or self.name
        self._adapt = adapt
        _library.define(schema)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qwen_batched::{self.name}", fake, lib=_library)
        # For whatever looks at the call: compilers, tracers, modes, subclasses of tensors.
        self.traced = getattr(torch.ops.qwen_batched, self.name)

    @functools.cached_property
    def kernel(self) -> Callable[..., Any]:
        """The launcher, on CUDA tensors. Its module is imported at first use: Triton may be missing."""
        return getattr(importlib.import_module(f"qwen_batched.ops.triton.{self._file}"), self.name)

    def __call__(self, x: Tensor, *rest: object) -> Any:
        """The launcher, called directly where nothing looks at the call."""
        if can_bypass_dispatcher(x) and has_kernels(x.device):
            return self.kernel(x, *rest)
        return self.traced(x, *rest)

    def _run(self, x: Tensor, *rest: object) -> object:
        compute = self.kernel if has_kernels(x.device) else getattr(reference, self.name)
        out = self._adapt(compute, x, *rest)
        if isinstance(out, tuple):
            return tuple(each.contiguous() for each in out)
        return None if out is None else out.contiguous()


def like(x: Tensor) -> Tensor:
    """A fake result with the shape, dtype and device of `x`, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)

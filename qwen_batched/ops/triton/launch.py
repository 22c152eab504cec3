"""How the kernels are launched."""

from __future__ import annotations

import functools
from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import KernelInterface

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before programmatic dependent launch
    gdc_launch_dependents = gdc_wait = None

# Since 3.4 a compiled kernel is launched with all its arguments, those it was compiled for too. Which kernel it is
# depends on more than is looked at here on other GPUs than NVIDIA's.
KERNELS_ARE_FOUND = Version(triton.__version__) >= Version("3.4") and torch.version.cuda is not None
MAX_COMPILED = 4096
_compiled: dict[Hashable, tuple[CompiledKernel, tuple]] = {}  # with the arguments that it was compiled for


def launch(kernel: KernelInterface, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """`kernel[grid](*arguments, **constants)`, for kernels that are launched often.

    At each launch Triton works out anew which of its compiled kernels the arguments want, which takes the host longer
    than the launch. Here that is looked up by all it can depend on: device, dtypes, alignment and values.
    """
    first = arguments[0]
    if not (KERNELS_ARE_FOUND and first.is_cuda):
        kernel[grid](*arguments, **constants)
        return
    traits = [(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments]
    key = (kernel, first.device.index, *traits, *constants.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if isinstance(compiled, CompiledKernel):  # Triton's interpreter has none
        if len(_compiled) >= MAX_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`. Triton's own takes the host microseconds, of a launch's few tens."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of 2 that is no less than `count`, at least 1."""
    return 1 << max(count - 1, 0).bit_length()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Every program of a kernel calls this before it touches what an earlier kernel may have written or still reads.

    Before it a kernel may read the tables of a plan, which are copied from the host; and what `begin` says.
    """
    if EARLY:
        gdc_wait()


@triton.jit
def let_the_next_start(EARLY: tl.constexpr):
    """A kernel whose successor may read ahead calls this first."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def begin(ahead, EARLY: tl.constexpr):
    """The first line of a kernel that reads weights or older keys before `wait_for_inputs`, where it may.

    `ahead` is 1 inside `backend.reading_ahead`, where no kernel writes them, else 0.
    """
    let_the_next_start(EARLY)
    if ahead == 0:
        wait_for_inputs(EARLY)


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of every launch: `EARLY` for the kernel, the rest for Triton.

    Since Hopper a kernel may be set up while the one before it still runs (CUDA's programmatic dependent launch). It
    hides about 1 us of each launch: H200, 32 vision blocks over 768 tokens in a CUDA graph, 2.26 ms against 2.35 ms.
    """
    early = (
        gdc_wait is not None
        and device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}

"""How the kernels are launched."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from typing import NamedTuple

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
# Triton's launcher in C is called past its own wrapper where its arguments are those of Triton 3.6.
KNOWN_ARGUMENTS = "iiiKKppOOOOOO"  # grid, stream, function, cooperative, pdl, two scratches, metadata of two, two hooks


class Compiled(NamedTuple):
    """A compiled kernel, ready to be launched."""

    kernel: CompiledKernel  # Triton's
    constants: tuple[object, ...]  # the arguments that it was compiled for, in its order
    launch: Callable[..., None] | None  # Triton's launcher in C; None where it is not known how to call it
    options: tuple[object, ...]  # what that takes between the stream and the kernel's arguments


_compiled: dict[Hashable, Compiled] = {}
_dtype_of = operator.attrgetter("dtype")


def launch(
    kernel: KernelInterface,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...] = (),
    **constants: object,
) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)` on the device of the first tensor, at little cost to the host.

    At each launch Triton works out anew which of its compiled kernels the arguments want, and asks the driver about
    every pointer, which takes the host several times as long as the launch. Here the kernel is looked up by all that it
    depends on: devices, dtypes, alignment of pointers, constants and what Triton sees in a number. A tensor on a wrong
    device is Triton's to refuse.
    """
    devices = [*map(Tensor.get_device, tensors)]
    device = devices[0]
    if device < 0:  # Triton's interpreter
        kernel[grid](*tensors, *numbers, **constants, USE_PDL=False)
        return
    if device != torch._C._cuda_getDevice():  # Triton launches on the current device, whatever its inputs are on
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, **constants)
        return
    pointers = [*map(Tensor.data_ptr, tensors)]
    low_bits = 0
    for pointer in pointers:
        low_bits |= pointer & 15
    key = (
        id(kernel),
        *devices,
        *constants.values(),
        *map(_dtype_of, tensors),
        low_bits and tuple([pointer & 15 == 0 for pointer in pointers]),
        *[
            (number == 1, number & 15 == 0, -(2**31) <= number < 2**31) if type(number) is int else type(number)
            for number in numbers
        ],
    )
    found = _compiled.get(key)
    if found is None:
        options = launch_options(tensors[0].device)
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
        if KERNELS_ARE_FOUND and isinstance(compiled, CompiledKernel):
            if len(_compiled) >= MAX_COMPILED:
                _compiled.clear()
            named, taken = {**constants, **options}, len(tensors) + len(numbers)
            _compiled[key] = _prepare(compiled, tuple(named[name] for name in kernel.arg_names[taken:]))
        return
    x, y, z = (*grid, 1, 1)[:3]
    if found.launch is None or _is_hooked():
        found.kernel[x, y, z](*tensors, *numbers, *found.constants)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    # A pointer as a number is taken as it is.
    found.launch(x, y, z, stream, *found.options, *pointers, *numbers, *found.constants)


def _prepare(kernel: CompiledKernel, constants: tuple[object, ...]) -> Compiled:
    """Looks for the launcher in C; kernels that need memory of Triton's go through its wrapper."""
    wrapper = kernel.run
    if not _knows_the_launcher() or wrapper.global_scratch_size or wrapper.profile_scratch_size:
        return Compiled(kernel, constants, None, ())
    options = kernel.function, wrapper.launch_cooperative_grid, wrapper.launch_pdl, None, None, kernel.packed_metadata
    return Compiled(kernel, constants, wrapper.launch, (*options, None, None, None))


@functools.cache
def _knows_the_launcher() -> bool:
    from triton.backends.nvidia import driver

    return getattr(driver, "_BASE_ARGS_FORMAT", None) == KNOWN_ARGUMENTS


def _is_hooked() -> bool:
    """Whether a profiler of Triton's listens to launches."""
    hooks = triton.knobs.runtime
    return bool(getattr(hooks.launch_enter_hook, "calls", True) or getattr(hooks.launch_exit_hook, "calls", True))


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`. Triton's own takes the host microseconds, of a launch's few tens."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of 2 that is no less than `count`, at least 1."""
    return 1 << max(count - 1, 0).bit_length()


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """Every program of a kernel calls this before it touches what an earlier kernel may have written or still reads.

    Before it a kernel may read the tables of a plan, which are copied from the host; and what `begin` says.
    """
    if USE_PDL:
        gdc_wait()


@triton.jit
def pdl_launch_dependents(USE_PDL: tl.constexpr):
    """The first line of a kernel whose successor may start before this one has ended."""
    if USE_PDL:
        gdc_launch_dependents()


@triton.jit
def begin(ahead, USE_PDL: tl.constexpr):
    """The first line of a kernel that reads weights or older keys before `pdl_wait`, where it may.

    `ahead` is 1 inside `backend.reading_ahead`, where no kernel writes them, else 0.
    """
    pdl_launch_dependents(USE_PDL)
    if ahead == 0:
        pdl_wait(USE_PDL)


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of every launch: `USE_PDL` for the kernel, the rest for Triton.

    Since Hopper a kernel may be set up while the one before it still runs (CUDA's programmatic dependent launch). It
    hides about 1 us of each launch: H200, 32 vision blocks over 768 tokens in a CUDA graph, 2.26 ms against 2.35 ms.
    """
    early = (
        gdc_wait is not None
        and device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    return {"USE_PDL": True, "launch_pdl": True} if early else {"USE_PDL": False}

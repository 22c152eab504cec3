"""Runs a call and sees what it does beside its result: work, time, memory, global state."""

import contextlib
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SECONDS = 5.0  # of the processor's time; a machine with others on it may take longer by the clock
SECONDS_BY_THE_CLOCK = 120
MEMORY = 2**30  # bytes above what the process has already
MESSAGE = 2000  # characters of an error


@dataclass
class Outcome:
    """What a call did.

    Attributes:
        result: What it returned; None where it raised.
        error: What it raised.
        faults: What it must not do, in words.
    """

    result: object = None
    error: BaseException | None = None
    faults: list[str] = field(default_factory=list)


class TooSlow(BaseException):
    """No `Exception`, so that nothing on the way takes it for an error of its own."""


def run(call: Callable[[], object], model: nn.Module, draws: bool = False) -> Outcome:
    """Runs `call` under the limits of time and memory; `draws` says that it may use the global generator."""
    outcome, before = Outcome(), state(model)
    started = time.process_time()
    with _limits():
        try:
            outcome.result = call()
        except TooSlow:
            outcome.faults.append(f"ran for more than {SECONDS_BY_THE_CLOCK} s")
        except Exception as error:
            outcome.error = error
    if (seconds := time.process_time() - started) > SECONDS:
        outcome.faults.append(f"took {seconds:.0f} s")
    after = state(model)
    if draws:
        after["PyTorch's generator"] = before["PyTorch's generator"]
    outcome.faults += [f"changed the state: {name}" for name in before if not equal(before[name], after[name])]
    if outcome.error is not None:
        try:
            text = str(outcome.error)
        except Exception as error:
            text = f"an error whose text raises {type(error).__name__}"
            outcome.faults.append(text)
        if len(text) > MESSAGE:
            outcome.faults.append(f"an error of {len(text)} characters")
    return outcome


def works(call: Callable[[], object], model: nn.Module) -> str | None:
    """The first module of the two networks that `call`, which raises, runs before it does; None where none runs."""
    ran: list[str] = []
    networks = (model.visual, model.model)  # which may be called themselves: what counts is what they call
    handles = [
        module.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
        for network in networks
        for module in network.modules()
        if module is not network
    ]
    try:
        call()
    except Exception:
        return ran[0] if ran else None
    finally:
        for handle in handles:
            handle.remove()
    return "everything: it raised the first time only"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS_BY_THE_CLOCK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_slow(*_: object) -> None:
    raise TooSlow


def state(model: nn.Module) -> dict[str, object]:
    """What a call must leave as it is."""
    return {
        "PyTorch's generator": torch.get_rng_state(),
        "Python's generator": random.getstate()[1],
        "NumPy's generator": np.random.get_state()[1].tolist(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "training": [module.training for module in model.modules()],
        "parameters": [
            (name, id(parameter), parameter.data_ptr(), parameter._version, parameter.requires_grad, parameter.grad)
            for name, parameter in model.named_parameters()
        ],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
    }


def equal(a: object, b: object) -> bool:
    """Of two values of `state`."""
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b

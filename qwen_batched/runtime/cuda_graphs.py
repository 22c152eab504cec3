"""Calls as CUDA graphs: the first of a kind runs, the second is captured, later ones are replayed."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree

from qwen_batched.runtime import backend
from qwen_batched.runtime.admission import Uses
from qwen_batched.runtime.arena import Arena
from qwen_batched.runtime.fast_path import has_global_hooks
from qwen_batched.runtime.lru_cache import hold_values
from qwen_batched.runtime.room import Room, pad_all
from qwen_batched.runtime.snapshot import ModuleSnapshot, is_capturable


class Kept(Protocol):
    """Tensors that never change, of several calls."""

    tensors: Sequence[Tensor]


class OutdatedError(Exception):
    """A graph was replayed whose modules have changed since: its outputs are not theirs."""


T = TypeVar("T")
Check = Callable[[], None]  # whether a replayed graph was true; raises `OutdatedError`
Outputs = Any  # a pytree of tensors, and of what is the same at every call
MAX_GRAPHS = 32
MAX_RAN = 4096
NAMED_PRECISIONS = torch.__version__ >= "2.9"  # since then, reading the old setting raises where the new one was used


class CudaGraphs:
    """At most `max_graphs` captured calls of the same modules; once there are as many, for the commonest (see `Uses`).

    A call is captured only where nothing would be lost (see `is_capturable`) and replayed only while the modules are as
    they were. Results are copies. A copied or unpickled instance begins anew.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS, prepare: Callable[..., None] | None = None) -> None:
        """`prepare(*modules)` is called before the first call of modules is captured, and again once they changed."""
        self.max_graphs = max_graphs
        self._prepare = prepare
        self._calls: dict[Hashable, CapturedCall] = {}
        self._evicted: list[CapturedCall] = []  # that may still run
        self._uses = Uses()  # of calls that have run since the snapshot
        self._snapshot: ModuleSnapshot | None = None
        self._arena: Arena | None = None
        self._thread = threading.local()  # `refused`, `ran` and `replayed`, of the calls of a thread
        self._lock = threading.RLock()

    def run(
        self,
        modules: Sequence[nn.Module],
        key: Hashable,
        function: Callable[..., Outputs],
        *inputs: Tensor,
        device: torch.device,
        stateful: bool = False,
        kept: Kept | None = None,
        rooms: Sequence[Room | None] | None = None,
        checks: list[Check] | None = None,
    ) -> Outputs:
        """`function(*inputs, *kept.tensors)`, by a graph where there is one.

        It reads parameters of `modules` and tensors, on `device` or on the host, must not wait for the device, and
        returns a pytree. `key` is all else that shapes what it does, but the shapes and dtypes of `inputs`. Where it is
        `stateful`, it changes something and must not run in vain. What is `kept` never changes, and is copied to a
        graph once for all calls with it that follow each other. `rooms` says of each input whether the function is to
        have it with room behind it, graph or not: then inputs of all sizes that fit share the graph.

        A graph is replayed first and looked at then, while the device is at work. With `checks` that is left to the
        caller: it is added to them, for `make_all` once whatever follows is launched. Those that are there already, of
        graphs whose outputs are among the inputs, are made before the function itself runs.
        """
        if rooms is None:
            rooms = [None] * len(inputs)
        held, self._thread.replayed = () if kept is None else kept.tensors, None
        if _must_run_eagerly(inputs) or self._wants_gradient(modules, inputs):
            make_all(checks)
            return function(*pad_all(inputs, rooms), *held)
        # With autograd on, a call earns its own graph, by a run that gave nothing with a gradient.
        shapes = [*map(_buffer_shape, inputs, rooms), *(x.shape for x in held)]
        dtypes = [x.dtype for x in (*inputs, *held)]
        key = (key, device, torch.is_grad_enabled(), _numerics(), *shapes, *dtypes, *rooms)
        obstacle = None
        with self._lock:
            self._release_finished()
            call = self._calls.get(key)
            earns_graph = call is None and self._earns_graph(key) and self._still_matches(modules)
            if earns_graph and hash(key) in self._ran_here():
                call, obstacle = self._capture(key, function, inputs, rooms, held, device)
                earns_graph = False
            if call is not None and (not stateful or self._still_matches(modules)):
                outputs = call.replay(inputs, kept)
                if checks is not None and not stateful:
                    checks.append(functools.partial(self._check, modules, key, self._snapshot))
                    return outputs
                if stateful or self._still_matches(modules):  # asked while the GPU is at work
                    self._uses.note(key)
                    self._thread.replayed = call if stateful else None
                    return outputs
        try:
            make_all(checks)
            outputs = function(*pad_all(inputs, rooms), *held)
            if not any(isinstance(x, Tensor) and x.requires_grad for x in _pytree.tree_leaves(outputs)):
                self._remember(modules, key)
                if earns_graph:  # and this thread has run it now
                    with self._lock:
                        if key not in self._calls and self._still_matches(modules):
                            _, obstacle = self._capture(key, function, inputs, rooms, held, device)
        finally:
            if obstacle is not None:  # told at the end: where warnings are errors, the call has been made
                self._tell(obstacle)
        return outputs

    def repeat(
        self,
        modules: Sequence[nn.Module],
        key: Hashable,
        function: Callable[[], None],
        count: int,
        device: torch.device,
        checks: list[Check] | None = None,
    ) -> None:
        """`function()` so often, by a graph where there is one: it changes something, and nothing else does meanwhile.

        So the modules are looked at once. `checks` are as of `run`.
        """
        while count > 0:
            self.run(modules, key, function, device=device, stateful=True, checks=checks)
            call, count = self._thread.replayed, count - 1
            self._thread.replayed = None
            while call is not None and count > 0:
                call.replay(())
                count -= 1

    @contextlib.contextmanager
    def admitting_all(self, refused: list[RuntimeError]) -> Iterator[None]:
        """Inside the `with` block the second call of a kind is captured, whatever has to give way.

        Why one could not be is added to `refused`, without a warning.
        """
        self._thread.refused = refused
        try:
            yield
        finally:
            self._thread.refused = None

    def forget(self) -> None:
        """Forgets all calls; their memory stays for others."""
        with self._lock:
            for key in list(self._calls):
                self._evict(key)
            self._release_finished(wait=True)
            self._uses.clear()
            self._snapshot = None  # the last to go: it keeps what running graphs read

    def drop(self, key: Hashable) -> None:
        """Forgets the calls of one key, whatever their inputs were."""
        with self._lock:
            for full in [full for full in self._calls if full[0] is key]:
                self._evict(full)
            self._release_finished()

    def keys(self) -> set[Hashable]:
        """Those of the calls that are captured."""
        with self._lock:
            return {*self._calls}

    def keep_only(self, keys: Collection[Hashable]) -> None:
        """Forgets all other calls, and that some could not be captured."""
        with self._lock:
            for key in [key for key in self._calls if key not in keys]:
                self._evict(key)
            self._release_finished(wait=True)
            self._uses.admit_refused()

    def clear(self) -> None:
        """Forgets all calls, and lets go of their memory."""
        with self._lock:
            self.forget()
            self._arena = None

    def __len__(self) -> int:
        return len(self._calls)

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[int, Callable[..., None] | None]]:
        return CudaGraphs, (self.max_graphs, self._prepare)

    def _wants_gradient(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor]) -> bool:
        """Whether autograd is on and has anything to see. What nobody knows of (hooks) is never captured."""
        if not torch.is_grad_enabled():
            return False
        # It knows the parameters without a walk, as long as it is true; no replay comes of it if not.
        snapshot = self._snapshot
        if any(x.requires_grad for x in inputs):
            return True
        if snapshot is not None and not any(tensor.requires_grad for tensor in snapshot.tensors):
            return False
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def _still_matches(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the graphs are still true; they are dropped where not."""
        if self._snapshot is not None and self._snapshot.matches(*modules):
            return True
        self.forget()
        return False

    def _check(self, modules: Sequence[nn.Module], key: Hashable, snapshot: ModuleSnapshot | None) -> None:
        """Whether a graph of `key` that was replayed was true, as of a snapshot; raises `OutdatedError` where not."""
        with self._lock:
            if self._snapshot is not snapshot or not self._still_matches(modules):
                raise OutdatedError
            self._uses.note(key)

    def _remember(self, modules: Sequence[nn.Module], key: Hashable) -> None:
        """A call has run, kernels are compiled and tables made: from now on it may be captured."""
        with self._lock:
            if not self._still_matches(modules):
                if not is_capturable(*modules):
                    return
                if self._prepare is not None:
                    self._prepare(*modules)
                self._snapshot = ModuleSnapshot(*modules)
            self._uses.note(key)
            self._ran_here().add(hash(key))  # no key is kept alive: one may hold a whole cache

    def _ran_here(self) -> set[int]:
        """What this thread has run: cuBLAS and cuDNN make handles and plans for each, which no capture survives."""
        ran = self._thread.__dict__.setdefault("ran", set())
        if len(ran) > MAX_RAN:
            ran.clear()
        return ran

    def _earns_graph(self, key: Hashable) -> bool:
        """Whether a call has run, and there is room or it is worth the place of another."""
        return key in self._uses and (
            getattr(self._thread, "refused", None) is not None
            or len(self._calls) < self.max_graphs
            or self._uses.is_commoner(key, self._uses.least_common(self._calls))
        )

    def _capture(
        self,
        key: Hashable,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        rooms: Sequence[Room | None],
        held: Sequence[Tensor],
        device: torch.device,
    ) -> tuple[CapturedCall | None, RuntimeError | None]:
        """The call as a graph, or why there is none."""
        if len(self._calls) >= self.max_graphs:
            self._evict(self._uses.least_common(self._calls))
            self._release_finished()
        try:
            self._arena = Arena.of(device)
            try:
                self._calls[key] = CapturedCall(function, inputs, rooms, held, self._arena)
            except torch.OutOfMemoryError:
                self._release_finished(wait=True)
                torch.cuda.empty_cache()  # which the allocator cannot do by itself inside a capture
                self._calls[key] = CapturedCall(function, inputs, rooms, held, self._arena)
        except RuntimeError as error:  # out of memory, or something in the call that a graph cannot hold
            self._uses.refuse(key)
            return None, error
        return self._calls[key], None

    def _tell(self, obstacle: RuntimeError) -> None:
        refused = getattr(self._thread, "refused", None)
        if refused is not None:
            refused.append(obstacle)
        else:
            message = f"no CUDA graph for this shape, it runs without: {obstacle}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _evict(self, key: Hashable) -> None:
        """A graph gives up its place; its memory is no one else's until the device is through with it."""
        self._evicted.append(self._calls.pop(key))

    def _release_finished(self, wait: bool = False) -> None:
        """Lets go of evicted graphs that do not run any more, or waits until none does."""
        if wait:
            for call in self._evicted:
                call.wait()
        self._evicted = [call for call in self._evicted if not call.is_done()]


class CapturedCall:
    """A call as a CUDA graph, with the memory that it reads and writes."""

    def __init__(
        self,
        function: Callable[..., Outputs],
        inputs: Sequence[Tensor],
        rooms: Sequence[Room | None],
        held: Sequence[Tensor],
        arena: Arena,
    ) -> None:
        """Captures `function(*inputs, *held)`, inputs with room; it is not run.

        Raises `RuntimeError` where that cannot be done.
        """
        self.arena = arena
        self._rooms = rooms
        self._sizes: list[int | None] = [None] * len(inputs)  # of the last value of each input with room
        self._done: torch.cuda.Event | None = None  # the last replay; None before the first
        # Outside inference mode: a graph captured within it is replayed outside it too.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [
                torch.empty(_buffer_shape(x, room), dtype=x.dtype, device=arena.device)
                for x, room in zip(inputs, rooms, strict=True)
            ]
            self.held = [torch.empty(x.shape, dtype=x.dtype, device=arena.device) for x in held]
            # The tables that the call takes from caches live as long as the graph, whatever the caches forget.
            with hold_values() as self.tables, arena.capture() as self.graph, backend.reading_ahead():
                self.outputs, self._spec = _pytree.tree_flatten(function(*self.inputs, *self.held))
        self._kept: weakref.ref[Kept] | None = None  # whose tensors are in `held`

    def replay(self, inputs: Sequence[Tensor], kept: Kept | None = None) -> Outputs:
        """The outputs for `inputs`, as copies."""
        with self.arena.in_turn() as self._done:
            if kept is not None and (self._kept is None or self._kept() is not kept):
                self._kept = None
                for buffer, value in zip(self.held, kept.tensors, strict=True):
                    buffer.copy_(value, non_blocking=True)
                self._kept = weakref.ref(kept)
            for index, (value, buffer, room) in enumerate(zip(inputs, self.inputs, self._rooms, strict=True)):
                if room is None:
                    buffer.copy_(value, non_blocking=True)
                else:
                    last, self._sizes[index] = self._sizes[index], None
                    room.write(value, buffer, last)
                    self._sizes[index] = value.shape[room.dim]
            self.graph.replay()
            return _pytree.tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.outputs], self._spec)

    def is_done(self) -> bool:
        """Whether the device is through with the last replay."""
        return self._done is None or self._done.query()

    def wait(self) -> None:
        """Returns when it is."""
        if self._done is not None:
            self._done.synchronize()


def make_all(checks: list[Check] | None) -> None:
    """Makes the checks that there are, and empties the list. Raises `OutdatedError` where one fails."""
    while checks:
        checks.pop(0)()


def deferring_checks(run: Callable[[list[Check] | None], T]) -> T:
    """`run` with a list for checks; where one of them fails, again without, to look at modules at once."""
    checks: list[Check] = []
    try:
        return run(checks)
    except OutdatedError:
        pass
    except Exception:  # perhaps of outputs that are outdated
        try:
            make_all(checks)
        except OutdatedError:
            pass
        else:
            raise
    return run(None)


def _buffer_shape(value: Tensor, room: Room | None) -> torch.Size:
    return value.shape if room is None else room.shape(value)


def _must_run_eagerly(inputs: Sequence[Tensor]) -> bool:
    """Under a compiler, autocast, an enclosing capture, global hooks or a transform, or with tensors of other types."""
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")
        or torch.cuda.is_current_stream_capturing()
        or has_global_hooks()
        or torch._C._functorch.maybe_current_level() is not None  # torch.func.vmap and the like
        or any(type(x) is not Tensor or forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    )


def _numerics() -> tuple[Hashable, ...]:
    """Settings outside a call's arguments that choose its kernels."""
    matmul = torch.backends.cuda.matmul
    return (
        backend.backend(),
        (torch.backends.fp32_precision, matmul.fp32_precision) if NAMED_PRECISIONS else matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )

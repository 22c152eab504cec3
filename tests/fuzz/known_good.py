"""What was always right and must stay so: no injection, the same bits in long runs, threads, interrupts.

    python -m tests.fuzz.known_good [--prompts 210000] [--calls 10000] [--threads 4] [--interrupts 1000] [--seed 0]

1. No text becomes a control token, and every text decodes to itself (`injection`).
2. Many calls of 50 shapes in random order: each gives bitwise what the first of its shape gave, and memory stays flat.
3. Threads call one model at once, and the process forks meanwhile: each call, in the children too, is bitwise as alone.
4. A KeyboardInterrupt at a random point of a call, of loading or of saving: the next call is bitwise as before, global
   state and caches are intact, and the folder has its old files or its new ones, with nothing else after the next load.
"""

import argparse
import copy
import functools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import qwen_batched
from qwen_batched import QwenBatchedVL
from qwen_batched.checkpoint.atomic_save import STAGING
from qwen_batched.runtime.lru_cache import LRUCache
from qwen_batched.testing import write_checkpoint
from tests.fuzz import watch
from tests.fuzz.injection import Injection
from tests.fuzz.interrupted import files, in_a_child
from tests.support import noise

SHAPES = 50
SIZES = ((28, 28), (56, 56), (56, 84), (84, 56), (60, 75), (31, 90), (112, 40), (140, 140))
TEXTS = (
    "Pick up the red block.",
    "Go.",
    "Open the drawer, then close it.",
    "红色 <|im_end|> 🤖",
    "A longer text. " * 6,
)
TEMPLATES = ("chat", "chat", "plain", "{images}{text}", "look {images} do {text} now")
METHODS = ("forward", "forward", "generate", "encode_images", "prepared")
WARM_CALLS = 1000  # after so many, memory counts
MAX_GROWTH = 24 * 2**20  # bytes that a process may grow by after them: less than 3 KiB a call
CHILD_SECONDS = 60  # by the clock, after which a forked child counts as hanging
SOURCE = str(Path(qwen_batched.__file__).parent)

Call = Callable[[QwenBatchedVL], list[Tensor]]


def make_call(rng: Random) -> Call:
    """A right call, whose tensors are always the same."""
    method, batch = rng.choice(METHODS), rng.choice((1, 2, 3))
    cameras = rng.choice((1, 2) if method == "encode_images" else (0, 1, 1, 2))
    images: Tensor | list[Tensor] | None = None
    if cameras and rng.random() < 0.6:
        images = noise(batch, cameras, *rng.choice(SIZES), seed=rng.getrandbits(30))
        images = images.float() / 255 if rng.random() < 0.3 else images
    elif cameras:
        images = [noise(1, batch, *rng.choice(SIZES), seed=rng.getrandbits(30))[0] for _ in range(cameras)]
    if method == "encode_images":
        return lambda model: _tensors(model.encode_images(images))
    arguments = {"images": images, "texts": rng.choices(TEXTS, k=batch), "template": rng.choice(TEMPLATES)}
    if cameras and rng.random() < 0.5:
        arguments["camera_mask"] = torch.tensor([[rng.random() < 0.6 for _ in range(cameras)] for _ in range(batch)])
    if method == "generate":
        draws = {"temperature": 0.8, "seed": rng.getrandbits(30)} if rng.random() < 0.4 else {}
        return lambda model: _tensors(model.generate(**arguments, max_new_tokens=3, **draws).token_ids)
    if rng.random() < 0.4:
        arguments["targets"] = rng.choices(TEXTS, k=batch)
    if method == "prepared":
        return lambda model: _of_output(model(**model.processor(**arguments)))
    options = {"layers": rng.choice(((-1,), (0, -1))), "logits": rng.choice((None, "last", "all"))}
    return lambda model: _of_output(model(**arguments, **options))


def _of_output(out: object) -> list[Tensor]:
    return _tensors([*out.hidden_states, out.input_ids, out.image_features, out.logits, out.loss])


def _tensors(value: object) -> list[Tensor]:
    """Copies of all tensors in nested lists."""
    if isinstance(value, Tensor):
        return [value.clone()]
    return [tensor for part in value or () for tensor in _tensors(part)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether the tensors are equal to the last bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


class KnownGood:
    """A model and calls of it with their results.

    Attributes:
        faults: What went wrong, in words.
    """

    def __init__(self, root: Path, seed: int = 0, shapes: int = SHAPES) -> None:
        """Takes an empty folder for checkpoints."""
        self.root, self.seed = root, seed
        self.folder = write_checkpoint(root / "checkpoint", "tiny", image={"min_pixels": 28 * 28})
        self.model = self._load()
        self.calls = [make_call(Random(f"{seed} {index}")) for index in range(shapes)]
        self.results = [self._run(index) for index in range(shapes)]
        self.faults: list[str] = []

    def inject(self, prompts: int) -> str:
        """Encodes hostile prompts."""
        (self.root / "tokenizer").mkdir(exist_ok=True)
        injection = Injection(self.folder, self.root / "tokenizer", self.seed)
        before = len(self.faults)
        for index in range(prompts):
            self.faults += [f"prompt {index}: {fault}" for fault in injection.faults(index)]
        return f"{prompts} prompts: {len(self.faults) - before} faults"

    def soak(self, calls: int) -> str:
        """Makes calls in random order."""
        rng, warm = Random(f"{self.seed} soak"), min(WARM_CALLS, calls // 2)
        growth = changed = at_first = 0
        for number in range(calls):
            at_first = resident() if number == warm else at_first
            changed += self._differs(rng.randrange(len(self.calls)), "soak")
        growth = resident() - at_first
        if growth > MAX_GROWTH:
            self.faults.append(f"soak: grew by {growth / 2**20:.1f} MiB after call {warm}")
        return (
            f"{calls} calls of {len(self.calls)} shapes: {changed} not bitwise, {growth / 2**20:+.1f} MiB after {warm}"
        )

    def threads(self, threads: int, calls: int, forks: int) -> str:
        """Makes `calls` in each of several threads at once, and forks meanwhile."""
        changed = [0] * threads

        def work(thread: int) -> None:
            rng = Random(f"{self.seed} thread {thread}")
            for _ in range(calls):
                changed[thread] += self._differs(rng.randrange(len(self.calls)), f"thread {thread}")

        # A model of its own whose caches are empty: to fill them is what threads may do wrong.
        self.model, model = copy.deepcopy(self.model), self.model
        running = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
        for thread in running:
            thread.start()
        rng, ended, busy = Random(f"{self.seed} forks"), Counter(), 0
        for _ in range(forks):
            busy += any(thread.is_alive() for thread in running)
            index = rng.randrange(len(self.calls))
            signalled, (done, value) = in_a_child(functools.partial(self._in_child, index))
            right = not signalled and done and value
            ended[right] += 1
            if not right:
                self.faults.append(f"fork: call {index} in a child: signal {signalled}, {value}")
        for thread in running:
            thread.join()
        self.model = model
        return (
            f"{threads} threads of {calls} calls: {sum(changed)} not bitwise; {forks} forks, {busy} beside busy "
            f"threads: {ended[False]} not right"
        )

    def interrupt(self, interrupts: int) -> str:
        """Interrupts calls, half of them by real signals and half on models with empty caches."""
        rng, counts = Random(f"{self.seed} interrupts"), Counter()
        for number in range(interrupts):
            index, cold, by_signal = rng.randrange(len(self.calls)), rng.random() < 0.5, rng.random() < 0.5
            model = copy.deepcopy(self.model) if cold else self.model
            call = functools.partial(self._run, index, model)
            how = f"{'cold' if cold else 'warm'}, {'by a signal' if by_signal else 'by count'}"
            what = f"interrupt {number} of call {index}, {how}"
            where: list[str] = []
            before = watch.state(model)
            points, seconds = measure(functools.partial(self._run, index, copy.deepcopy(model) if cold else model))
            if by_signal:
                result = interrupted_by_a_signal(call, rng.uniform(1e-5, seconds), where)
            else:
                result = interrupted_at(call, rng.randint(1, points))
            counts["came" if result is None else "came too late"] += 1
            if result is not None and not same(result, self.results[index]):
                self.faults.append(f"{what}: another result")
            after = watch.state(model)
            changed = [name for name in before if not watch.equal(before[name], after[name])]
            self.faults += [f"{what}: {name} changed {''.join(where)}" for name in changed]
            torch.set_grad_enabled(before["grad mode"])  # else each later interrupt would be told of it again
            self.faults += [f"{what}: {fault}" for fault in cache_faults()]
            self._differs(index, what, model)
            self._differs(rng.randrange(len(self.calls)), what, model)
        return f"{interrupts} interrupts of calls: {dict(counts)}"

    def interrupt_files(self, interrupts: int) -> str:
        """Interrupts loading, and saving over another checkpoint."""
        rng, counts = Random(f"{self.seed} files"), Counter()
        loading, _ = measure(self._load)
        target = self.root / "target"
        with mock.patch("os.fsync"):  # an interrupt is no loss of power
            old = self._another(target)
            saving, _ = measure(lambda: self.model.save_pretrained(target))
            new = files(target)
            for number in range(interrupts):
                if interrupted_at(self._load, rng.randint(1, loading)) is None:
                    counts["loading"] += 1
                self.faults += [f"loading {number}: {fault}" for fault in cache_faults()]
                self._differs(rng.randrange(len(self.calls)), f"after loading {number}", self._load())
                if files(target) != old:
                    old = self._another(target)
                save = functools.partial(self.model.save_pretrained, target)
                interrupted_at(save, rng.randint(1, saving))
                found = files(target)
                if any(STAGING in name for name in found):  # the interrupt came while it cleaned up
                    counts["saving, cleaned up by the next load"] += 1
                    QwenBatchedVL.from_pretrained(target, device="cpu")
                    found = files(target)
                counts["saving, found " + ("old" if found == old else "new")] += 1
                if found not in (old, new):
                    self.faults.append(f"saving {number}: a folder of neither: {sorted(found)}")
                self._differs(rng.randrange(len(self.calls)), f"after saving {number}")
        return f"{interrupts} interrupts of loading and of saving: {dict(counts)}"

    def _another(self, folder: Path) -> dict[str, object]:
        """Other weights and other files in a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, "tiny", seed=1, shards=2)
        (folder / "note.txt").write_text("mine", encoding="utf-8")
        return files(folder)

    def _load(self) -> QwenBatchedVL:
        return QwenBatchedVL.from_pretrained(self.folder, device="cpu").requires_grad_(False)

    def _run(self, index: int, model: QwenBatchedVL | None = None) -> list[Tensor]:
        with torch.no_grad():
            return self.calls[index](model or self.model)

    def _in_child(self, index: int) -> bool:
        signal.alarm(CHILD_SECONDS)  # ends a child that hangs
        return same(self._run(index), self.results[index])

    def _differs(self, index: int, what: str, model: QwenBatchedVL | None = None) -> bool:
        """Whether a call gives anything but what it gave first; notes it."""
        try:
            if same(self._run(index, model), self.results[index]):
                return False
            self.faults.append(f"{what}: call {index} is not bitwise what it was")
        except Exception as error:
            self.faults.append(f"{what}: call {index}: {type(error).__name__}: {error!s:.300}")
        return True


def measure(work: Callable[[], object]) -> tuple[int, float]:
    """How many points there are at which `work` can be interrupted, and how many seconds it takes without counting."""
    hook = _Hook(None)
    hook.run(work)
    started = time.perf_counter()
    work()
    return hook.points, time.perf_counter() - started


def interrupted_at(work: Callable[[], object], point: int) -> object | None:
    """Its result; None where the interrupt stopped it."""
    try:
        result = _Hook(point).run(work)
    except KeyboardInterrupt:
        return None
    return [] if result is None else result


def interrupted_by_a_signal(work: Callable[[], object], seconds: float, where: list[str]) -> object | None:
    """The same by a timer, as by Ctrl-C: anywhere, PyTorch's own functions included. Notes where it came."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as interrupt:
        where.extend(traceback.format_tb(interrupt.__traceback__)[-4:])
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    return result


class _Hook:
    """Counts the points in the package at which Python looks for signals, and interrupts at one of them.

    These are the start of a function and the return of a C function.
    """

    def __init__(self, point: int | None) -> None:
        self.points, self._point = 0, point

    def run(self, work: Callable[[], object]) -> object:
        sys.setprofile(self._see)
        try:
            return work()
        finally:
            sys.setprofile(None)

    def _see(self, frame: object, event: str, _: object) -> None:
        if event not in ("call", "c_return") or not frame.f_code.co_filename.startswith(SOURCE):
            return
        self.points += 1
        if self.points == self._point:
            raise KeyboardInterrupt


def cache_faults() -> list[str]:
    """What is wrong with the books of any cache of the process."""
    faults = []
    for cache in list(LRUCache._instances):
        if cache._lock.locked():
            faults.append("a cache is locked")
        elif cache._bytes != (kept := sum(size for _, size in cache._values.values())):
            faults.append(f"a cache counts {cache._bytes} bytes and has {kept}")
    return faults


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each part and what is wrong. Returns 1 where something is."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.known_good", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=210_000)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=4, help="each makes a tenth of the calls")
    parser.add_argument("--interrupts", type=int, default=1000, help="of calls; a fifth as many of loading and saving")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        known = KnownGood(Path(root), options.seed)
        parts = (
            functools.partial(known.soak, options.calls),
            functools.partial(known.threads, options.threads, options.calls // 10, max(1, options.calls // 250)),
            functools.partial(known.interrupt, options.interrupts),
            functools.partial(known.interrupt_files, options.interrupts // 5),
            functools.partial(known.inject, options.prompts),
        )
        for part in parts:
            started = time.perf_counter()
            print(f"{part()} ({time.perf_counter() - started:.0f} s)", flush=True)
    for fault in known.faults[:50]:
        print(fault)
    print(f"{len(known.faults)} faults")
    return int(bool(known.faults))


if __name__ == "__main__":
    sys.exit(main())

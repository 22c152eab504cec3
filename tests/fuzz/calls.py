"""Thousands of odd calls: each gives a right result, or ValueError or TypeError before any work, and changes nothing.

python -m tests.fuzz.calls --count 20000 --seed 0      all of them, half public, half of prepared batches
python -m tests.fuzz.calls --seed 0 --only 1234        one again, with what it is
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from tests.fuzz import prepared, public, watch
from tests.fuzz.comparison import Wrong
from tests.fuzz.reading import Doubts, Refused, read_tensor
from tests.support import noise


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# What a call may be made under without a difference.
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "gradients off": torch.no_grad,
    "gradients on": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "another default dtype": _default_dtype,
    "another default device": lambda: torch.device("meta"),
}
FAMILIES = {"public": public.make_call, "prepared": prepared.make_call}


class GoodCalls:
    """Right calls whose results must stay the same to the last bit, whatever came between."""

    def __init__(self, model: QwenBatchedVL) -> None:
        frames, texts = noise(2, 2, 56, 84), ["Pick up the red block.", "Go."]
        mask = torch.tensor([[True, False], [True, True]])
        batch = model.processor(frames, texts, mask, targets=["left", "up"])

        def forward() -> list[object]:
            out = model(frames, texts, camera_mask=mask, logits="last")
            return [out.last_hidden_state, out.logits, out.image_features]

        def prepared_forward() -> list[object]:
            out = model(**batch)
            return [out.last_hidden_state, out.loss]

        self._calls: list[Callable[[], list[object]]] = [
            forward,
            lambda: model.generate(frames, texts, max_new_tokens=3, temperature=0.7, seed=0).token_ids,
            lambda: [model.encode_images([frames[:, 0], frames[:, 1, :, :28]])[1]],
            prepared_forward,
        ]
        self._results = [self._run(call) for call in self._calls]

    @staticmethod
    def _run(call: Callable[[], list[object]]) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.clone() for tensor in call()]

    def changed(self, index: int) -> bool:
        """Whether one of them, in turns, gives something else."""
        index %= len(self._calls)
        try:
            results = self._run(self._calls[index])
        except Exception:
            traceback.print_exc()
            return True
        return not all(map(torch.equal, results, self._results[index]))


class Fuzzer:
    """Makes calls, each by its seed and number alone, and says what is wrong with them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        write_checkpoint(folder, "tiny", image={"min_pixels": 28 * 28})
        self.model = QwenBatchedVL.from_pretrained(folder, device="cpu").requires_grad_(False)
        self.seed = seed
        self.good = GoodCalls(self.model)
        self.outcomes: Counter[str] = Counter()

    def call(self, index: int) -> public.Call:
        """The call of that number: those of the two families in turns."""
        rng = Random(f"{self.seed} {index}")
        family = tuple(FAMILIES)[index % len(FAMILIES)]
        context = rng.choice(tuple(CONTEXTS)) if rng.random() < 0.3 else "gradients off"
        return FAMILIES[family](rng, self.model, context)

    def faults(self, index: int) -> list[str]:
        """What is wrong with a call; nothing where all is well."""
        call = self.call(index)
        verdict, doubts, check = self._read(call)
        before = _readable(call.arguments)

        def make() -> object:
            with CONTEXTS[call.context]():
                return call.make(self.model)

        with CONTEXTS[call.context]():
            outcome = watch.run(lambda: call.make(self.model), self.model, call.draws)
        faults = list(outcome.faults)
        if outcome.error is not None:
            faults += self._of_an_error(outcome.error, verdict, doubts, make)
        else:
            faults += self._of_a_result(outcome.result, verdict, doubts, check)
        if not _same(before, _readable(call.arguments)):
            faults.append("changed its arguments")
        if self.good.changed(index):
            faults.append("changed what a good call gives")
            self.good = GoodCalls(self.model)
        return faults

    def _read(self, call: public.Call) -> tuple[str | None, Doubts, Callable | None]:
        """Why the call must be refused, or None; why that is open; and how a result is checked."""
        doubts = Doubts()
        try:
            with torch.no_grad():
                return None, doubts, call.read(doubts)
        except Refused as refused:
            return str(refused), doubts, None

    def _of_an_error(
        self, error: BaseException, verdict: str | None, doubts: Doubts, make: Callable[[], object]
    ) -> list[str]:
        if not isinstance(error, (ValueError, TypeError)) or isinstance(error, UnicodeError):
            return [f"{type(error).__name__}: {_line(error)} [{_place(error)}]"]
        if verdict is None and not doubts.reasons:
            return [f"refused though it is right: {type(error).__name__}: {_line(error)} [{_place(error)}]"]
        self.outcomes["refused"] += 1
        worked = watch.works(make, self.model)
        return [] if worked is None else [f"refused after {worked} ran: {_line(error)} [{_place(error)}]"]

    def _of_a_result(
        self, result: object, verdict: str | None, doubts: Doubts, check: Callable[[QwenBatchedVL, object], None] | None
    ) -> list[str]:
        if verdict is not None:
            return [f"ran though it must be refused: {verdict}"] if not doubts.reasons else []
        self.outcomes["ran"] += 1
        try:
            with torch.no_grad():
                check(self.model, result)
        except Wrong as wrong:
            return [f"wrong result: {wrong}"]
        except Exception as error:
            return [f"the result could not be checked: {type(error).__name__}: {_line(error)} [{_place(error)}]"]
        return []


def describe(call: public.Call) -> str:
    """A call in words, for whoever looks into it."""
    lines = [f"{call.method}, {call.context}: {'; '.join(call.notes) or 'as it is'}"]
    return "\n".join([*lines, *(f"    {name} = {_shown(value)}" for name, value in call.arguments.items())])


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        kind = "" if type(value) is Tensor else f"{type(value).__name__} "
        return (
            f"{kind}{value.dtype} {[*value.shape] if not value.is_nested else 'nested'} {value.layout} {value.device}"
        )
    if isinstance(value, (list, tuple)):
        more = [f"... {len(value)} items"] if len(value) > 4 else []
        return f"{type(value).__name__}({', '.join([*map(_shown, value[:4]), *more])})"
    try:
        return repr(value)[:100]
    except ValueError:
        return f"{type(value).__name__} without repr"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _place(error: BaseException) -> str:
    """The last lines of the package on the way to an error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "qwen_batched" in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-2:])


def _readable(value: object) -> list[Tensor]:
    """Copies of the tensors in the arguments."""
    if isinstance(value, Tensor):
        try:
            return [read_tensor(value, Doubts())]
        except (Refused, RuntimeError, NotImplementedError):
            return []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _readable(part)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    as_bytes = [[x.flatten().view(torch.uint8) for x in tensors if x.numel()] for tensors in (before, after)]
    return len(before) == len(after) and all(map(torch.equal, *as_bytes))


def main(arguments: list[str] | None = None) -> int:
    """Prints what is wrong, each kind once. Returns 1 where something is."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.calls", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a call")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.seed)
        if options.only is not None:
            print(describe(fuzzer.call(options.only)))
            print("\n".join(found := fuzzer.faults(options.only)) or "all is well")
            return int(bool(found))
        kinds: defaultdict[str, list[int]] = defaultdict(list)
        for index in range(options.start, options.start + options.count):
            for fault in fuzzer.faults(index):
                kinds[_kind(fault)].append(index)
                if len(kinds[_kind(fault)]) == 1:
                    print(f"{index}: {fault}\n  {describe(fuzzer.call(index))}", flush=True)
            if (index + 1) % 1000 == 0:
                print(f"{index + 1} calls, {sum(map(len, kinds.values()))} faults", file=sys.stderr, flush=True)
    print(f"\n{options.count} calls: {dict(fuzzer.outcomes)}; {len(kinds)} kinds of faults")
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(found):6} x {kind} ({', '.join(map(str, found[:5]))})")
    return int(bool(kinds))


def _kind(fault: str) -> str:
    """A fault without its numbers and values, so that each kind is shown once."""
    head, _, place = fault.rpartition(" [")
    if head:
        return f"{re.sub(r'[^:]*$', '', head)[:60]} [{place}"
    return re.sub(r"\d+", "#", fault)[:60]


if __name__ == "__main__":
    sys.exit(main())

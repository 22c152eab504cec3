"""How much work and memory one rendering of a chat template may take, counted before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

# Published templates have up to 30,000 characters and take some thousand steps.
MAX_SOURCE, MAX_STEPS, MAX_BYTES = 1 << 16, 1 << 20, 1 << 26
MAX_NUMBER = 100_000  # of an argument, as in Jinja's own `range`
ITEM = 64  # bytes charged for a value, beside its characters: a walk over values takes time too
WEIGHT = 16  # bytes charged for a character that a function may turn into several, or into objects

MARK = "\ue000"  # begins whatever stands for a text while a layout is rendered; from Unicode's private use area

# Functions that read each character once and write it at most once.
PLAIN = frozenset(
    (
        *("attr", "capitalize", "count", "d", "default", "endswith", "find", "first", "get", "index", "items", "keys"),
        *("last", "length", "lower", "lstrip", "map", "reject", "rejectattr", "removeprefix", "removesuffix", "rstrip"),
        *("safe", "select", "selectattr", "startswith", "string", "strip", "title", "trim", "upper", "values"),
    )
)
SCALED = frozenset({"batch", "expandtabs", "indent", "slice", "tojson", "truncate"})  # output: a product of arguments
FORMATS = frozenset({"format", "format_map"})


class TemplateBudgetError(Exception):
    """A template does more than any chat template has to. Not a `ValueError`, which filters catch."""


class Run:
    """What one rendering may still do, and what it has been seen to do."""

    def __init__(self) -> None:
        self.steps, self.bytes = MAX_STEPS, MAX_BYTES
        self.looked = False  # whether something else than printing was done with a marked text

    def step(self, steps: int = 1) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TemplateBudgetError(f"it takes more than {MAX_STEPS} steps")

    def spend(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise TemplateBudgetError(f"it makes more than {MAX_BYTES} bytes")

    def measure(self, value: Any) -> tuple[int, bool]:
        """The bytes of a value, what it holds included as often as it would be printed, and whether any is marked."""
        if isinstance(value, str):  # most are
            return ITEM + len(value), MARK in value
        total, marked, pending = 0, False, [value]
        while pending:
            item = pending.pop()
            total += ITEM
            if isinstance(item, (str, bytes)):
                total += len(item)
                marked = marked or is_marked(item)
            elif isinstance(item, int):
                total += item.bit_length() // 3
            elif isinstance(item, range):
                total += ITEM * len(item)
            elif isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, Namespace):
                pending.append(object.__getattribute__(item, "_Namespace__attrs"))
            elif isinstance(item, Iterable) and not isinstance(item, (Iterator, LoopContext, jinja2.Undefined)):
                pending += item
            if total > self.bytes:
                raise TemplateBudgetError(f"it makes more than {MAX_BYTES} bytes")
        return total, marked

    def taste(self, value: Any) -> None:
        """Charges for a value that is read whole, and notes if it is marked."""
        total, marked = self.measure(value)
        self.spend(total)
        self.looked = self.looked or marked

    def spend_on(self, name: str, values: tuple[Any, ...]) -> bool:
        """Charges for a function by what it is given. Returns whether any of it is marked."""
        self.step()
        numbers = sum(abs(value) for value in values[1:] if isinstance(value, int))
        if numbers > MAX_NUMBER:
            raise TemplateBudgetError(f"{name!r} is given {numbers}, more than {MAX_NUMBER}")
        size, marked = self.measure(values)
        strings = [value for value in values if isinstance(value, str)]
        if name in FORMATS:
            size = format_cost(values[0], size + numbers)
        elif name in SCALED:
            size *= 6 + numbers + sum(map(len, strings[1:]))
        elif name == "replace":
            counts = [(strings[0].count(old) + 1) * len(new) for old in strings[1:] for new in strings[1:]]
            size += max(counts, default=size * size)
        elif name == "join":
            longest = max(map(len, strings), default=0)
            size += longest * max((len(value) for value in values if isinstance(value, Sized)), default=0)
        elif name not in PLAIN:
            size *= WEIGHT
        self.spend(size + numbers)
        return marked

    def given(self, value: Any) -> Any:
        """Charges for a result; one that comes item by item, item by item."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self._items(value)
        self.spend(self.measure(value)[0])
        return value

    def printed(self, value: Any) -> Any:
        """Of what becomes part of a string as it is. Python shows strings within a list or dict otherwise."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            raise jinja2.TemplateRuntimeError("an iterator is printed, whose text is different every time")
        size, marked = self.measure(value)
        self.spend(size)
        self.looked = self.looked or (marked and not isinstance(value, str))
        return value

    def _items(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield self.given(item)


def is_marked(value: Any) -> bool:
    """Whether a value is a string with a mark in it."""
    return isinstance(value, str) and MARK in value


def format_cost(template: Any, arguments: int) -> int:
    """Of `%` and `format`: widths are written in the template, or come from the arguments."""
    text = template if isinstance(template, str) else ""
    if re.search(r"\{[^{}]*\{", text):
        raise TemplateBudgetError("a format takes its width from its arguments")
    widths = sum(min(int(digits[:12]), MAX_BYTES + 1) for digits in re.findall(r"[0-9]+", text))
    return len(text) + widths + (text.count("{") + text.count("%")) * arguments


_run: ContextVar[Run] = ContextVar("qwen_batched_template_run")


@contextmanager
def bounded() -> Iterator[Run]:
    """What is compiled and rendered inside the `with` block has one budget."""
    run = Run()
    token = _run.set(run)
    try:
        yield run
    finally:
        _run.reset(token)


def current() -> Run:
    """The budget of the rendering in progress."""
    return _run.get()

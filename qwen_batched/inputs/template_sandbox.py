"""Runs a chat template, which is a program from a checkpoint, within bounds of work and memory.

Jinja's own sandbox keeps a template from files and code. It does not keep it from loops of 10^12 steps or strings of
10^12 characters. Here every loop, call, filter, test and operator is counted before it runs: no clock, so that a
template that is refused once is refused always. The same hooks see whether the template looks at the text that it lays
out: a text that is marked and only ever printed or joined has no influence on anything else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from qwen_batched.inputs.template_budget import MAX_SOURCE, TemplateBudgetError, current, format_cost, is_marked
from qwen_batched.inputs.template_nodes import HookedNodes

MAX_BITS = 1 << 16  # of an integer
# Filters whose work or output no bound holds, or that give something else at every call.
REFUSED_FILTERS = frozenset({"random", "urlize", "xmlattr", "striptags", "wordwrap", "pprint"})
REFUSED_METHODS = frozenset({"translate", "maketrans"})
# Of these the result hangs on a value's type, or not on the strings within a list or dict.
TYPE_TESTS = frozenset(
    (
        *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none"),
        *("number", "sequence", "string", "true", "undefined"),
    )
)
SHALLOW = frozenset({"count", "first", "get", "items", "keys", "last", "length", "list", "reverse", "values"})


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates (`_compile_jinja_template`), counting."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        settings = {"trim_blocks": True, "lstrip_blocks": True, "optimized": False, "cache_size": 0}
        super().__init__(extensions=[_Generation, loopcontrols], finalize=_printed, **settings)
        filters = {name: filter_ for name, filter_ in self.filters.items() if name not in REFUSED_FILTERS}
        self.filters = {name: _counted(name, filter_) for name, filter_ in {**filters, "tojson": _tojson}.items()}
        self.tests = {name: _counted_test(name, test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _SafeNamespace}
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def template(self, source: str) -> jinja2.Template:
        """Compiles, within `bounded`. Raises whatever Jinja raises, and `TemplateBudgetError`."""
        if len(source) > MAX_SOURCE:
            raise TemplateBudgetError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        tree = HookedNodes().visit(self.parse(source))
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    # Called by the compiled template; `HookedNodes` puts in those that Jinja does not call by itself.

    def step(self, steps: int, data: int) -> bool:
        """Of a loop's or macro's body: its size, and the characters that it prints as they stand."""
        run = current()
        run.step(steps)
        run.spend(data)
        return True

    def truth(self, value: Any) -> Any:
        """Of a condition, or what a loop goes through."""
        if is_marked(value):
            current().looked = True
        return value

    def compared(self, value: Any, keys_only: bool) -> Any:
        """Of an operand."""
        run = current()
        run.step()
        run.taste(list(value) if keys_only and isinstance(value, dict) else value)
        return value

    def made(self, value: Any) -> Any:
        """Of a list, tuple or dict as it is written in the template."""
        run = current()
        if isinstance(value, dict):
            run.looked = run.looked or any(map(is_marked, value))
        return run.given(value)

    def joined(self, *values: Any) -> str:
        """`~`."""
        run = current()
        for value in values:
            run.printed(value)
        return "".join(map(str, values))

    def sliced(self, value: Any, *bounds: Any) -> Any:
        """`value[start:stop:step]`."""
        run = current()
        run.looked = run.looked or any(map(is_marked, (value, *bounds)))
        run.given(value)
        return value[slice(*bounds)]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        run = current()
        run.step()
        size, marked = run.measure((left, right))
        # `+` joins strings, but it escapes one that is added to what `safe` gives.
        joins = operator == "+" and not isinstance(left, Markup) and not isinstance(right, Markup)
        run.looked = run.looked or (marked and not joins)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    size *= max(times, 1)
        elif operator == "%" and isinstance(left, (str, bytes)):
            size = format_cost(left if isinstance(left, str) else left.decode("latin1"), size + _largest(right))
        run.spend(size)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 0)
            if bits > MAX_BITS:
                raise TemplateBudgetError(f"{operator!r} makes an integer of {bits} bits, more than {MAX_BITS}")
        return run.given(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.truth(obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        run = current()
        if is_marked(obj) or (is_marked(argument) if isinstance(argument, str) else run.measure(argument)[1]):
            run.looked = True
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        function = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if name == "join":
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        run, values = current(), (*args, *kwargs.values())
        if isinstance(__obj, (Macro, LoopContext, _Dict)) or any(__obj is x for x in (_SafeNamespace, Cycler, Joiner)):
            run.step()
            run.spend(run.measure(values)[0])
            run.looked = run.looked or (isinstance(__obj, LoopContext) and any(map(is_marked, values)))
        else:
            if name in REFUSED_METHODS:
                raise TemplateBudgetError(f"{name!r} is not supported in a chat template")
            is_method = isinstance(owner, (str, bytes, list, tuple, Mapping, int, float))
            marked = run.spend_on(name, (owner, *values) if is_method else values)
            if marked and name in SHALLOW and isinstance(owner, Mapping):
                marked = any(map(is_marked, values))
            run.looked = run.looked or marked
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else run.given(result)


def _largest(value: Any) -> int:
    """A width that `%*d` may take from its arguments."""
    values = value if isinstance(value, tuple) else (value,)
    return max((abs(item) for item in values if isinstance(item, int)), default=0)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for, before and after."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        run = current()
        if name == "join" and len(args) > first and isinstance(args[first], Iterator):
            args = (*args[:first], list(args[first]), *args[first + 1 :])
        values = (*args[first:], *kwargs.values())
        if name == "sum" and not all(isinstance(value, (int, float, str)) for value in values[1:]):
            raise TemplateBudgetError("'sum' may only start from a number")
        if run.spend_on(name, values) and not _keeps(name, values):
            run.looked = True
        return run.given(function(*args, **kwargs))

    return counted


def _keeps(name: str, values: tuple[Any, ...]) -> bool:
    """Whether a filter's result holds marked strings as they are, and depends on nothing else of them."""
    if name in ("default", "d"):
        return len(values) < 3
    if name == "string":
        return isinstance(values[0], str)
    if name == "join":
        return isinstance(values[0], (list, tuple)) and all(isinstance(value, str) for value in values[0])
    return name in SHALLOW and not any(map(is_marked, values))


def _counted_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test that is charged for."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def counted(*args: Any) -> Any:
        run = current()
        run.step()
        if name not in TYPE_TESTS:
            run.taste(args[first:])
        return function(*args)

    return counted


def _printed(value: Any) -> Any:
    """Whatever is printed passes here."""
    run = current()
    run.step()
    return run.printed(value)


class _Generation(Extension):
    """`{% generation %}`, which transformers uses to find the assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace cannot hold names that begin with an underscore")
        Namespace.__setitem__(self, name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

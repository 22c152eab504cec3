"""Runs a chat template, which is a program from a checkpoint, within bounds of work and memory.

Jinja's own sandbox keeps a template from files and code. It does not keep it from loops of 10^12 steps or strings of
10^12 characters. Here every loop, call, filter, test and operator is counted before it runs: no clock, so that a
template that is refused once is refused always. The same hooks see whether the template looks at the text that it lays
out: a text that is marked and only ever printed or joined has no influence on anything else.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

# Published templates have up to 30,000 characters and take some thousand steps.
MAX_SOURCE, MAX_STEPS, MAX_BYTES = 1 << 16, 1 << 20, 1 << 26
MAX_NUMBER = 100_000  # of an argument, as in Jinja's own `range`
MAX_BITS = 1 << 16  # of an integer
ITEM = 64  # bytes charged for a value, beside its characters: a walk over values takes time too
WEIGHT = 16  # bytes charged for a character that a function may turn into several, or into objects

MARK = "\ue000"  # begins whatever stands for a text while a layout is rendered; from Unicode's private use area

# Filters whose work or output no bound holds, or that give something else at every call.
REFUSED_FILTERS = frozenset({"random", "urlize", "xmlattr", "striptags", "wordwrap", "pprint"})
REFUSED_METHODS = frozenset({"translate", "maketrans"})
# Functions that read each character once and write it at most once.
PLAIN = frozenset(
    "attr capitalize count d default endswith find first get index items keys last length lower lstrip map reject "
    "rejectattr removeprefix removesuffix rstrip safe select selectattr startswith string strip title trim upper "
    "values".split()
)
SCALED = frozenset({"batch", "expandtabs", "indent", "slice", "tojson", "truncate"})  # output: a product of arguments
FORMATS = frozenset({"format", "format_map"})
# Of these the result hangs on a value's type, or not on the strings within a list or dict.
TYPE_TESTS = frozenset(
    "boolean callable defined false filter float integer iterable mapping none number sequence string test true "
    "undefined".split()
)
SHALLOW = frozenset({"count", "first", "get", "items", "keys", "last", "length", "list", "reverse", "values"})


class TemplateBudgetError(Exception):
    """A template does more than any chat template has to. Not a `ValueError`, which filters catch."""


class Run:
    """What one rendering may still do, and what it has been seen to do.

    Attributes:
        looked: Whether something else than printing was done with a marked text.
        timed: Whether the clock was read.
    """

    def __init__(self) -> None:
        self.steps, self.bytes = MAX_STEPS, MAX_BYTES
        self.looked = self.timed = False

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

    def taste(self, *values: Any) -> None:
        """Charges for values that are read whole, and notes if one is marked."""
        total, marked = self.measure(values)
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
            size = _format_cost(values[0], size + numbers)
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


def _format_cost(template: Any, arguments: int) -> int:
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


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates (`_compile_jinja_template`), counting."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_printed,
            cache_size=0,
        )
        filters = {name: filter_ for name, filter_ in self.filters.items() if name not in REFUSED_FILTERS}
        self.filters = {name: _counted(name, filter_) for name, filter_ in {**filters, "tojson": _tojson}.items()}
        self.tests = {name: _counted_test(name, test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _SafeNamespace,
        }

    def template(self, source: str) -> jinja2.Template:
        """Compiles, within `bounded`. Raises whatever Jinja raises, and `TemplateBudgetError`."""
        if len(source) > MAX_SOURCE:
            raise TemplateBudgetError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
        tree = _Counting().visit(self.parse(source))
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    # Called by the compiled template; `_Counting` puts in those that Jinja does not call by itself.

    def step(self, steps: int, data: int) -> bool:
        """Of a loop's or macro's body: its size, and the characters that it prints as they stand."""
        run = _run.get()
        run.step(steps)
        run.spend(data)
        return True

    def truth(self, value: Any) -> Any:
        """Of a condition, or what a loop goes through."""
        if is_marked(value):
            _run.get().looked = True
        return value

    def compared(self, value: Any, keys_only: bool) -> Any:
        """Of an operand."""
        run = _run.get()
        run.step()
        run.taste(*((*value,) if keys_only and isinstance(value, Mapping) else (value,)))
        return value

    def made(self, value: Any) -> Any:
        """Of a list, tuple or dict as it is written in the template."""
        run = _run.get()
        if isinstance(value, dict):
            run.looked = run.looked or any(map(is_marked, value))
        return run.given(value)

    def joined(self, *values: Any) -> str:
        """`~`."""
        run = _run.get()
        for value in values:
            run.printed(value)
        return "".join(map(str, values))

    def sliced(self, value: Any, *bounds: Any) -> Any:
        """`value[start:stop:step]`."""
        run = _run.get()
        run.looked = run.looked or any(map(is_marked, (value, *bounds)))
        run.given(value)
        return value[slice(*bounds)]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        run = _run.get()
        run.step()
        size, marked = run.measure((left, right))
        run.looked = run.looked or (marked and operator != "+")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    size *= max(times, 1)
        elif operator == "%" and isinstance(left, (str, bytes)):
            size = _format_cost(left if isinstance(left, str) else left.decode("latin1"), size + _largest(right))
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
        run = _run.get()
        if is_marked(obj) or (is_marked(argument) if isinstance(argument, str) else run.measure(argument)[1]):
            run.looked = True
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)
        function = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        if name == "join":
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        run, values = _run.get(), (*args, *kwargs.values())
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
        run = _run.get()
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
        run = _run.get()
        run.step()
        if name not in TYPE_TESTS:
            run.taste(*args[first:])
        return function(*args)

    return counted


def _printed(value: Any) -> Any:
    """Whatever is printed passes here."""
    run = _run.get()
    run.step()
    return run.printed(value)


class _Counting(NodeTransformer):
    """Puts the hooks of `TemplateEnvironment` into a template, and refuses what it has no use for."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        size = _size(node.body)
        self.generic_visit(node)
        node.iter = _hook(node, "truth", node.iter)
        if node.test is not None:
            node.test = nodes.And(_step(node, (4, 0)), _hook(node, "truth", node.test)).set_lineno(node.lineno)
        node.body.insert(0, nodes.ExprStmt(_step(node, size)).set_lineno(node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        size = _size(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(node, size)).set_lineno(node.lineno))
        return node

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def visit_If(self, node: nodes.If | nodes.CondExpr) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.test = _hook(node, "truth", node.test)
        return node

    visit_CondExpr = visit_If  # noqa: N815

    def visit_And(self, node: nodes.And | nodes.Or) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.left = _hook(node, "truth", node.left)
        return node

    visit_Or = visit_And  # noqa: N815

    def visit_Not(self, node: nodes.Not) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.node = _hook(node, "truth", node.node)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _hook(node, "compared", node.expr, nodes.Const(False))
        for operand in node.ops:
            operand.expr = _hook(node, "compared", operand.expr, nodes.Const(operand.op in ("in", "notin")))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _hook(node, "joined", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _hook(node, "made", node)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _hook(node, "made", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _hook(node, "sliced", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))

    def refused(self, node: nodes.Node) -> nodes.Node:
        """Other files, and a switch that rewrites what is printed."""
        raise jinja2.TemplateSyntaxError(f"{type(node).__name__} is not supported in a chat template", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = refused  # noqa: N815
    visit_ScopedEvalContextModifier = visit_EvalContextModifier = refused  # noqa: N815


def _hook(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of `TemplateEnvironment`."""
    call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
    return call.set_lineno(node.lineno, override=False)


def _step(node: nodes.Node, size: tuple[int, int]) -> nodes.Call:
    return _hook(node, "step", *map(nodes.Const, size))


def _size(body: list[nodes.Node]) -> tuple[int, int]:
    """How many nodes run, and how many characters are printed as they stand; bodies that count themselves left out."""
    steps, data, pending = 0, 0, list(body)
    while pending:
        node = pending.pop()
        steps += 1
        data += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        if not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            pending += node.iter_child_nodes()
    return steps, data


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
    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805
        attributes = dict(*args[1:], **kwargs)
        if any(str(name).startswith("_") for name in attributes):
            raise jinja2.exceptions.SecurityError("a namespace cannot hold names that begin with an underscore")
        Namespace.__init__(args[0], attributes)

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


def _strftime_now(format: str) -> str:
    _run.get().timed = True
    return datetime.now().strftime(format)

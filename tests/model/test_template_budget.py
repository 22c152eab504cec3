"""A chat template is a program from a checkpoint: what it may not do, and what it must be able to do."""

import json
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from qwen_batched import TensorProcessor
from qwen_batched.inputs import template_budget
from qwen_batched.inputs.template_budget import MAX_SOURCE, TemplateBudgetError, bounded
from qwen_batched.inputs.template_sandbox import TemplateEnvironment
from qwen_batched.testing import CHAT_TEMPLATE

MAX_SECONDS, MAX_BYTES = 20, 2 << 30
TURNS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Pick up\n"}]}]
FOREVER = "{% for i in range(100000) %}"


def doubling(start: str, step: str, times: int = 60) -> str:
    return start + step * times


BOMBS = {
    "loops": FOREVER + FOREVER + "x{% endfor %}{% endfor %}",
    "filtered loops": FOREVER + "{% for j in range(100000) if false %}x{% endfor %}{% endfor %}",
    "a long body": FOREVER + "{% set x = 1 %}" * 3000 + "{% endfor %}",
    "long data": FOREVER + "x" * 50000 + "{% endfor %}",
    "calls": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loops": "{% for a in [[1]] recursive %}{{ loop([[1], [1], [1]]) }}{% endfor %}",
    "a product": "{{ 'a' * 10000000000 }}",
    "a list's product": "{{ ([1] * 100000) * 100000 }}",
    "a power": "{{ 10 ** 10000000 }}",
    "powers": "{{ (10 ** 10000) ** 10000 }}",
    "center": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "a width": "{{ '%9999999999d' % 1 }}",
    "a precision": "{{ '%.9999999999f' % 1 }}",
    "a given width": "{{ '%*d' % (9999999999, 1) }}",
    "a format's width": "{{ '{:>9999999999}'.format('x') }}",
    "a format's given width": "{{ '{:>{}}'.format('x', '9999999999') }}",
    "a format of a dict": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "the format filter": "{{ '%9999999999d' | format(1) }}",
    "joining": doubling("{% set x = 'a' %}", "{% set x = x ~ x %}"),
    "adding": doubling("{% set x = 'a' %}", "{% set x = x + x %}"),
    "nesting": doubling("{% set x = ['a'] %}", "{% set x = [x, x] %}") + "{{ x }}",
    "hashing": doubling("{% set x = ('a',) %}", "{% set x = (x, x) %}") + "{{ {x: 1} }}",
    "comparing": doubling("{% set x = ['a'] %}{% set y = ['a'] %}", "{% set x = [x, x] %}{% set y = [y, y] %}")
    + "{{ x == y }}",
    "blocks of text": doubling("{% set x = 'a' %}", "{% set x %}{{ x }}{{ x }}{% endset %}"),
    "namespaces": doubling("{% set n = namespace(a=1) %}", "{% set n = namespace(a=n, b=n) %}") + "{{ n }}",
    "a dict": doubling("{% set x = {} %}", "{% set x = dict(a=x, b=x) %}") + "{{ x }}",
    "the join filter": "{{ range(100000) | join('x' * 100000) }}",
    "the join method": "{{ ('x' * 100000).join(range(100000) | map('string')) }}",
    "replacing": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replacing nothing": "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
    "replacing by name": "{{ ('a' * 1000000) | replace(new='b' * 1000000, old='a') }}",
    "indenting": "{{ ('\\n' * 1000000) | indent(100000) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(100000) }}",
    "rounding": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "json": "{{ dict.fromkeys(range(100000)) | tojson(indent=100000) }}",
    "slices": "{% set s = 'a' * 1000000 %}" + FOREVER + "{% set y = s[1:] %}{% endfor %}",
    "searching": "{% set s = 'a' * 1000000 %}" + FOREVER + "{% if 'b' in s %}{% endif %}{% endfor %}",
    "printing": "{% set s = 'a' * 1000000 %}" + FOREVER + "{{ s }}{% endfor %}",
    "filters": "{% set s = 'a' * 1000000 %}" + FOREVER + "{{ s | upper | length }}{% endfor %}",
    "tests": "{% set s = 'a' * 1000000 %}" + FOREVER + "{% if s is lower %}{% endif %}{% endfor %}",
    "lists": FOREVER + "{% set x = range(100000) | list %}{% endfor %}",
    "lazy filters": FOREVER + "{% set x = range(100000) | select('odd') | list %}{% endfor %}",
    "sums": FOREVER + "{% set x = range(100000) | sum %}{% endfor %}",
    "sums of lists": "{{ [[1]] | sum(start=[]) }}",
    "cyclers": "{% set c = cycler('a' * 1000000) %}" + FOREVER + "{{ c.next() }}{% endfor %}",
    "translating": "{{ 'x'.translate({120: 'y' * 100000}) }}",
    "splitting": "{{ ('a ' * 10000000).split() | length }}",
    "constants": "{{ 'x' | center(100000) | replace('x', 'y' * 100000) | replace(' ', 'z' * 100000) }}",
}


# The longest to be refused; all others end the same way with a sixteenth of the budget, sooner.
LONGEST = "calls"


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == LONGEST)) for x in BOMBS])
def test_a_template_that_takes_too_much_is_refused_at_loading(name, checkpoint_copy, monkeypatch):
    if name != LONGEST:
        monkeypatch.setattr(template_budget, "MAX_STEPS", template_budget.MAX_STEPS // 16)
        monkeypatch.setattr(template_budget, "MAX_BYTES", template_budget.MAX_BYTES // 16)
    (checkpoint_copy / "chat_template.jinja").write_text(BOMBS[name], encoding="utf-8")
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in ("blocks", "recursive loops"):  # Python's own bound on recursion comes first, and loading goes on
        with pytest.raises(ValueError, match="chat template fails: RecursionError"):
            TensorProcessor.from_pretrained(checkpoint_copy)(None, ["a"])
    else:
        with pytest.raises(ValueError, match="chat template is refused") as refusal:
            TensorProcessor.from_pretrained(checkpoint_copy)
        assert str(checkpoint_copy) in str(refusal.value) and len(str(refusal.value)) < 1000
    assert time.monotonic() - started < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_BYTES


@pytest.mark.parametrize("source", ["x" * (MAX_SOURCE + 1), "{{ a }}" * 10**6], ids=["data", "code"])
def test_a_template_of_any_length_is_refused_before_it_is_read(checkpoint_copy, source):
    (checkpoint_copy / "chat_template.jinja").write_text(source, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"more than {MAX_SOURCE}|at most \d+ bytes, got {len(source)}"):
        TensorProcessor.from_pretrained(checkpoint_copy)
    assert time.monotonic() - started < MAX_SECONDS


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'config.json' %}",
        "{% import 'config.json' as x %}",
        "{% from 'config.json' import x %}",
        "{% extends 'config.json' %}",
        "{% autoescape true %}{{ 1 }}{% endautoescape %}",
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum() }}",
        "{{ [1, 2] | random }}",
        "{{ namespace(__class__=1) }}",
        "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
        "{{ " + "not " * 10000 + "1 }}",
        "{{ x" + " | upper" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    ],
)
def test_what_no_chat_template_needs_is_refused_where_it_is_used(checkpoint_copy, source):
    (checkpoint_copy / "chat_template.jinja").write_text(source, encoding="utf-8")
    processor = TensorProcessor.from_pretrained(checkpoint_copy)
    with pytest.raises(ValueError, match="template"):
        processor(None, ["a"])
    assert processor(None, ["a"], template="plain")


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith("chat_template"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


# --- the same as transformers ---

# What published templates are made of.
PARTS = [
    "{% for message in messages %}{{ message.role }}: {{ message['content'][-1]['text'] | trim }}\n{% endfor %}",
    "{%- for message in messages -%}\n  {{- message.role -}}\n{%- endfor -%}",
    "{% set n = namespace(count=0) %}{% for m in messages %}{% set n.count = n.count + 1 %}{% endfor %}{{ n.count }}",
    "{% macro show(x, upper=false) %}{{ x | upper if upper else x }}{% endmacro %}{{ show('a', upper=true) }}",
    "{% if messages[0]['role'] == 'system' %}a{% elif messages | length > 1 %}b{% else %}c{% endif %}",
    "{{ messages | tojson }}{{ {'é': [1, 2.5, none, true]} | tojson(indent=2) }}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ loop.index0 }}{{ loop.last }}{% endfor %}",
    "{% for x in [1, 2, 3] %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for x in [1, 2, 3] if x is odd %}{{ x }}{{ ', ' if not loop.last }}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'b': 2, 'a': 1} | dictsort }}",
    "{{ [3, 1, 2] | sort | join('-') }}",
    "{{ ['a', 'b'] | map('upper') | list }}{{ [1, 2] | sum }}{{ [1, none] | select | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | map(attribute='role') | join }}",
    "{{ 'a b c'.split(' ')[-1] }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}{{ (1, 2)[0] }}{{ messages[-1:] | length }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 7 / 2 }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ '%s-%d' % ('a', 1) }}{{ -3 | abs }}",
    "{{ 'a' ~ 1 ~ none ~ [1] }}{{ '{} {x}'.format(1, x=2) }}{{ ' x '.strip() }}{{ 'x' in ['x'] }}",
    "{{ 'y' not in 'xyz' }}{{ 'b' > 'a' < 'c' }}",
    "{{ missing is defined }}{{ missing }}{{ missing | default('d') }}{{ none is none }}{{ 1 if missing }}",
    "{% generation %}{% set inner = 1 %}generated{% endgeneration %}{{ inner }}",
    "{% set x %}block{% endset %}{{ x | title }}{% filter upper %}filtered{% endfilter %}",
    "{% with y = 2 %}{{ y }}{% endwith %}",
    "{% call(x) show2() %}{{ x }}{% endcall %}{% macro show2() %}{{ caller(1) }}{% endmacro %}",
    "{% macro show3() %}[{{ caller(1) }}]{% endmacro %}{% call(x) show3() %}{{ x }}{% endcall %}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}{{ j() }}",
    "{{ raise_exception('no') if false else 'yes' }}{{ range(3) | list }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}",
    "{{ 'text' | replace('t', 'T') | indent(2) | center(20) }}{{ 3.14159 | round(2) }}{{ '3' | int + 1 }}",
    "{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents }}{% if tools %}t{% endif %}",
    "{# a comment #}\n  {% if true %}\n  kept\n  {% endif %}\n{% raw %}{{ raw }}{% endraw %}\n",
    "{{ messages[0].content | first }}{{ messages[0].content[1].text | length }}{{ 'é' | upper }}{{ '<' | e }}",
    "{{ [1, 2, 3] | batch(2) | list }}{{ [1, 1] | unique | list }}{{ ['a'] | reverse | list }}",
    "{{ [[1, 2]] | first | last }}",
    "{% set a, b = 1, 2 %}{{ b }}{{ a and b }}{{ 0 or 'x' }}{{ not a }}{{ loop is defined }}{{ messages is iterable }}",
]


def ours(source, **variables):
    with bounded():
        return TemplateEnvironment().template(source).render(messages=TURNS, tools=None, documents=None, **variables)


@given(parts=st.lists(st.sampled_from([*PARTS, CHAT_TEMPLATE]), min_size=1, max_size=4), prompt=st.booleans())
@settings(max_examples=40, deadline=None)
def test_templates_are_rendered_as_by_transformers(parts, prompt):
    source = "\n".join(parts)
    variables = {"add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
    try:
        (expected,), _ = render_jinja_template([TURNS], chat_template=source, **variables)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(source, **variables)
    else:
        assert ours(source, **variables) == expected


def test_a_budget_is_for_one_rendering_and_says_what_was_too_much():
    with bounded() as first, pytest.raises(TemplateBudgetError, match="steps"):
        first.step(10**9)
    with bounded() as second:
        second.step()
    assert second.steps > 0

"""Chat templates that look at their text, other layouts, system texts and named templates (trap 42)."""

import copy
import json
import os
import pickle
import signal
import threading
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_batched import TensorProcessor
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.inputs.chat_template import ChatTemplate
from qwen_batched.inputs.template_sandbox import TemplateEnvironment
from qwen_batched.testing import ADDED_TOKENS, CHAT_TEMPLATE

SETTINGS = settings(max_examples=20, deadline=None)
IMAGE = FAMILY.prompt.image
TEXT = "{{ content['text'] }}"
# What a template may do with its text T. Most of it is looking: ids differ from those of a layout filled in.
LOOKING = [
    "{{ T | trim }}",
    "{{ T.strip() }}",
    "{{ T[1:] }}",
    "{{ T[::-1] }}",
    "{{ T | upper }}",
    "{{ T.lower() }}",
    "{{ T | title }}",
    "{{ T | replace('a', 'bb') }}",
    "{{ T | truncate(10) }}",
    "{{ T | length }}: {{ T }}",
    "{{ T.split() | join(' ') }}",
    "{{ T | wordcount }} {{ T }}",
    "{{ T if T | length > 12 else 'short: ' + T }}",
    "{% if T %}{{ T }}{% else %}nothing{% endif %}",
    "{% if not T %}nothing{% endif %}{{ T }}",
    "{{ T or 'nothing' }}",
    "{{ T and 'something' }}{{ T }}",
    "{% if T == 'a' %}one {% endif %}{{ T }}",
    "{% if 'a' in T %}with a {% endif %}{{ T }}",
    "{% if T in 'abc' %}few {% endif %}{{ T }}",
    "{% if T is lower %}small {% endif %}{{ T }}",
    "{% for word in T.split() %}{{ loop.index }}.{{ word }} {% endfor %}",
    "{% for letter in T %}{{ letter }}-{% endfor %}",
    "{% for x in [T, 'a'] %}{{ loop.changed(x) }}{% endfor %}{{ T }}",
    "{% set x %} {{ T }} {% endset %}{{ x | trim }}",
    "{% macro m(x) %} {{ x }} {% endmacro %}{{ m(T).strip() }}",
    "{% filter trim %} {{ T }} {% endfilter %}",
    "{% set n = namespace(x=T) %}{{ n.x | length }}{{ n.x }}",
    "{{ [T] }}",
    "{{ {'x': T} }}",
    "{{ {'a': 1}[T] | default('none') }} {{ T }}",
    "{{ content | tojson }}",
    "{{ '%s!' % T }}",
    "{{ '{}!'.format(T) }}",
    "{{ 'abcabc'.count(T) }} {{ T }}",
    "{{ (T ~ '') | trim }}",
    "{{ T + ('!' | safe) }}",
    "{{ ('<b>' | safe) + T }}",
    "{{ T is filter }}{{ T is test }}{{ T }}",
    "{{ [T, 'b'] | sort | join(' ') }}",
    "{{ T > 'm' }} {{ T }}",
    "{{ messages | string | length }} {{ T }}",
    "{{ '-'.join([T, 'x']) }}",
]
# And what is no looking.
PRINTING = [
    "{{ T }}",
    "{{ T ~ '!' }}",
    "{{ '!' + T }}",
    "{{ [T, 'x'] | join(' ') }}",
    "{% set x = T %}{{ x }}",
    "{% set x %}[{{ T }}]{% endset %}{{ x }}",
    "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(T) }}",
    "{% set n = namespace(x='') %}{% set n.x = T %}{{ n.x }}",
    "{{ T | default('none') }}",
    "{% if T is string %}{{ T }}{% endif %}",
    "{{ content.get('text') }}",
    "{{ content | length }}{{ T }}",
    "{% generation %}{{ T }}{% endgeneration %}",
    "{% for x in [T] recursive %}{{ x }}{% endfor %}",
]
texts = st.one_of(
    st.text(max_size=30),
    st.text(alphabet=" \n\ta<|>b.Z1é{}%'", max_size=20),
    st.sampled_from(
        ["a", "abc", "  pick up the red cube \n", "Pick UP", "\u3000a\u3000", "{{ 1 }}", "\ue000text\ue001"]
    ),
)
hostile = st.lists(
    st.one_of(
        st.sampled_from([*ADDED_TOKENS, "<|IM_END|>", "<|im_ end|>", "im_end|>", "<|", "|>", "<", "&lt;|im_end|>"]),
        st.text(max_size=4),
    ),
    max_size=6,
).map("".join)


def template_with(expression: str) -> str:
    changed = CHAT_TEMPLATE.replace(TEXT, expression.replace("T", "content['text']"))
    assert changed != CHAT_TEMPLATE or expression == "{{ T }}"
    return changed


@pytest.fixture
def prompts(model):
    """Of its own: tests give it other templates."""
    return copy.deepcopy(model.processor.prompts)


def conversation(text, cameras=0, system=None):
    turns = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*turns, {"role": "user", "content": [{"type": "image"}] * cameras + [{"type": "text", "text": text}]}]


def their_ids(prompts, text, cameras=0, system=None):
    rendered = prompts.tokenizer.apply_chat_template(
        conversation(text, cameras, system),
        chat_template=prompts.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    return prompts.tokenizer(rendered)["input_ids"]


@pytest.fixture(scope="module")
def control_ids(reference):
    return set(reference.tokenizer.get_added_vocab().values())


@pytest.mark.parametrize("expression", LOOKING)
def test_trap42_a_template_that_looks_at_its_text_gives_transformers_ids(model, expression, control_ids):
    prompts = copy.deepcopy(model.processor.prompts)
    prompts.chat_template = template_with(expression)

    @given(text=texts, cameras=st.integers(0, 2))
    @example(text="", cameras=1)
    @example(text=" a ", cameras=0)
    @settings(max_examples=10, deadline=None)
    def check(text, cameras):
        expected = their_ids(prompts, text, cameras)
        if sum(index in control_ids for index in expected) != sum(
            index in control_ids for index in their_ids(prompts, "a", cameras)
        ):
            return  # transformers reads a control token in the text, or the template has another for it
        try:
            ids = prompts.encode(text, "chat", cameras)
        except ValueError as error:
            assert "<" in text, str(error)  # may be what a control token begins with
        else:
            assert ids == expected

    check()
    assert prompts.chat.render(0, "\ue000text\ue001").looked


@pytest.mark.parametrize("expression", PRINTING)
def test_a_template_that_only_prints_its_text_is_rendered_once(model, expression, monkeypatch):
    prompts = copy.deepcopy(model.processor.prompts)
    prompts.chat_template = template_with(expression)
    for text in ("a", " a \n", "", "Pick up\n\nthe block", "b" * 40):
        assert prompts.encode(text, "chat", 1) == their_ids(prompts, text, 1)
    monkeypatch.setattr(ChatTemplate, "_render", lambda *_: pytest.fail("rendered again"))
    assert prompts.encode("another text", "chat", 1)


@pytest.mark.parametrize("expression", [*LOOKING[::3], "{{ T | replace('&lt;', '<') }}", "{{ T | replace(' ', '') }}"])
def test_no_text_becomes_a_control_token_in_a_template_that_looks(model, expression, control_ids):
    prompts = copy.deepcopy(model.processor.prompts)
    prompts.chat_template = template_with(expression)
    expected = [index for index in prompts.encode("b", "chat", 1) if index in control_ids]

    @given(text=hostile)
    @example(text="<|im_end|>")
    @example(text="a <|im_EnD|>")
    @settings(max_examples=10, deadline=None)
    def check(text):
        try:
            ids = prompts.encode(text, "chat", 1)
        except ValueError:
            return
        assert [index for index in ids if index in control_ids] == expected

    check()


def test_control_tokens_in_a_text_are_as_trimmed_as_other_text(prompts, reference):
    prompts.chat_template = template_with("{{ T | trim }}")
    ids = prompts.encode("  <|im_end|> b ", "chat", 0)
    assert reference.tokenizer.decode(ids) == reference.tokenizer.decode(their_ids(prompts, "<|im_end|> b"))
    assert len(ids) > len(their_ids(prompts, "<|im_end|> b"))


@pytest.mark.parametrize(
    "expression",
    [
        "{{ T.split('<|im_end|>') | first }}",
        "{{ 'end' if '<|im_end|>' in T else T }}",
        "{{ T | e }}",
        "{% if T | length > 9 %}<|im_start|>{% endif %}{{ T }}",
    ],
)
def test_a_template_that_looks_for_control_tokens_in_a_text_is_refused_for_such_a_text(prompts, expression):
    prompts.chat_template = template_with(expression)
    assert prompts.encode("a", "chat", 0) == their_ids(prompts, "a")
    with pytest.raises(ValueError, match="chat template"):
        prompts.encode("stop <|im_end|> here", "chat", 0)


def test_a_template_that_fails_is_a_value_error_that_says_why(prompts):
    prompts.chat_template = template_with("{{ raise_exception('no such text') if T | length > 12 else T }}")
    with pytest.raises(ValueError, match="no such text"):
        prompts.encode("a text that is too long", "chat", 0)
    prompts.chat_template = "{% if %}"
    with pytest.raises(ValueError, match="chat template fails"):
        prompts.encode("a", "chat", 0)


@pytest.mark.parametrize(
    "system", ["", "Be brief.", " two\nlines ", "stop <|im_end|> now", "\ue000text\ue001", "{text}"]
)
@pytest.mark.parametrize("expression", ["{{ T }}", "{{ T | trim }}"])
def test_a_system_text_is_that_of_transformers_conversation(prompts, reference, control_ids, system, expression):
    prompts.chat_template = template_with(expression)
    for cameras in (0, 2):
        ids, theirs = prompts.encode("a b", "chat", cameras, system), their_ids(prompts, "a b", cameras, system)
        if "<|im_end|>" in system:
            assert reference.tokenizer.decode(ids) == reference.tokenizer.decode(theirs)
            assert sum(index in control_ids for index in ids) == sum(index in control_ids for index in theirs) - 1
        else:
            assert ids == theirs
        assert ids != prompts.encode("a b", "chat", cameras)


def test_a_system_text_reaches_every_entrance(model):
    ids = model.processor(None, ["a"], system="Be brief.")["input_ids"]
    assert ids.tolist() == [their_ids(model.processor.prompts, "a", system="Be brief.")]
    if model.device.type == "cpu":
        assert model(None, ["a"], system="Be brief.").input_ids.tolist() == ids.tolist()
        out = model.generate(None, ["a"], max_new_tokens=2, system="Be brief.")
        assert len(out.texts) == 1


@pytest.mark.parametrize(
    ("system", "template", "error"),
    [("a", "plain", ValueError), (b"a", "chat", TypeError), ("\ud800", "chat", ValueError)],
)
def test_a_system_text_that_has_no_place_is_refused(model, system, template, error):
    with pytest.raises(error, match="system"):
        model.processor(None, ["a"], system=system, template=template)
    batch = model.processor(None, ["a"])
    with pytest.raises(ValueError, match="system"):
        model(**batch, system="a")


# --- layouts with a slot for each camera ---


def frames(batch, cameras):
    return torch.zeros(batch, cameras, 3, 28, 28, dtype=torch.uint8)


@given(text=texts, cameras=st.integers(0, 4), literal=st.booleans(), data=st.data())
@SETTINGS
def test_each_camera_has_its_slot_and_an_absent_ones_is_empty(model, reference, text, cameras, literal, data):
    slot = IMAGE if literal else "{image}"
    template = "".join(f" {camera}:{slot}" for camera in range(cameras)) + " {text}."
    mask = data.draw(st.lists(st.booleans(), min_size=cameras, max_size=cameras))
    layout = "".join(f" {camera}:{IMAGE if here else ''}" for camera, here in enumerate(mask))
    images = frames(1, cameras) if cameras else None
    batch = model.processor(images, [text], torch.tensor([mask]) if cameras else None, template=template)
    if not any(token in text for token in ADDED_TOKENS):
        assert batch["input_ids"].tolist() == [reference.tokenizer(f"{layout} {text}.")["input_ids"]]
    seen = batch["camera_ids"][batch["camera_ids"] >= 0].tolist()
    assert seen == [camera for camera, here in enumerate(mask) if here]


@pytest.mark.parametrize("template", ["a {image} {text}", "{image}{image}{image}{text}", f"{IMAGE} {{text}}", "{text}"])
def test_a_wrong_number_of_slots_is_refused_with_both_numbers(model, template):
    slots = template.count("{image}") + template.count(IMAGE)
    with pytest.raises(ValueError, match=rf"2 cameras.*\({slots} times"):
        model.processor(frames(1, 2), ["a"], template=template)


@pytest.mark.parametrize("template", ["{images}{image}{text}", "{image}{image}", "{image}{text}{image}{text}"])
def test_a_layout_that_is_no_layout_is_refused(model, template):
    with pytest.raises(ValueError, match="template"):
        model.processor(frames(1, 2), ["a"], template=template)


def test_too_many_slots_for_a_mask_on_the_device_are_refused(model, monkeypatch):
    processor = model.processor
    template = "{image}" * 7 + "{text}"
    monkeypatch.setattr(torch.Tensor, "device", torch.device("meta"), raising=False)
    with pytest.raises(ValueError, match="2\\^7 layouts"):
        processor._rows.lay_out_on_device(call_of(processor, template, 7), torch.ones(1, 7, dtype=torch.bool))


def call_of(processor, template, cameras):
    from qwen_batched.inputs.prompt_rows import TextCall

    grids, text = ((1, 1),) * cameras, processor.config.text
    return TextCall(processor.prompts, text, ["a"], None, template, None, grids, 0, torch.device("cpu"))


# --- one string, named templates, attributes ---


def test_one_string_stands_for_a_batch_of_one(model):
    processor = model.processor
    for images in (None, frames(1, 2)):
        whole = processor(images, ["pick up"], targets=["go"])
        one = processor(images, "pick up", targets="go")
        assert torch.equal(whole["input_ids"], one["input_ids"])
        assert torch.equal(whole["labels"], one["labels"])
    with pytest.raises(ValueError, match="1 texts for 2 samples"):
        processor(frames(2, 2), "pick up")
    with pytest.raises(ValueError, match="1 answers for 2 texts"):
        processor(None, ["a", "b"], targets="go")


def named(folder: Path, templates: object) -> TensorProcessor:
    (folder / "chat_template.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}), encoding="utf-8")
    return TensorProcessor.from_pretrained(folder)


def test_named_templates_without_a_default_are_refused_where_one_is_needed(checkpoint_copy):
    processor = named(checkpoint_copy, [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}])
    assert processor(None, ["a"], template="plain")
    with pytest.raises(ValueError, match=r"'default'.*rag, tool_use"):
        processor(None, ["a"])


@pytest.fixture
def checkpoint_copy(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_tokenizer_without_pad_and_end_token_pads_and_refuses_targets(checkpoint_copy):
    path = checkpoint_copy / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"pad_token": None, "eos_token": None}
    path.write_text(json.dumps(config), encoding="utf-8")
    processor = TensorProcessor.from_pretrained(checkpoint_copy)
    batch = processor(None, ["a", "a b c d"])
    assert (~batch["attention_mask"]).any()
    assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < processor.config.text.vocab_size
    with pytest.raises(ValueError, match="end token"):
        processor(None, ["a"], targets=["b"], template="plain")


def test_an_assigned_chat_template_takes_effect(prompts, model):
    processor = copy.deepcopy(model.processor)
    before = processor(None, ["a"])["input_ids"]
    processor.prompts.chat_template = CHAT_TEMPLATE.replace("helpful", "useless")
    after = processor(None, ["a"])["input_ids"]
    assert after.tolist() == [their_ids(processor.prompts, "a")] != before.tolist()
    for attribute in ("tokenizer", "image_token_id"):
        with pytest.raises(AttributeError):
            setattr(prompts, attribute, None)


def test_a_template_that_prints_the_time_is_not_taken_from_the_cache(model, monkeypatch):
    processor = copy.deepcopy(model.processor)
    processor.prompts.chat_template = "{{ strftime_now('%Y') }}" + CHAT_TEMPLATE
    now = {"year": "2025"}
    clock = type("Clock", (), {"now": staticmethod(lambda: type("Now", (), {"strftime": lambda _, f: now["year"]})())})
    monkeypatch.setattr("qwen_batched.inputs.template_sandbox.datetime", clock)
    decode = lambda: processor.prompts.tokenizer.decode(processor(None, ["a"])["input_ids"][0])  # noqa: E731
    assert decode().startswith("2025")
    now["year"] = "2026"
    assert decode().startswith("2026")


def test_a_copied_processor_renders_as_before(model):
    expected = model.processor(None, ["a <|im_end|>"])["input_ids"]
    for other in (copy.deepcopy(model.processor), pickle.loads(pickle.dumps(model.processor))):
        assert torch.equal(other(None, ["a <|im_end|>"])["input_ids"], expected)


# --- answers ---


@pytest.mark.parametrize("answer", ["go", "\n\ngo", "a b\n"])
def test_a_template_that_trims_answers_takes_those_that_it_leaves_alone(prompts, answer):
    prompts.chat_template = template_with("{{ T | trim }}")
    if answer == answer.strip():
        ids, count = prompts.encode_with_answer(" a ", answer, "chat", 0)
        turns = [*conversation(" a "), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        rendered = prompts.tokenizer.apply_chat_template(turns, chat_template=prompts.chat_template, tokenize=False)
        assert ids == prompts.tokenizer(rendered.removesuffix("\n"))["input_ids"]
        assert prompts.decode(ids[-count:]) == answer
    else:
        with pytest.raises(ValueError, match="answer"):
            prompts.encode_with_answer(" a ", answer, "chat", 0)


def test_texts_that_normalise_differently_are_texts_of_their_own(prompts):
    prompts.chat_template = template_with("{{ T | length }} {{ T }}")
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, "é")
        assert prompts.encode(text, "chat", 0) == their_ids(prompts, text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_a_thread_compiles_the_template_does_not_hang(monkeypatch):
    compiling, forked, parent = threading.Event(), threading.Event(), os.getpid()
    compile_template = TemplateEnvironment.template

    def slow(self, source):
        if os.getpid() == parent:
            compiling.set()
            forked.wait(timeout=60)
        return compile_template(self, source)

    monkeypatch.setattr(TemplateEnvironment, "template", slow)
    chat = ChatTemplate("{{ messages[0].content[0].text }}", {})
    thread = threading.Thread(target=chat.render, args=(0, "a"))
    thread.start()
    assert compiling.wait(timeout=60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the process should it wait for the thread
        os._exit(0 if chat.render(0, "b").text == "b" else 1)
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0

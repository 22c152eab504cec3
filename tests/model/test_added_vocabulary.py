"""Tokens that a fine-tuner added are vocabulary; the family's own control tokens are not (trap 37)."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from qwen_batched import QwenBatchedVL, TensorProcessor
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.inputs.prompt import PromptEncoder
from qwen_batched.testing import ADDED_TOKENS, CHAT_TEMPLATE, write_checkpoint

IMAGE = FAMILY.prompt.image
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
NAMES = ["<act_0>", "<act_1>", "<act_12>", "<sep>", "robot", "[X]", "é", "<|im_", "|go|", "A B", "把", "end|>", "<|a|>"]
ACTIONS = [f"<action_{index}>" for index in range(8)]
words = st.sampled_from([*NAMES, " ", "  ", "\n", "a", "b ", "robots", "x.", "e\u0301", "\t", "\u3000", "\x1c", "_"])
texts = st.lists(words, max_size=7).map("".join)
TEMPLATES = [
    *("chat", "plain", "{images} {text} <sep> b", "<act_0> {text}\n<|im_end|> {images} <act_1>"),
    *("  {text} <|im_end|>  {images} ", "a {image} b {text}<|im_start|> robot"),
]


@st.composite
def tokens(draw):
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    flags = {name: {flag: draw(st.booleans()) for flag in FLAGS} for name in chosen}
    return [AddedToken(name, **flags[name], special=draw(st.booleans())) for name in chosen]


@pytest.fixture(scope="module")
def tokenizer_folder(checkpoint, tmp_path_factory):
    """A checkpoint's tokenizer with as many files as there are, and no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


def image_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<|image_pad|>")


def rendered(tokenizer, text, template):
    if template == "chat":
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
    if template == "plain":
        return f"{text} {IMAGE}"
    before, after = template.replace("{images}", IMAGE).replace("{image}", IMAGE).split("{text}")
    return before + text + after


@given(added=tokens(), text=texts, template=st.sampled_from(TEMPLATES), data=st.data())
@settings(max_examples=15, deadline=None)
def test_trap37_added_tokens_are_read_as_by_the_tokenizer(tokenizer_folder, added, text, template, data):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(added)
    encoder = PromptEncoder(tokenizer, CHAT_TEMPLATE, image_id(tokenizer), FAMILY.prompt)
    if any(token in text for token in ADDED_TOKENS):
        return
    expected = tokenizer(rendered(tokenizer, text, template))["input_ids"]
    if sum(map(rendered(tokenizer, text, template).count, ADDED_TOKENS)) == sum(
        index in encoder._vocabulary.control_ids.values() for index in expected
    ):
        assert encoder.encode(text, template, 1) == expected


@given(added=tokens(), answer=texts)
@settings(max_examples=15, deadline=None)
def test_trap37_answers_are_those_of_a_conversation_tokenised_whole(tokenizer_folder, added, answer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(added)
    encoder = PromptEncoder(tokenizer, CHAT_TEMPLATE, image_id(tokenizer), FAMILY.prompt)
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "a"), ("assistant", answer))
    ]
    whole = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False).removesuffix("\n")
    if any(token in answer for token in ADDED_TOKENS):
        return
    ids, count = encoder.encode_with_answer("a", answer, "chat", 0)
    assert ids == tokenizer(whole)["input_ids"]
    assert 1 <= count <= len(ids)


@given(text=texts, lstrip=st.booleans(), rstrip=st.booleans(), template=st.sampled_from(TEMPLATES))
@settings(max_examples=10, deadline=None)
def test_trap37_flags_of_control_tokens_count_in_layouts(
    tmp_path_factory, tokenizer_folder, text, lstrip, rstrip, template
):
    folder = tmp_path_factory.mktemp("flags")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        entries = content[key] if isinstance(content[key], list) else content[key].values()
        for entry in entries:
            if entry["content"] in ("<|im_end|>", "<|vision_start|>", "<|im_start|>"):
                entry.update(lstrip=lstrip, rstrip=rstrip)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = PromptEncoder(tokenizer, CHAT_TEMPLATE, image_id(tokenizer), FAMILY.prompt)
    ids = encoder.encode(text, template, 1)
    if not any(token in text for token in ADDED_TOKENS):
        assert ids == tokenizer(rendered(tokenizer, text, template))["input_ids"]
    shutil.rmtree(folder)


# --- no text makes a control token ---


@given(
    added=tokens(),
    text=st.lists(
        st.one_of(st.sampled_from([*ADDED_TOKENS, *NAMES, "<|im_<|im_end|>end|>"]), st.text(max_size=3)), max_size=6
    ),
    template=st.sampled_from(TEMPLATES),
)
@settings(max_examples=15, deadline=None)
def test_trap37_control_tokens_stay_text_beside_added_ones(tokenizer_folder, added, text, template):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    control = set(tokenizer.get_added_vocab().values())
    tokenizer.add_tokens(added)
    encoder = PromptEncoder(tokenizer, CHAT_TEMPLATE, image_id(tokenizer), FAMILY.prompt)
    laid_out = [index for index in encoder.encode("", template, 1) if index in control]
    text = "".join(text)
    assert [index for index in encoder.encode(text, template, 1) if index in control] == laid_out
    ids, _ = encoder.encode_with_answer("a", text, template, 1)
    assert [index for index in ids[:-1] if index in control] == laid_out


def test_the_familys_control_tokens_are_those_of_its_published_tokenizers():
    assert FAMILY.prompt.control_tokens == ADDED_TOKENS
    assert len(ADDED_TOKENS) == 22


def test_a_control_token_that_is_a_single_word_is_refused(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"][2]["single_word"] = True
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    with pytest.raises(ValueError, match="single_word"):
        PromptEncoder(tokenizer, CHAT_TEMPLATE, image_id(tokenizer), FAMILY.prompt)


# --- a checkpoint that has them ---


@pytest.fixture(scope="module")
def with_actions(tmp_path_factory):
    """A checkpoint whose embedding has room for 4 of its 8 action tokens."""
    folder = write_checkpoint(tmp_path_factory.mktemp("actions") / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    fillers = rows - len(tokenizer) - 4
    tokenizer.add_tokens([f"<filler_{index}>" for index in range(max(fillers, 0))])
    tokenizer.add_tokens(ACTIONS)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(ACTIONS[4]) == rows
    return folder


def test_trap37_texts_targets_and_templates_of_a_checkpoint_have_its_tokens(with_actions):
    model = QwenBatchedVL.from_pretrained(with_actions, device="cpu")
    tokenizer = model.processor.prompts.tokenizer
    own = tokenizer.convert_tokens_to_ids(ACTIONS[:4])
    batch = model.processor(None, ["last: <action_1><action_3>"], targets=["<action_0><action_2>"])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    assert [index for index in ids if index in own] == [own[1], own[3], own[0], own[2]]
    assert labels[labels >= 0].tolist() == [own[0], own[2], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    batch = model.processor(None, ["a"], template="<action_1>{text}{images}")
    assert batch["input_ids"][0, 0] == own[1]
    assert model(None, ["<action_1>"]).last_hidden_state.isfinite().all()


def test_a_token_without_an_embedding_is_refused_at_the_call(with_actions):
    model = QwenBatchedVL.from_pretrained(with_actions, device="cpu")
    rows = model.config.text.vocab_size
    good = model(None, ["a <action_3>"]).last_hidden_state
    for call in (
        lambda: model(None, ["a", "<action_4>"]),
        lambda: model(None, ["a"], targets=["<action_5>"]),
        lambda: model(None, ["a"], template="{text}<action_6>"),
        lambda: model.generate(None, ["<action_7>"]),
        lambda: model.processor(None, ["a"], system="<action_4>"),
    ):
        with pytest.raises(ValueError, match=rf"below {rows}.*got {rows}|below {rows}.*<action_"):
            call()
    assert torch.equal(model(None, ["a <action_3>"]).last_hidden_state, good)


def test_an_image_pad_or_end_token_without_an_embedding_is_refused_at_loading(with_actions, tmp_path):
    shutil.copytree(with_actions, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("pad_token", "eos_token"):
        path.write_text(json.dumps(config | {name: ACTIONS[5]}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"must be below the vocab_size 600 of config\.json, got 6"):
            TensorProcessor.from_pretrained(tmp_path)


# --- added_tokens ---


def ids_of(folder, text, **options):
    prompts = TensorProcessor.from_pretrained(folder, **options).prompts
    return prompts, prompts.encode(text, "plain", 0)


def test_added_tokens_restricts_which_are_read(with_actions):
    text = "<action_0> <action_1> <action_2>"
    prompts, everything = ids_of(with_actions, text)
    own = prompts.tokenizer.convert_tokens_to_ids(ACTIONS)
    assert [index for index in everything if index in own] == own[:3]
    for wanted, kept in (
        *(((), []), (["<action_1>"], [own[1]]), (("<action_[02]>",), [own[0], own[2]])),
        *((["<action_*>"], own[:3]), (["<filler_0>", "<action_2>"], [own[2]])),
    ):
        _, ids = ids_of(with_actions, text, added_tokens=wanted)
        assert [index for index in ids if index in own] == kept
        assert prompts.tokenizer.decode(ids) == text
    model = QwenBatchedVL.from_pretrained(with_actions, device="cpu", added_tokens=())
    assert not {*model.processor(None, [text])["input_ids"][0].tolist()} & {*own}


def test_a_layout_still_has_the_tokens_that_texts_may_not_use(with_actions):
    prompts, _ = ids_of(with_actions, "a", added_tokens=())
    own = prompts.tokenizer.convert_tokens_to_ids(ACTIONS[1])
    ids = prompts.encode("<action_1>", "<action_1>{text}", 0)
    assert ids[0] == own and own not in ids[1:]


@pytest.mark.parametrize(
    "wanted", [["<nothing>"], ["<action_*>", "<nothing_*>"], ["<|im_end|>"], ["<tool_call>"], ["<|*|>"]]
)
def test_added_tokens_that_match_nothing_or_name_a_control_token_are_refused(with_actions, wanted):
    with pytest.raises(ValueError, match="added_tokens"):
        TensorProcessor.from_pretrained(with_actions, added_tokens=wanted)


@pytest.mark.parametrize("wanted", ["<action_*>", [1], {"<action_0>": 1}, True])
def test_added_tokens_that_are_no_list_are_refused(with_actions, wanted):
    with pytest.raises(TypeError, match="added_tokens"):
        TensorProcessor.from_pretrained(with_actions, added_tokens=wanted)


# --- refused texts ---


def test_nothing_of_a_refused_text_stays(model):
    cache = model.processor._rows._rows
    model.processor(None, ["a"])
    before, size = len(cache), cache._bytes
    limit = model.processor.config.text.max_position_embeddings
    for index in range(5):
        with pytest.raises(ValueError, match=f"at most {limit}"):
            model.processor(None, [f"{index} " + "word " * limit])
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.processor(None, ["a new text"], max_new_tokens=limit)
    assert (len(cache), cache._bytes) == (before, size)


@pytest.mark.parametrize("text", ["1" * 10**7, "é" * 10**7, "e\u0301 " * 10**7, "word\n" * 10**7])
def test_a_text_of_megabytes_is_refused_without_tokenising_it(model, monkeypatch, text):
    monkeypatch.setattr(type(model.processor.prompts), "encode", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(ValueError, match="at least"):
        model.processor(None, [text])


@given(text=st.one_of(texts, st.text(), st.text(alphabet="각ᄀ\u1161\u11a8e\u0301a \n", max_size=30)))
@settings(max_examples=15, deadline=None)
def test_a_text_has_at_least_the_tokens_that_its_length_says(model, text):
    prompts = model.processor.prompts
    assert prompts.least_tokens(text) <= len(prompts.encode(text, "plain", 0))

"""What a folder says: in transformers' order where it says a thing twice, and only what is implemented."""

import json
import math
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version

from qwen_batched import BatchedDecoder, BatchedVisionTransformer, QwenBatchedVL, TensorProcessor
from qwen_batched.checkpoint.config import MAX_FRAME_PIXELS
from qwen_batched.checkpoint.folder import Checkpoint
from qwen_batched.checkpoint.generation_config import HARMLESS, NEUTRAL, GenerationConfig
from qwen_batched.families import read_config
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.model.geometry import decoder_frequencies, smart_resize
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import assert_equal_to, own_tokens, photos

RELEASE = Version(transformers.__version__).release
FUZZ = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MIN_IMAGE = {"min_pixels": 28 * 28}
FRAMES = photos(2, 2, 56, 84)
TEXTS = ["Pick up the red block.", "Go."]


def load(folder, **options):
    return QwenBatchedVL.from_pretrained(folder, **{"device": "cpu", **options})


def read(path):
    return json.loads(path.read_text())


def change(path, **fields):
    """Sets fields of a JSON file; `...` drops one."""
    content = (read(path) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A copy of the tiny checkpoint."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


# --- one thing said twice: images ---

PIXELS = {"min_pixels": st.sampled_from([784, 3136, 6272]), "max_pixels": st.sampled_from([50176, 100352, 200704])}
EDGES = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}


def any_of(fields):
    """Any of the fields, each also as null or 0."""
    return st.fixed_dictionaries(
        {}, optional={name: values | st.sampled_from([None, 0]) for name, values in fields.items()}
    )


IMAGE_FIELDS = st.builds(
    lambda pixels, size: pixels | ({} if size is ... else {"size": size}),
    any_of(PIXELS),
    st.just(...) | st.none() | st.fixed_dictionaries(EDGES) | any_of(EDGES),
)


def their_pixels(folder):
    """The limits of transformers' image processor, None where it refuses them."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        processor(images=[torch.zeros(3, 56, 84, dtype=torch.uint8)], return_tensors="pt")
    except ValueError:
        return None
    return processor.size["shortest_edge"], processor.size["longest_edge"]


def our_pixels(folder):
    checkpoint = Checkpoint.open(folder)
    try:
        image = checkpoint.image_config(read_config(checkpoint).vision, FAMILY.image)
    except ValueError as error:
        assert str(folder) in str(error)
        return None
    return image.min_pixels, image.max_pixels


@pytest.mark.skipif(RELEASE < (5,), reason="the order is that of transformers 5")
@settings(FUZZ, max_examples=30)
@given(beside=IMAGE_FIELDS, nested=st.none() | st.just(...) | IMAGE_FIELDS)
def test_trap36_pixel_limits_in_two_files_and_two_spellings_are_read_in_transformers_order(folder, beside, nested):
    base = {name: value for name, value in read(folder / "preprocessor_config.json").items() if "pixels" not in name}
    base.pop("size", None)
    (folder / "preprocessor_config.json").write_text(json.dumps(base | beside))
    nested = nested if nested in (None, ...) else base | nested
    content = {"processor_class": "Qwen2_5_VLProcessor"} | ({} if nested is ... else {"image_processor": nested})
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert our_pixels(folder) == their_pixels(folder)


def test_trap36_the_nested_image_processor_alone_is_enough_even_where_it_says_nothing(folder):
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {}}))
    change(folder / "preprocessor_config.json", min_pixels=784, max_pixels=50176)
    assert our_pixels(folder) == (56 * 56, 28 * 28 * 1280)
    (folder / "preprocessor_config.json").unlink()
    assert our_pixels(folder) == (56 * 56, 28 * 28 * 1280)


def test_sizes_in_the_names_of_older_versions_are_read(folder):
    change(
        folder / "preprocessor_config.json",
        min_pixels=...,
        max_pixels=...,
        size={"min_pixels": 784, "max_pixels": 50176},
    )
    assert our_pixels(folder) == (784, 50176)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_refused_image_setting_names_its_file(folder, name):
    wrong = {"min_pixels": "many"}
    change(folder / name, **(wrong if name.startswith("pre") else {"image_processor": wrong}))
    with pytest.raises(ValueError, match="min_pixels") as raised:
        load(folder)
    assert str(folder / name) in str(raised.value)


# --- templates ---

TEMPLATE = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>\
<|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
NAMED = {"default": "json default" + TEMPLATE, "tool_use": "x"}
SOURCES = {  # from the last that is looked at to the first
    "tokenizer_config.json": lambda folder: change(
        folder / "tokenizer_config.json", chat_template="tokenizer" + TEMPLATE
    ),
    "chat_template.json": lambda folder: change(folder / "chat_template.json", chat_template="json" + TEMPLATE),
    "processor_config.json": lambda folder: change(
        folder / "processor_config.json", chat_template="processor" + TEMPLATE
    ),
    "additional_chat_templates": lambda folder: write_additional(folder, default="additional" + TEMPLATE, tool="x"),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").write_text("jinja" + TEMPLATE),
}


def write_additional(folder, **templates):
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    for name, template in templates.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template)


@pytest.fixture
def bare_folder(folder):
    """Without any template."""
    (folder / "chat_template.json").unlink()
    change(folder / "tokenizer_config.json", chat_template=...)
    return folder


@FUZZ
@given(sources=st.sets(st.sampled_from(list(SOURCES)[1:]), min_size=1))
def test_trap36_of_several_templates_the_first_in_order_is_read(checkpoint, tmp_path_factory, sources):
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("templates") / "copy")
    (folder / "chat_template.json").unlink()
    for name in sources:
        SOURCES[name](folder)
    first = [name for name in SOURCES if name in sources][-1]
    begins = {"chat_template.json": "json", "processor_config.json": "processor"}
    begins |= {"additional_chat_templates": "additional", "chat_template.jinja": "jinja"}
    assert Checkpoint.open(folder).chat_template == begins[first] + TEMPLATE


@pytest.mark.skipif(RELEASE < (5,), reason="older versions know no additional_chat_templates")
@pytest.mark.parametrize("sources", [["additional_chat_templates"], ["chat_template.jinja"]])
def test_trap36_template_files_are_read_as_transformers_tokenizer_reads_them(bare_folder, sources):
    for name in ["tokenizer_config.json", *sources]:
        SOURCES[name](bare_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(bare_folder).get_chat_template()
    assert Checkpoint.open(bare_folder).chat_template == theirs


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
@pytest.mark.parametrize("form", [NAMED, [{"name": key, "template": value} for key, value in NAMED.items()]])
def test_of_named_templates_the_default_is_read(bare_folder, name, form):
    change(bare_folder / name, chat_template=form)
    assert Checkpoint.open(bare_folder).chat_template == NAMED["default"]
    assert TensorProcessor.from_pretrained(bare_folder)(None, ["a"])["input_ids"].numel() > 1


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
@pytest.mark.parametrize(
    "form", [7, ["x"], {}, {"tool_use": "x"}, {"default": 3}, [{"name": "default", "template": 3}], [{}]]
)
def test_a_template_of_another_form_is_refused_with_its_file(bare_folder, name, form):
    change(bare_folder / name, chat_template=form)
    with pytest.raises(ValueError, match="chat") as raised:
        load(bare_folder)
    assert str(bare_folder / name) in str(raised.value)


# --- config.json ---


def their_config(raw):
    """What transformers makes of config.json, None where it refuses it."""
    try:
        return transformers.Qwen2_5_VLConfig(**json.loads(json.dumps(raw)))
    except Exception:  # its validators raise what they like
        return None


SECTION = [2, 3, 3]
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["default", "mrope", "yarn"]),
        "rope_type": st.sampled_from(["default", "mrope", "yarn"]),
        "rope_theta": st.sampled_from([1000.0, 5000.0]),
        "factor": st.sampled_from([1.0, 2.5, 4, None]),
        "original_max_position_embeddings": st.sampled_from([64, 300, 1024]),
        "attention_factor": st.sampled_from([None, 0.7, 1.3]),
        "beta_fast": st.sampled_from([None, 8, 32, 50.5]),
        "beta_slow": st.sampled_from([None, 1, 2.5]),
        "mscale": st.sampled_from([None, 0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([None, 0.5, 1.0]),
        "truncate": st.booleans(),
        "mrope_section": st.sampled_from([[16, 24, 24], [8, 28, 28]]),
    },
)
TEXT_FIELDS = st.fixed_dictionaries(
    {"hidden_size": st.just(256), "num_attention_heads": st.just(2), "num_key_value_heads": st.just(1)},
    optional={
        "rope_scaling": ROPES | st.none(),
        "rope_parameters": ROPES | st.none(),
        "rope_theta": st.sampled_from([200.0, 70000.0]),
        "max_position_embeddings": st.sampled_from([1024, 4096]),
        "original_max_position_embeddings": st.sampled_from([128, 512]),
        "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
        "intermediate_size": st.sampled_from([100, 150]),
        "tie_word_embeddings": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "torch_dtype": st.sampled_from(["float32", "float16"]),
    },
)
CONFIGS = st.builds(
    lambda flat, nested, tied: (
        flat
        | {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 256}}
        | ({} if tied is None else {"tie_word_embeddings": tied})
        | ({} if nested is None else {"text_config": nested})
    ),
    TEXT_FIELDS,
    TEXT_FIELDS | st.none(),
    st.booleans() | st.none(),
)


@pytest.mark.skipif(RELEASE < (5,), reason="the order is that of transformers 5")
@settings(FUZZ, max_examples=100)
@given(raw=CONFIGS)
def test_trap36_what_config_json_says_twice_is_read_as_transformers_reads_it(raw):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    theirs = their_config(raw)
    try:
        ours = FAMILY.read_config(raw)
    except ValueError as error:
        assert theirs is None, f"refused alone: {error}"
        return
    if theirs is None:  # it checks the fields at the top as well, where text_config makes them mean nothing
        assert "text_config" in raw, "transformers refuses it"
        return
    text = theirs.text_config
    assert list(ours.text.mrope_section) == text.rope_parameters.get("mrope_section", [16, 24, 24])
    for name in ("max_position_embeddings", "rms_norm_eps", "intermediate_size"):
        assert getattr(ours.text, name) == getattr(text, name)
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == (theirs.dtype and getattr(torch, str(theirs.dtype).removeprefix("torch.")))
    rotary = Qwen2_5_VLRotaryEmbedding(text)
    assert_equal_to(decoder_frequencies(ours.text), rotary.inv_freq, tolerance=1e-6)
    factor = 1.0 if ours.text.yarn is None else ours.text.yarn.attention_factor
    assert math.isclose(factor, rotary.attention_scaling, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": ..., "text_config": {"dtype": "float16"}}, torch.float32),
    ],
)
def test_of_two_names_and_places_of_the_dtype_that_of_transformers_is_read(tmp_path, fields, expected):
    folder = write_checkpoint(tmp_path / "c", config_layout="nested" if "text_config" in fields else "flat")
    if "text_config" in fields:
        fields = {"dtype": ..., "text_config": read(folder / "config.json")["text_config"] | fields["text_config"]}
    change(folder / "config.json", **fields)
    assert load(folder).dtype == expected


@pytest.mark.parametrize("tied", ["yes", 1, 0, [], {}])
def test_a_tie_that_is_no_bool_is_refused(folder, tied):
    change(folder / "config.json", tie_word_embeddings=tied)
    with pytest.raises(ValueError, match="tie_word_embeddings") as raised:
        load(folder)
    assert str(folder / "config.json") in str(raised.value)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "longrope", "llama3", "proportional", "new", 3, None])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_another_rope_type_is_refused_by_name_with_the_file(folder, name, rope_type):
    change(folder / "config.json", rope_scaling={name: rope_type, "factor": 2.0, "mrope_section": SECTION})
    with pytest.raises(ValueError, match=f"rope type must be one of.*got {rope_type!r}") as raised:
        load(folder)
    assert str(folder / "config.json") in str(raised.value)


YARNS = {
    "factor alone": {"factor": 4.0},
    "original length": {"factor": 4.0, "original_max_position_embeddings": 64},
    "factor of null": {"factor": None, "original_max_position_embeddings": 256},
    "attention factor": {"factor": 2.0, "attention_factor": 1.5},
    "mscale": {"factor": 8.0, "original_max_position_embeddings": 100, "mscale": 0.9, "mscale_all_dim": 0.4},
    "betas": {"factor": 3.0, "original_max_position_embeddings": 128, "beta_fast": 12, "beta_slow": 1.5},
    "not truncated": {"factor": 3.0, "original_max_position_embeddings": 128, "truncate": False},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config_layout"), [*((name, "flat") for name in YARNS), ("mscale", "nested")])
def test_yarn_equals_transformers_on_images_and_text(tmp_path, name, config_layout):
    folder = write_checkpoint(tmp_path / "yarn", image=MIN_IMAGE, config_layout=config_layout)
    plain = load(folder)
    rope = {"rope_type": "yarn", "mrope_section": SECTION, **YARNS[name]}
    if config_layout == "flat":
        change(folder / "config.json", rope_scaling=rope)
    else:
        text = read(folder / "config.json")["text_config"]
        change(folder / "config.json", text_config=text | {"rope_parameters": text["rope_parameters"] | rope})
    ours, theirs = load(folder), TransformersReference.from_pretrained(folder)
    text = "Pick up the red block and put it where it belongs. " * 12
    with torch.no_grad():
        out = ours(FRAMES, [text, TEXTS[1]], layers=(1, -1))
        other = plain(FRAMES, [text, TEXTS[1]])
    assert not torch.allclose(out.last_hidden_state, other.last_hidden_state, atol=1e-3)
    for sample, words in enumerate([text, TEXTS[1]]):
        expected = theirs.run(**theirs.processor_inputs(list(FRAMES[sample]), words)).hidden_states
        for mine, layer in zip(out.hidden_states, (1, -1), strict=True):
            assert_equal_to(own_tokens(mine, out.attention_mask, sample), expected[layer][0])


def test_yarn_generates_as_transformers_does(tmp_path):
    folder = write_checkpoint(tmp_path / "yarn", image=MIN_IMAGE, generation={"eos_token_id": None})
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "mrope_section": SECTION}
    change(folder / "config.json", rope_scaling=rope)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    ids = TensorProcessor.from_pretrained(folder)(None, TEXTS[:1])["input_ids"]
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(
        load(folder).generate(None, TEXTS[:1], max_new_tokens=8).token_ids[0], expected[0, ids.shape[1] :]
    )


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"])
def test_trap36_other_files_of_the_tokenizer_mean_what_they_mean_to_transformers(folder, name):
    contents = {"added_tokens.json": {"<act>": 530}, "special_tokens_map.json": {"pad_token": "<|im_end|>"}}
    contents |= {"vocab.json": {"a": 1}, "merges.txt": "a b"}
    content = contents[name]
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    ours, theirs = TensorProcessor.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.prompts.pad_token_id == theirs.pad_token_id
    ids = ours(None, ["pick the red block"], template="{images}{text}")["input_ids"][0]
    assert ids.tolist() == theirs("pick the red block")["input_ids"]


# --- a checkpoint without a head ---


@pytest.fixture(params=["tied", "untied"])
def headless(tmp_path, request):
    """The folder, saved by transformers from its model without a head, and a whole one of the same weights."""
    source = write_checkpoint(tmp_path / "source", image=MIN_IMAGE, tied=request.param == "tied")
    saved = shutil.copytree(source, tmp_path / "saved")
    (saved / "model.safetensors").unlink()
    transformers.Qwen2_5_VLModel.from_pretrained(source).save_pretrained(saved)
    return saved, source


@pytest.mark.slow
def test_a_checkpoint_saved_without_a_head_loads_without_it(headless):
    saved, source = headless
    model, whole = load(saved, lm_head=False), load(source, lm_head=False)
    with torch.no_grad():
        assert torch.equal(model(FRAMES, TEXTS).last_hidden_state, whole(FRAMES, TEXTS).last_hidden_state)
    for part in (BatchedVisionTransformer, BatchedDecoder):
        ours, theirs = (part.from_pretrained(folder, device="cpu").state_dict() for folder in headless)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_saved_without_a_head_has_the_tied_one_and_no_other(headless):
    saved, source = headless
    if read(source / "config.json")["tie_word_embeddings"]:
        with torch.no_grad():
            logits = [load(folder)(FRAMES, TEXTS, logits="last").logits for folder in headless]
        assert torch.equal(*logits)
        return
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(saved)


# --- options of loading ---


@pytest.mark.parametrize("part", [QwenBatchedVL, BatchedVisionTransformer, BatchedDecoder, TensorProcessor])
def test_hub_options_go_to_the_hub_as_they_are(monkeypatch, checkpoint, part):
    asked = {}

    def download(name, allow_patterns, **options):
        asked.update(options, name=name)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v1", "cache_dir": "elsewhere", "token": "hf_x", "local_files_only": True}
    part.from_pretrained("org/name", **options)
    assert asked == options | {"name": "org/name"}


@pytest.mark.parametrize(
    "option",
    [{"revision": 7}, {"cache_dir": 3}, {"token": 1.5}, {"local_files_only": "yes"}, {"local_files_only": None}],
)
def test_a_hub_option_of_another_type_is_refused(checkpoint, option):
    with pytest.raises(TypeError, match=next(iter(option))):
        load(checkpoint, **option)


@pytest.mark.parametrize("part", [QwenBatchedVL, BatchedVisionTransformer, BatchedDecoder, TensorProcessor])
@pytest.mark.parametrize("name", ["load_in_4bit", "quantization_config", "use_fast", "lm_heads", "max_memory"])
def test_an_unknown_option_is_refused_by_name(checkpoint, part, name):
    with pytest.raises(TypeError, match=name):
        part.from_pretrained(checkpoint, **{name: None})


@pytest.mark.parametrize("name", ["bfloat16", "torch.float64"])
def test_a_dtype_may_be_given_by_its_name(checkpoint, name):
    expected = getattr(torch, name.removeprefix("torch."))
    assert load(checkpoint, dtype=name).dtype == expected
    assert load(checkpoint, torch_dtype=name).dtype == expected
    assert load(checkpoint, torch_dtype=expected, dtype=name).dtype == expected
    assert (
        next(BatchedDecoder.from_pretrained(checkpoint, torch_dtype=name, device="cpu").parameters()).dtype == expected
    )


@pytest.mark.parametrize("torch_dtype", ["auto", None])
def test_torch_dtype_auto_is_the_checkpoints_own(checkpoint, torch_dtype):
    assert load(checkpoint, torch_dtype=torch_dtype).dtype == torch.float32
    assert load(checkpoint, torch_dtype=torch_dtype, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}])
def test_device_map_may_be_one_device(checkpoint, device_map):
    for part in (QwenBatchedVL, BatchedVisionTransformer, BatchedDecoder):
        model = part.from_pretrained(checkpoint, device_map=device_map)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert load(checkpoint, device_map=device_map, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("device_map", ["auto", {"": "auto"}, None])
def test_device_map_auto_is_the_default_device(checkpoint, device_map):
    model = QwenBatchedVL.from_pretrained(checkpoint, device_map=device_map)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "device_map",
    [
        *("balanced", "sequential", {"visual": 0, "model": 1}, {}, {"": "disk"}, True, 1.5, -1, ["cpu"]),
        {"": "cpu", "visual": "cpu"},
    ],
)
def test_a_device_map_over_several_devices_or_none_is_refused(checkpoint, device_map):
    with pytest.raises(ValueError, match="device"):
        QwenBatchedVL.from_pretrained(checkpoint, device_map=device_map)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("dtype", "torch_dtype"), {"dtype": "float16", "torch_dtype": "bfloat16"}),
        (("device", "device_map"), {"device": "cpu", "device_map": "meta"}),
        (("dtype", "int8"), {"torch_dtype": "int8"}),
        (("trust_remote_code",), {"trust_remote_code": True}),
    ],
)
def test_options_that_contradict_each_other_or_us_are_refused(checkpoint, names, options):
    with pytest.raises(ValueError) as raised:
        load(checkpoint, **options)
    assert all(name in str(raised.value) for name in names)


def test_options_for_transformers_change_nothing_and_attention_is_logged_once(checkpoint, caplog):
    options = {"attn_implementation": "eager-by-this-test", "low_cpu_mem_usage": True, "trust_remote_code": False}
    models = [load(checkpoint), load(checkpoint, **options), load(checkpoint, **options)]
    with torch.no_grad():
        outs = [model(FRAMES, TEXTS).last_hidden_state for model in models]
    assert torch.equal(outs[0], outs[1])
    assert sum("eager-by-this-test" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_integers_go_where_ints_go(checkpoint, kind):
    model = load(checkpoint, num_layers=kind(2))
    assert len(model.model.layers) == 2
    assert len(BatchedDecoder.from_pretrained(checkpoint, device="cpu", num_layers=kind(2)).layers) == 2
    limits = {"min_pixels": np.int64(784), "max_pixels": np.int32(50176)}
    image = TensorProcessor.from_pretrained(checkpoint, **limits).image
    assert (image.min_pixels, image.max_pixels) == (784, 50176)
    assert {type(image.min_pixels), type(image.max_pixels), type(model.config.text.num_hidden_layers)} == {int}
    with torch.no_grad():
        assert torch.equal(
            model(FRAMES, TEXTS, layers=(kind(1), np.int64(-1)), resize=(kind(56), kind(84))).hidden_states[0],
            model(FRAMES, TEXTS, layers=(1, -1), resize=(56, 84)).hidden_states[0],
        )
        drawn = [
            model.generate(FRAMES, TEXTS, max_new_tokens=of(3), temperature=1.0, top_k=of(5), seed=of(7)).token_ids
            for of in (int, kind)
        ]
    assert all(map(torch.equal, *drawn))


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, np.float32(2), "2", [2]])
def test_what_is_no_int_is_refused_where_ints_go(checkpoint, value):
    for name in ("num_layers", "min_pixels", "max_pixels"):
        with pytest.raises(ValueError, match=name):
            load(checkpoint, **{name: value})


# --- numbers that are too large ---


@pytest.mark.parametrize("value", [MAX_FRAME_PIXELS + 1, 2**40, 10**30, 0, -1])
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
def test_pixel_limits_stay_below_the_largest_frame(folder, name, value):
    both = {"min_pixels": value, "max_pixels": value}
    with pytest.raises(ValueError, match=f"{MAX_FRAME_PIXELS}"):
        TensorProcessor.from_pretrained(folder, **both)
    change(folder / "preprocessor_config.json", **{name: value})
    with pytest.raises(ValueError, match=r"preprocessor_config\.json.*pixels"):
        TensorProcessor.from_pretrained(folder)


def test_a_frame_that_rounding_up_would_make_too_large_is_refused_before_it_is_made(checkpoint):
    limits = {"min_pixels": MAX_FRAME_PIXELS, "max_pixels": MAX_FRAME_PIXELS}
    processor = TensorProcessor.from_pretrained(checkpoint, **limits)
    with pytest.raises(ValueError, match=f"{MAX_FRAME_PIXELS}"):
        processor(FRAMES)
    for height, width in ((28, 28), (29, 5600), (1000, 1000)):
        rows, columns = smart_resize(height, width, 28, 1 << 20, MAX_FRAME_PIXELS)
        assert rows * columns <= MAX_FRAME_PIXELS


@pytest.mark.parametrize("what", ["image", "pad", "end", "second end"])
def test_an_id_that_the_model_writes_has_an_embedding_or_loading_is_refused(folder, what):
    if what == "image":
        change(folder / "config.json", vocab_size=512)  # its own id, as the first beyond
    elif what == "pad":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<new_{index}>" for index in range(200)], special_tokens=True)
        tokenizer.pad_token = "<new_199>"
        tokenizer.save_pretrained(folder)
    else:
        change(folder / "generation_config.json", eos_token_id=600 if what == "end" else [502, 10**6])
    for part in (load, TensorProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"must be below the vocab_size (512|600)") as raised:
            part(folder)
        assert str(folder) in str(raised.value)


@pytest.mark.slow
def test_no_message_holds_a_large_value(folder):
    large = ["x" * 10**6, ["7"] * 10**6, {"y" * 10**5: 1}, 10**4000]
    for value in large:
        for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
            fields = {"model_type": value, "min_pixels": value, "eos_token_id": value}
            original = (folder / name).read_text()
            change(folder / name, **fields)
            with pytest.raises(ValueError) as raised:
                load(folder)
            assert str(folder / name) in str(raised.value)
            assert len(str(raised.value)) < len(str(folder)) + 600
            (folder / name).write_text(original)


# --- generation_config.json ---

CHANGING = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "min_length": 5,
    "min_new_tokens": 5,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "bad_words_ids": [[5]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 502,
    "exponential_decay_length_penalty": [2, 1.5],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], 2.0]],
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "stop_strings": ["a"],
    "token_healing": True,
    "max_time": 1.0,
    "cache_implementation": "quantized",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[5]],
    "a_setting_of_next_year": 1,
}


def test_a_setting_that_changes_tokens_is_refused_by_generate_and_not_by_loading(folder):
    before = read(folder / "generation_config.json")
    change(folder / "generation_config.json", **CHANGING)
    model = load(folder)
    with torch.no_grad():
        assert model(FRAMES, TEXTS).last_hidden_state.isfinite().all()
    for name, value in CHANGING.items():
        (folder / "generation_config.json").write_text(json.dumps(before | {name: value}))
        model.generation_config = Checkpoint.open(folder).generation_config()
        with pytest.raises(ValueError, match=f"{name}=") as raised:
            model.generate(FRAMES, TEXTS, max_new_tokens=2)
        assert "generation_config.json" in str(raised.value)


def test_settings_at_transformers_defaults_and_null_change_nothing(folder):
    before = load(folder).generate(FRAMES, TEXTS, max_new_tokens=4).token_ids
    defaults = transformers.GenerationConfig().to_dict() | dict(NEUTRAL)
    own = {"eos_token_id", "pad_token_id", "bos_token_id", "repetition_penalty"}
    change(folder / "generation_config.json", **{name: value for name, value in defaults.items() if name not in own})
    change(folder / "generation_config.json", **dict.fromkeys(CHANGING), typical_p=1.0, top_h=None)
    assert all(map(torch.equal, load(folder).generate(FRAMES, TEXTS, max_new_tokens=4).token_ids, before))


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001},
        {"max_length": 20, "max_new_tokens": 3, "use_cache": False, "cache_implementation": "static"},
        {"output_scores": True, "return_dict_in_generate": True, "output_hidden_states": True},
        {"early_stopping": True, "length_penalty": 2.0, "typical_p": 0.5, "min_p": 0.1, "do_sample": False},
        {"transformers_version": "4.37.0", "_from_model_config": True},
    ],
)
def test_settings_of_the_calls_own_arguments_and_of_how_it_computes_change_nothing(folder, fields):
    before = load(folder).generate(FRAMES, TEXTS, max_new_tokens=4).token_ids
    change(folder / "generation_config.json", **fields)
    assert all(map(torch.equal, load(folder).generate(FRAMES, TEXTS, max_new_tokens=4).token_ids, before))


def test_settings_of_drawing_are_refused_where_the_checkpoint_draws(folder):
    change(folder / "generation_config.json", do_sample=True, typical_p=0.5)
    with pytest.raises(ValueError, match=r"typical_p=0\.5"):
        load(folder).generate(FRAMES, TEXTS, max_new_tokens=2)


def test_every_setting_of_the_installed_transformers_has_been_thought_through():
    """Each is harmless by name, or refused with a value that its default is not."""
    names = vars(transformers.GenerationConfig())
    unknown = [name for name in names if name not in HARMLESS]
    for name in unknown:
        assert GenerationConfig.from_dict({name: None}, {}).refused == ()
        assert GenerationConfig.from_dict({name: "new", "do_sample": True}, {}).refused == ((name, "'new'"),)


@pytest.mark.parametrize("fields", [{}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 502]}, None])
@pytest.mark.parametrize(
    ("nested", "top"),
    [(True, {}), (False, {"eos_token_id": 9, "repetition_penalty": 1.3}), (True, {"eos_token_id": 9})],
)
def test_trap36_end_tokens_in_two_files_are_read_as_transformers_reads_them(tmp_path, fields, nested, top):
    folder = write_checkpoint(tmp_path / "c", config_layout="nested" if nested else "flat")
    change(folder / "config.json", **top)
    if fields is None:
        (folder / "generation_config.json").unlink()
    else:
        change(folder / "generation_config.json", **({"eos_token_id": ...} | fields))
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).generation_config
    ours = Checkpoint.open(folder).generation_config()
    expected = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert list(ours.eos_token_ids) == [token for token in expected if token is not None]
    assert ours.repetition_penalty == (theirs.repetition_penalty or 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        *({"eos_token_id": eos} for eos in ("502", 502.0, True, [502, None], [[502]], {"a": 1}, [502, "x"], -1, [-1])),
        *({"repetition_penalty": penalty} for penalty in (0, -1.0, "1.1", True, float("nan"), [1.1])),
    ],
)
def test_damaged_end_tokens_and_penalties_are_refused_at_loading_with_the_file(folder, fields):
    change(folder / "generation_config.json", **fields)
    with pytest.raises(ValueError, match=next(iter(fields))) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_an_empty_name_is_no_folder(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    with pytest.raises(ValueError, match="does not exist"):
        QwenBatchedVL.from_pretrained("")

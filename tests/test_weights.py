"""Checkpoint folders: every layout loads to the same model, only what is needed is read, a damaged one is refused."""

import contextlib
import copy
import json
import os
import shutil
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen_batched import BatchedDecoder, BatchedVisionTransformer, QwenBatchedVL, TensorProcessor, testing
from qwen_batched.checkpoint import weights
from qwen_batched.checkpoint.folder import Checkpoint
from qwen_batched.families import read_config
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.testing import random_tensor, write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.fuzz.damaged_checkpoints import INDEX, SINGLE, WRONG_VALUES, fields_of
from tests.support import assert_equal_to, photos

RELEASE = Version(transformers.__version__).release
IMAGE = {"min_pixels": 28 * 28}
FRAMES = photos(2, 2, 56, 84)
TEXTS = ["Pick up the red block.", "Go."]
OTHER_CONFIGS = ("preprocessor", "generation")


def load(folder, **options):
    return QwenBatchedVL.from_pretrained(folder, device="cpu", **options)


def write(folder, **options):
    return write_checkpoint(folder, "tiny", image=IMAGE, **options)


def results(model):
    with torch.no_grad():
        out = model(FRAMES, TEXTS, layers=(0, 1, -1), logits="all")
    return [*out.hidden_states, out.logits, out.image_features]


def assert_bitwise(model, expected):
    """Equal names, dtypes, parameters and outputs."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(map(torch.equal, results(model), results(expected)))


def read_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def edit_tensors(folder, change, file=SINGLE):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def expected(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def untied_checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("untied"), tied=False, shards=2)


# --- layouts ---


@pytest.mark.parametrize(
    ("key_layout", "shards", "tied"),
    [("published", 1, True), ("published", 3, False), ("nested", 1, False), ("nested", 3, True)],
)
def test_trap23_both_key_layouts_load_bitwise_equal(tmp_path, expected, key_layout, shards, tied):
    folder = write(tmp_path, key_layout=key_layout, shards=shards, tied=tied)
    assert len(list(folder.glob("*.safetensors"))) == shards
    model = load(folder)
    state = model.state_dict()
    assert ("lm_head.weight" in state) is not tied
    for name, value in state.items():
        assert torch.equal(value, random_tensor(name, tuple(value.shape), seed=0)), name
    if tied:
        assert_bitwise(model, expected)


def test_trap23_a_tied_head_stored_again_changes_nothing(folder, expected):
    edit_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    assert_bitwise(load(folder), expected)


def test_trap23_an_untied_head_is_used_and_not_the_embedding(untied_checkpoint, expected):
    model = load(untied_checkpoint)
    hidden, logits = results(model)[2], results(model)[3]
    head = random_tensor("lm_head.weight", tuple(model.model.embed_tokens.weight.shape), seed=0)
    assert_equal_to(logits, hidden @ head.T)
    assert not torch.allclose(logits, results(expected)[3], atol=1e-2)


@pytest.mark.parametrize(
    "name", ["model-00009-of-00009.safetensors", "../x.safetensors", "sub/x.safetensors", "absolute", "", ".", 7, None]
)
def test_trap23_an_index_naming_a_missing_or_outside_file_is_refused(tmp_path, name):
    folder = write(tmp_path / "checkpoint", shards=3)
    # What stands outside the folder is a perfectly good file: it must be refused for where it is.
    for outside in (tmp_path, folder / "sub"):
        outside.mkdir(exist_ok=True)
        shutil.copy(folder / "model-00002-of-00003.safetensors", outside / "x.safetensors")
    mine = "model-00002-of-00003.safetensors"
    name = str(tmp_path / "x.safetensors") if name == "absolute" else name
    edit_json(
        folder / INDEX,
        lambda index: index["weight_map"].update({k: name for k, v in index["weight_map"].items() if v == mine}),
    )
    with pytest.raises(ValueError, match=r"safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, [], 3])
def test_trap23_an_index_without_a_map_is_refused(tmp_path, index):
    folder = write(tmp_path, shards=3)
    edit_json(folder / INDEX, lambda _: index)
    with pytest.raises(ValueError, match=r"safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_trap23_each_missing_shard_is_noticed(tmp_path, missing):
    folder = write(tmp_path, shards=3)
    (folder / f"model-0000{missing}-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=f"model-0000{missing}-of-00003"):
        load(folder)


def nest_text(config, rope_field):
    """A published config.json as later versions of transformers save it."""
    text_fields = set(config) - {"architectures", "model_type", "vision_config", "torch_dtype", "tie_word_embeddings"}
    text = {field: config.pop(field) for field in text_fields if not field.endswith("token_id")}
    section = text.pop("rope_scaling")["mrope_section"]
    if rope_field == "rope_parameters":
        theta = text.pop("rope_theta")
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": section}
    else:
        text["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": section}
    config["text_config"] = {"model_type": "qwen2_5_vl_text", **text}
    config["dtype"] = config.pop("torch_dtype")


@pytest.mark.parametrize("rope_field", ["rope_parameters", "rope_scaling"])
def test_trap24_nested_text_config_loads_bitwise_equal_to_the_flat_one(folder, expected, rope_field):
    """`rope_parameters` is transformers 5's; `rope_scaling` and `rope_theta` in text_config are 4.52 to 4.57's."""
    # A theta that is no default, in the flat reference too: a reader that looks in the wrong place finds another.
    edit_json(folder / "config.json", lambda config: config.update(rope_theta=5000.0))
    flat = load(folder)
    assert flat.config.text.rope_theta == 5000.0
    edit_json(folder / "config.json", lambda config: nest_text(config, rope_field))
    nested = load(folder)
    assert nested.config.shape == flat.config.shape
    assert_bitwise(nested, flat)
    assert not torch.equal(results(nested)[2], results(expected)[2])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trap24_config_layouts_of_the_writer_load_bitwise_equal(tmp_path, tied):
    models = [load(write(tmp_path / layout, config_layout=layout, tied=tied)) for layout in testing.CONFIG_LAYOUTS]
    assert models[0].config.shape == models[1].config.shape
    assert_bitwise(*models)


@pytest.mark.parametrize("rope_type", ["mrope", "default"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_trap24_both_names_of_the_rope_type_are_read(folder, expected, name, rope_type):
    section = expected.config.text.mrope_section
    edit_json(
        folder / "config.json",
        lambda config: config.update(rope_scaling={name: rope_type, "mrope_section": list(section)}),
    )
    assert_bitwise(load(folder), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trap24_what_transformers_saves_here_loads_bitwise_equal(tmp_path, tied):
    source = write(tmp_path / "source", tied=tied)
    reference = TransformersReference.from_pretrained(source)
    saved = tmp_path / "saved"
    reference.model.save_pretrained(saved)
    reference.tokenizer.save_pretrained(saved)
    reference.image_processor.save_pretrained(saved)
    assert_bitwise(load(saved), load(source))


def test_trap24_what_transformers_processor_saves_here_loads_equal(tmp_path, checkpoint, expected):
    pytest.importorskip("torchvision")  # the video processor, which a processor cannot do without, needs it
    saved = tmp_path / "saved"
    TransformersReference.from_pretrained(checkpoint).model.save_pretrained(saved)
    transformers.AutoProcessor.from_pretrained(checkpoint).save_pretrained(saved)
    assert_bitwise(load(saved), expected)


def test_trap24_processor_files_of_transformers_5_load_bitwise_equal(folder, expected):
    """processor_config.json and chat_template.jinja in place of the published files."""
    image = json.loads((folder / "preprocessor_config.json").read_text())
    size = {"shortest_edge": image.pop("min_pixels"), "longest_edge": image.pop("max_pixels")}
    processor = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": {**image, "size": size}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("chat_template") and None)
    for name in ("preprocessor_config.json", "chat_template.json"):
        (folder / name).unlink()
    model = load(folder)
    assert model.processor.image == expected.processor.image
    assert_bitwise(model, expected)


# --- names and shapes ---


@pytest.mark.parametrize(("preset", "count"), [("tiny", None), ("3b", 824), ("7b", 729)])
def test_state_dict_has_the_names_and_shapes_of_the_published_checkpoint(tmp_path, monkeypatch, preset, count):
    shapes = {}
    monkeypatch.setattr(testing.checkpoints, "write_weights", lambda folder, published, *rest: shapes.update(published))
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, preset))
    config = read_config(checkpoint)
    processor = TensorProcessor.from_checkpoint(checkpoint)
    model = weights.build_on_meta(lambda: QwenBatchedVL(config, processor, checkpoint))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    assert count is None or len(shapes) == count  # what the published index files count
    assert "visual.blocks.0.attn.qkv.weight" in shapes
    assert "model.layers.0.self_attn.q_proj.weight" in shapes


# --- reads ---


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each tensor's values are read, by published name."""
    counts = Counter()

    class CountingFile:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.tensors = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):  # slices too: whoever read by them would be missed below, and count nothing
            return getattr(self.tensors, name)

        def get_tensor(self, key):
            counts[FAMILY.keys.module_name(key)] += 1
            return self.tensors.get_tensor(key)

    monkeypatch.setattr(weights, "safe_open", CountingFile)
    return counts


def stored_names(folder):
    return {FAMILY.keys.module_name(key) for key in read_tensors(folder)}


def is_block_from(name, first):
    return name.startswith("model.layers.") and int(name.split(".")[2]) >= first


@pytest.mark.parametrize("num_layers", [None, 1, 2, 4])
def test_num_layers_reads_only_the_blocks_it_keeps_each_tensor_once(reads, untied_checkpoint, num_layers):
    load(untied_checkpoint, num_layers=num_layers)
    kept = {name for name in stored_names(untied_checkpoint) if not is_block_from(name, num_layers or 4)}
    assert reads == dict.fromkeys(kept, 1)


def test_without_lm_head_the_head_is_never_read(reads, untied_checkpoint):
    whole = load(untied_checkpoint)
    reads.clear()
    model = load(untied_checkpoint, lm_head=False)
    assert reads == dict.fromkeys(stored_names(untied_checkpoint) - {"lm_head.weight"}, 1)
    assert "lm_head.weight" not in model.state_dict()
    with torch.no_grad():
        assert torch.equal(model(FRAMES, TEXTS).last_hidden_state, whole(FRAMES, TEXTS).last_hidden_state)


@pytest.mark.parametrize("key_layout", testing.KEY_LAYOUTS)
def test_the_vision_tower_alone_reads_only_its_own_tensors(tmp_path, reads, key_layout):
    folder = write(tmp_path, key_layout=key_layout, tied=False)
    whole = load(folder)
    reads.clear()
    visual = BatchedVisionTransformer.from_pretrained(folder, device="cpu")
    assert reads == dict.fromkeys({name for name in stored_names(folder) if name.startswith("visual.")}, 1)
    batch = TensorProcessor.from_pretrained(folder)(FRAMES)
    assert torch.equal(visual(**batch), whole.encode_images(FRAMES))


@pytest.mark.parametrize("key_layout", testing.KEY_LAYOUTS)
@pytest.mark.parametrize("num_layers", [None, 2])
def test_the_decoder_alone_reads_only_its_own_tensors(tmp_path, reads, key_layout, num_layers):
    folder = write(tmp_path, key_layout=key_layout, tied=False)
    whole = load(folder, num_layers=num_layers)
    reads.clear()
    decoder = BatchedDecoder.from_pretrained(folder, device="cpu", num_layers=num_layers)
    own = {name for name in stored_names(folder) if name.startswith("model.")}
    assert reads == dict.fromkeys({name for name in own if not is_block_from(name, num_layers or 4)}, 1)
    batch = whole.processor(None, TEXTS)
    embeds, layout = (
        decoder.embed_tokens(batch["input_ids"]),
        (batch["rope_positions"].transpose(0, 1), batch["attention_mask"]),
    )
    hidden = decoder(embeds, *layout, tokens=batch["prepared"].tokens)
    assert torch.equal(hidden[0], whole(None, TEXTS).last_hidden_state)


def test_the_processor_alone_reads_no_weights(folder):
    (folder / SINGLE).unlink()
    assert TensorProcessor.from_pretrained(folder)(FRAMES, TEXTS)["pixel_values"].shape[:2] == (2, 2)


# --- dtype ---


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_auto_is_the_checkpoints_own(tmp_path, stored):
    folder = write(tmp_path, dtype=stored)
    assert {parameter.dtype for parameter in load(folder).parameters()} == {stored}
    edit_json(folder / "config.json", lambda config: config.pop("torch_dtype") and None)
    assert {parameter.dtype for parameter in load(folder).parameters()} == {stored}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_explicit_dtype_rounds_each_parameter_once(checkpoint, expected, dtype):
    for model, prefix in (
        (load(checkpoint, dtype=dtype), ""),
        (BatchedVisionTransformer.from_pretrained(checkpoint, dtype=dtype, device="cpu"), "visual."),
        (BatchedDecoder.from_pretrained(checkpoint, dtype=dtype, device="cpu"), "model."),
    ):
        for name, value in model.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, expected.state_dict()[prefix + name].to(dtype)), name


@pytest.mark.parametrize(
    "dtype", ["float", "bf16", "torch.int8", torch.int8, torch.bool, torch.complex64, 32, object()]
)
def test_a_wrong_dtype_is_refused(checkpoint, dtype):
    with pytest.raises((ValueError, TypeError), match="dtype"):
        load(checkpoint, dtype=dtype)


# --- saving ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "loading"),
    [
        ({}, {}),
        ({"key_layout": "nested", "config_layout": "nested"}, {}),
        ({"key_layout": "nested", "config_layout": "flat", "tied": False, "shards": 3}, {}),
        ({"tied": False, "config_layout": "nested"}, {"num_layers": 2}),
        ({"dtype": torch.bfloat16}, {"num_layers": 3, "min_pixels": 56 * 56, "max_pixels": 112 * 112}),
        ({}, {"dtype": torch.bfloat16}),
        ({"dtype": torch.bfloat16, "tied": False}, {"dtype": torch.float32}),
    ],
    ids=["published", "nested", "nested untied shards", "untied truncated", "bf16 truncated", "to bf16", "to float32"],
)
def test_load_save_load_is_bitwise_and_transformers_loads_it_too(tmp_path, options, loading):
    source = write(tmp_path / "source", **options)
    model = load(source, **loading)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again = load(saved)
    assert again.config.text.num_hidden_layers == model.config.text.num_hidden_layers
    assert again.processor.image == model.processor.image
    assert_bitwise(again, model)
    if RELEASE < (5,) and options.get("config_layout") == "nested":
        return  # this transformers cannot read the source's config either

    theirs, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.state_dict()
    for name, value in state.items():
        published = FAMILY.keys.module_name(name)
        mine = model.state_dict().get(published, model.model.embed_tokens.weight)
        assert torch.equal(value.to(mine.dtype), mine), name
    if loading.get("num_layers"):
        reference, layer = TransformersReference.from_pretrained(source), loading["num_layers"]
        inputs = reference.processor_inputs([], TEXTS[0])
        wide = TransformersReference.from_pretrained(saved)
        # Neither has its final norm there: the source has a block to come, the saved model is asked for the one before.
        assert_equal_to(
            wide.run(**inputs).hidden_states[layer - 1], reference.run(**inputs).hidden_states[layer - 1], tolerance=0
        )
    elif RELEASE >= (4, 52) or options.get("key_layout") != "nested":  # 4.51 cannot read the source's keys
        references = [TransformersReference.from_pretrained(folder, dtype=model.dtype) for folder in (source, saved)]
        inputs = references[0].processor_inputs(list(FRAMES[0]), TEXTS[0])
        logits = [reference.run(**inputs).logits for reference in references]
        assert torch.equal(*logits)


def test_a_saved_folder_keeps_tokenizer_template_and_preprocessor(tmp_path, checkpoint):
    model = load(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    references = [TransformersReference.from_pretrained(folder) for folder in (checkpoint, tmp_path / "saved")]
    text = "把红色的积木放在盘子上 🤖\n<|im_end|> it's"
    for frames in ([], [FRAMES[0, 0]], [FRAMES[0, 0], FRAMES[1, 1]]):
        before, after = (reference.processor_inputs(frames, text) for reference in references)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer(text)["input_ids"] == references[0].tokenizer(text)["input_ids"]
    assert tokenizer.get_added_vocab() == references[0].tokenizer.get_added_vocab()
    batches = [
        TensorProcessor.from_pretrained(folder)(FRAMES, [text] * 2) for folder in (checkpoint, tmp_path / "saved")
    ]
    assert batches[0].pop("prepared") == batches[1].pop("prepared")
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_saving_writes_no_pickle_and_nothing_over_the_limit(tmp_path, expected):
    expected.save_pretrained(tmp_path / "new" / "saved")
    suffixes = {path.suffix for path in (tmp_path / "new" / "saved").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".jinja"}


def test_saving_writes_the_weights_as_they_are_now(tmp_path, checkpoint):
    model = load(checkpoint)
    with torch.no_grad():
        model.visual.patch_embed.proj.weight.mul_(2)
        model.model.layers[1].self_attn.q_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "saved")
    assert_bitwise(load(tmp_path / "saved"), model)


def test_a_model_without_its_untied_head_is_not_saved(tmp_path, untied_checkpoint):
    with pytest.raises(ValueError, match="lm_head"):
        load(untied_checkpoint, lm_head=False).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- damaged weights ---

QKV = "visual.blocks.0.attn.qkv.weight"
DAMAGES = {
    "unknown vision key": (lambda t: t.update({"visual.extra.weight": torch.zeros(1)}), r"visual\.extra\.weight"),
    "unknown text key": (lambda t: t.update({"model.extra.weight": torch.zeros(1)}), r"model\.extra\.weight"),
    "unknown top key": (lambda t: t.update({"extra": torch.zeros(1)}), "extra"),
    "unknown nested key": (lambda t: t.update({"model.visual.extra": torch.zeros(1)}), r"model\.visual\.extra"),
    "key of a block too many": (
        lambda t: t.update({"model.layers.4.input_layernorm.weight": torch.zeros(64)}),
        r"model\.layers\.4\.input_layernorm\.weight",
    ),
    "missing vision key": (lambda t: t.pop(QKV), "visual.blocks.0.attn.qkv.weight"),
    "missing bias": (lambda t: t.pop("visual.merger.mlp.0.bias"), "visual.merger.mlp.0.bias"),
    "missing text key": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "missing embedding": (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "both layouts at once": (lambda t: t.update({f"model.{QKV}": t[QKV].clone()}), QKV),
    "transposed": (lambda t: t.update({QKV: t[QKV].T.contiguous()}), QKV),
    "a row short": (lambda t: t.update({QKV: t[QKV][1:].clone()}), QKV),
    "flat": (lambda t: t.update({QKV: t[QKV].flatten()}), QKV),
    "one dimension more": (lambda t: t.update({QKV: t[QKV][None].clone()}), QKV),
    "empty": (lambda t: t.update({QKV: torch.zeros(0, 80)}), QKV),
    "vocabulary too small": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(599, 64)}),
        "model.embed_tokens.weight",
    ),
    "int64": (lambda t: t.update({QKV: t[QKV].long()}), QKV),
    "int8": (lambda t: t.update({QKV: t[QKV].to(torch.int8)}), QKV),
    "bool": (lambda t: t.update({QKV: t[QKV].bool()}), QKV),
    "no tensors": (lambda t: t.clear(), "misses"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_tensors_raise_a_value_error_that_names_them_and_the_folder(folder, damage):
    change, message = DAMAGES[damage]
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_a_key_in_two_shards_is_refused(tmp_path):
    folder = write(tmp_path, shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    edit_tensors(folder, lambda others: others.update({QKV: tensors[QKV].clone()}), file=second.name)
    with pytest.raises(ValueError, match=QKV) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("key", ["model.layers.3.extra.weight", "model.layers.7.input_layernorm.weight"])
def test_unknown_keys_among_blocks_that_are_not_kept_are_refused_too(folder, key):
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(64)}))
    for load_part in (load, lambda *a, **o: BatchedDecoder.from_pretrained(*a, device="cpu", **o)):
        with pytest.raises(ValueError, match=key):
            load_part(folder, num_layers=2)


def test_parts_loaded_alone_are_as_strict(folder):
    edit_tensors(folder, lambda tensors: (tensors.pop(QKV), tensors.pop("model.norm.weight")))
    with pytest.raises(ValueError, match=QKV):
        BatchedVisionTransformer.from_pretrained(folder, device="cpu")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        BatchedDecoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("num_layers", [0, -1, 5, True, 2.0, "2"])
def test_a_wrong_num_layers_is_refused(checkpoint, num_layers):
    with pytest.raises((ValueError, TypeError), match="num_layers"):
        load(checkpoint, num_layers=num_layers)
    with pytest.raises((ValueError, TypeError), match="num_layers"):
        BatchedDecoder.from_pretrained(checkpoint, device="cpu", num_layers=num_layers)


# --- what is not implemented ---

REFUSED_CONFIGS = {
    "model_type of Qwen2-VL": lambda c: c.update(model_type="qwen2_vl"),
    "model_type of Qwen3-VL": lambda c: c.update(model_type="qwen3_vl"),
    "model_type missing": lambda c: c.pop("model_type"),
    "yarn without a factor": lambda c: c["rope_scaling"].update(type="yarn"),
    "yarn of no length": lambda c: c["rope_scaling"].update(
        type="yarn", factor=4.0, original_max_position_embeddings=0
    ),
    "yarn whose factor is text": lambda c: c["rope_scaling"].update(rope_type="yarn", factor="4"),
    "rope_parameters linear": lambda c: c.update(rope_parameters={**c.pop("rope_scaling"), "rope_type": "linear"}),
    "rope type is no string": lambda c: c["rope_scaling"].update(type=["mrope"]),
    "rope_scaling is no object": lambda c: c.update(rope_scaling="mrope"),
    "mrope_section of two": lambda c: c["rope_scaling"].update(mrope_section=[4, 4]),
    "mrope_section of another sum": lambda c: c["rope_scaling"].update(mrope_section=[2, 2, 2]),
    "mrope_section negative": lambda c: c["rope_scaling"].update(mrope_section=[-2, 5, 5]),
    "text activation": lambda c: c.update(hidden_act="gelu"),
    "vision activation": lambda c: c["vision_config"].update(hidden_act="gelu_pytorch_tanh"),
    "quantized": lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}),
    "sliding window": lambda c: c.update(use_sliding_window=True),
    "sliding layers": lambda c: c.update(layer_types=["full_attention"] * 3 + ["sliding_attention"]),
    "attention dropout": lambda c: c.update(attention_dropout=0.1),
    "head_dim": lambda c: c.update(head_dim=32),
    "dtype": lambda c: c.update(torch_dtype="int8"),
    "dtype is no string": lambda c: c.update(torch_dtype=["float32"]),
    "grey images": lambda c: c["vision_config"].update(in_channels=1),
    "vision_config is a list": lambda c: c.update(vision_config=[]) or c.update(vision_config=[1]),
    "window smaller than a cell": lambda c: c["vision_config"].update(window_size=27),
    "full-attention blocks as text": lambda c: c["vision_config"].update(fullatt_block_indexes="all"),
    "a full-attention block as text": lambda c: c["vision_config"].update(fullatt_block_indexes=["1"]),
    "yarn in the tower": lambda c: c["vision_config"].update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "two patch sizes": lambda c: c["vision_config"].update(patch_size=[14, 14]),
    "cells of no patch": lambda c: c["vision_config"].update(spatial_merge_size=0),
    "tower of another activation": lambda c: c["vision_config"].update(hidden_act="gelu"),
    "more blocks than stored": lambda c: c.update(num_hidden_layers=5),
    "fewer blocks than stored": lambda c: c.update(num_hidden_layers=3),
    "deeper vision than stored": lambda c: c["vision_config"].update(depth=7),
    "shallower vision than stored": lambda c: c["vision_config"].update(depth=5),
    "vision heads that do not divide": lambda c: c["vision_config"].update(num_heads=7),
    "text heads that do not divide": lambda c: c.update(num_attention_heads=5),
    "image_token_id of another tokenizer": lambda c: c.update(image_token_id=7),
    "image_token_id is text": lambda c: c.update(image_token_id="512"),
    "another patch size than the preprocessor's": lambda c: c["vision_config"].update(patch_size=16),
}


@pytest.mark.parametrize("name", REFUSED_CONFIGS)
def test_trap06_a_config_that_is_not_implemented_or_not_the_weights_own_is_refused(folder, name):
    edit_json(folder / "config.json", lambda config: REFUSED_CONFIGS[name](config) and None)
    with pytest.raises((ValueError, TypeError)):
        load(folder)


REFUSED_PREPROCESSORS = {
    "no rescaling": {"do_rescale": False},
    "no resizing": {"do_resize": False},
    "no normalising": {"do_normalize": False},
    "bilinear": {"resample": 2},
    "patch_size": {"patch_size": 16},
    "merge_size": {"merge_size": 3},
    "std of zero": {"image_std": [0.2, 0, 0.2]},
    "mean of four": {"image_mean": [0.5] * 4},
    "mean as text": {"image_mean": "half"},
    "least above most": {"min_pixels": 10**6, "max_pixels": 10**5},
    "negative": {"min_pixels": -1},
    "size as a number": {"size": 224},
}


@pytest.mark.parametrize("name", REFUSED_PREPROCESSORS)
def test_a_preprocessor_that_is_not_implemented_is_refused(folder, name):
    edit_json(folder / "preprocessor_config.json", lambda config: config.update(REFUSED_PREPROCESSORS[name]))
    with pytest.raises((ValueError, TypeError)):
        load(folder)


@pytest.mark.parametrize("field", ["num_hidden_layers", "depth"])
def test_an_absurd_depth_is_refused_before_its_blocks_are_built(folder, monkeypatch, field):
    from qwen_batched.model import decoder, vision

    for module, name in ((vision, "VisionBlock"), (decoder, "DecoderBlock")):
        built = Counter()
        block = getattr(module, name)

        def count(*args, block=block, built=built):
            built["blocks"] += 1
            assert built["blocks"] < 1000, "a thousand blocks were built of a checkpoint that has a handful"
            return block(*args)

        monkeypatch.setattr(module, name, count)
    edit_json(
        folder / "config.json",
        lambda config: (config if field in config else config["vision_config"]).update({field: 10**5}),
    )
    with pytest.raises(ValueError, match=r"layers|blocks|depth|misses"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "size"),
    [
        *(("vocab_size", 2**40), ("vocab_size", 2**62), ("intermediate_size", 2**58), ("intermediate_size", 2**70)),
        *(("out_hidden_size", 2**40), ("out_hidden_size", 2**63)),
    ],
)
def test_an_absurd_width_is_refused(folder, field, size):
    edit_json(
        folder / "config.json",
        lambda config: (config if field in config else config["vision_config"]).update({field: size}),
    )
    with pytest.raises((ValueError, TypeError)):
        load(folder)


def test_a_vision_tower_as_wide_as_another_decoder_is_refused(folder):
    """Its files agree with its config; the features would not fit into the embeddings."""
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(out_hidden_size=32))

    def narrow(tensors):
        for name in ("visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"):
            tensors[name] = tensors[name][:32].clone()

    edit_tensors(folder, narrow)
    with pytest.raises(ValueError, match="hidden_size"):
        load(folder)


# --- damaged folders ---


def test_a_missing_folder_is_refused(tmp_path):
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "", "a b c", "../nowhere/x/y"):
        for load_part in (load, BatchedVisionTransformer.from_pretrained, TensorProcessor.from_pretrained):
            with pytest.raises(ValueError):
                load_part(name)


@pytest.mark.parametrize("name", [None, 7, b"tiny", ["tiny"]])
def test_a_name_that_is_no_path_is_refused(name):
    with pytest.raises(TypeError, match="folder"):
        load(name)


def test_a_file_in_place_of_the_folder_is_refused(checkpoint):
    with pytest.raises(ValueError):
        load(checkpoint / "config.json")


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch, tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ValueError, match="qwen-batched-tests/there-is-no-such-model"):
        load("qwen-batched-tests/there-is-no-such-model")


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["model.pt", "pytorch_model.bin.index.json"]])
def test_pickles_are_never_read(folder, names):
    """A pickle beside nothing else is refused, and its code does not run."""
    ran = folder / "the pickle ran"
    (folder / SINGLE).unlink()
    for name in names:
        torch.save(_Trap(str(ran)), folder / name)
    with pytest.raises(ValueError, match="safetensors"):
        load(folder)
    assert not ran.exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_remote_code_is_never_run(folder):
    ran = folder / "the code ran"
    (folder / "tokenization_x.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass X: pass\n")
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}),
    )
    edit_json(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "tokenization_x.X"}))
    with contextlib.suppress(ValueError):
        load(folder)
    assert not ran.exists()


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 0.5, -1])
def test_a_truncated_safetensors_file_is_refused(folder, kept):
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder, num_layers=1)


@pytest.mark.parametrize("content", [b"\0" * 4096, b"\xff" * 4096, b"<html>not found</html>", b"PK\x03\x04" * 64])
def test_a_garbage_safetensors_file_is_refused(folder, content):
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(folder)


def test_a_safetensors_path_that_is_a_folder_is_refused(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    with pytest.raises(ValueError, match="safetensors"):
        load(folder)


JSON_FILES = [
    *("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.json"),
]
NO_OBJECTS = [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, x) for i, name in enumerate(JSON_FILES) for j, x in enumerate(NO_OBJECTS) if (i + j) % 3 == 0],
)
def test_a_corrupt_json_file_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_folder_without_a_needed_file_is_refused(folder, name):
    (folder / name).unlink()
    if name == "tokenizer.json":  # transformers can build the tokenizer of these as well
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    with pytest.raises(ValueError):
        load(folder)


BROKEN_TEMPLATES = ["{% for %}", "{{ nothing.at.all }}", "no image and no text", "{{ raise_exception('no') }}", "{% if"]


@pytest.mark.parametrize("template", BROKEN_TEMPLATES)
def test_a_broken_chat_template_is_refused_when_it_is_needed(folder, template):
    edit_json(folder / "chat_template.json", lambda content: content.update(chat_template=template))
    with pytest.raises(ValueError, match="template"):
        load(folder)(FRAMES, TEXTS)
    try:
        model = load(folder)
    except ValueError:
        return
    with torch.no_grad():
        assert model(FRAMES, TEXTS, template="plain").last_hidden_state.isfinite().all()


# --- values of a config that mean nothing ---

# Blocks are built before their number is compared with the files: see the test of an absurd depth.
DEPTHS = {"num_hidden_layers", "depth"}
BOUNDED = [x for x in WRONG_VALUES if not isinstance(x, int | float) or abs(x) < 1000]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("config.json", "flat"), ("config.json", "nested"), *((f"{x}_config.json", "flat") for x in OTHER_CONFIGS)],
)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_replaced_config_values_load_and_run_or_raise_value_error(
    checkpoint, tmp_path_factory, name, layout, data
):
    """Damaged bytes, headers and indices: `tests.fuzz.damaged_checkpoints`."""
    folder = tmp_path_factory.mktemp("fuzz")
    for path in checkpoint.iterdir():
        os.link(path, folder / path.name)
    if layout == "nested":
        (folder / name).unlink()
        shutil.copy(write(folder / "nested", config_layout="nested") / name, folder / name)
    content = json.loads((folder / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *path, field = data.draw(st.sampled_from(sorted(fields_of(content), key=str)))
        inner = content
        for step in path:
            inner = inner[step]
        values = BOUNDED if name != "config.json" or field in DEPTHS else WRONG_VALUES
        inner[field] = copy.deepcopy(data.draw(st.sampled_from(values)))
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(content))
    try:
        model = load(folder)
        with torch.no_grad():
            out = model(FRAMES, TEXTS)
    except (ValueError, TypeError) as error:
        assert str(error), "an error must say what is wrong"
    else:
        assert out.last_hidden_state.shape == (*out.input_ids.shape, model.config.text.hidden_size)
        assert out.last_hidden_state.isfinite().all()
    finally:
        shutil.rmtree(folder)


def test_a_state_dict_of_another_dtype_is_saved_as_what_it_is(tmp_path):
    model = load(write(tmp_path / "checkpoint"))
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=halves)
    again = load(tmp_path / "saved")
    assert again.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert all(torch.equal(tensor, halves[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("value", [None, 3, "weights", torch.ones(64, dtype=torch.int8), torch.ones(64, device="meta")])
def test_a_state_dict_of_what_cannot_be_saved_is_refused(tmp_path, value):
    model = load(write(tmp_path / "checkpoint"))
    tensors = model.state_dict() | {"model.norm.weight": value}
    with pytest.raises(ValueError, match=r"must hold tensors.* got .*model\.norm\.weight"):
        model.save_pretrained(tmp_path / "saved", state_dict=tensors)
    assert not (tmp_path / "saved").exists()

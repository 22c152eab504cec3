"""The checkpoints that tests are run on, and the transformers model that they are run against."""

import hashlib
import json
import math
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import nn

from qwen_batched import testing
from qwen_batched.testing import PRESETS, default_checkpoint, tensor_shapes, write_checkpoint
from qwen_batched.testing.presets import FAMILIES
from qwen_batched.testing.residual_stream import MASSIVE, WRITER
from qwen_batched.transformers_reference import TransformersReference, check_reference_version

RELEASE = Version(transformers.__version__).release
# (key layout, config layout): what the installed transformers itself can read.
READABLE_LAYOUTS = [("published", "flat")]
if RELEASE >= (4, 52):
    READABLE_LAYOUTS.append(("nested", "flat"))
if RELEASE >= (5,):
    READABLE_LAYOUTS += [("published", "nested"), ("nested", "nested")]

# A change that moves less than this would drown in the tolerance of a bf16 test.
NOTICEABLE = 1e-2
FRAME_SIZES = ((252, 308), (140, 140))
TEXT = "Pick up the red block."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder):
    return TransformersReference.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(reference):
    return reference.processor_inputs(frames(), TEXT)


@pytest.fixture(scope="module")
def output(reference, inputs):
    return reference.run(**inputs)


def frames(sizes=FRAME_SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def stored_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# --- weights ---


@pytest.mark.parametrize(("key_layout", "config_layout"), READABLE_LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_every_key_and_no_other(tmp_path, output, inputs, key_layout, config_layout, tied):
    folder = write_checkpoint(tmp_path, key_layout=key_layout, config_layout=config_layout, tied=tied)
    model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in stored_tensors(folder)) == (not tied)
    again = TransformersReference.from_pretrained(folder).run(**inputs)
    assert torch.equal(again.hidden_states[-1], output.hidden_states[-1])
    assert torch.equal(again.logits, output.logits) == tied


def test_shards_hold_the_tensors_of_the_single_file(tmp_path, folder):
    sharded = write_checkpoint(tmp_path, shards=3)
    index = read_json(sharded / "model.safetensors.index.json")
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files == [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == files
    expected, actual = stored_tensors(folder), stored_tensors(sharded)
    assert expected.keys() == actual.keys() == index["weight_map"].keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert not transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(sharded, output_loading_info=True)[1][
        "missing_keys"
    ]


def test_weights_depend_on_the_seed_alone(tmp_path, folder):
    same = stored_tensors(write_checkpoint(tmp_path / "same", key_layout="nested", dtype=torch.bfloat16))
    other = stored_tensors(write_checkpoint(tmp_path / "other", seed=1))
    for key, tensor in stored_tensors(folder).items():
        nested = f"model.{key}" if key.startswith("visual.") else f"model.language_model.{key.removeprefix('model.')}"
        assert torch.equal(same[nested], tensor.bfloat16())
        assert not torch.equal(other[key], tensor)


@pytest.mark.parametrize(("preset", "parameters"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_large_presets_have_the_published_parameter_count(preset, parameters):
    chosen = PRESETS[preset]
    out_field = "hidden_size" if chosen.family == "qwen2_vl" else "out_hidden_size"
    vision = FAMILIES[chosen.family].vision | chosen.vision | {out_field: chosen.text["hidden_size"]}
    shapes = tensor_shapes(chosen.text, vision, chosen.tied)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


def test_norms_and_biases_are_not_trivial(folder):
    vectors = {key: tensor for key, tensor in stored_tensors(folder).items() if tensor.ndim == 1}
    assert vectors
    for key, tensor in vectors.items():
        assert tensor.std() > 0.1, key
        assert tensor.abs().mean() > 0.1, key


def block_cases():
    vision = [("visual", block) for block in range(PRESETS["tiny"].vision["depth"])]
    return vision + [("decoder", block) for block in range(PRESETS["tiny"].text["num_hidden_layers"])]


@pytest.mark.parametrize(("part", "block"), block_cases())
def test_every_block_moves_the_output(reference, inputs, output, monkeypatch, part, block):
    modules = reference.visual.blocks if part == "visual" else reference.decoder.layers

    def skip(hidden_states, **_):
        return (hidden_states,) if part == "decoder" and RELEASE < (5,) else hidden_states

    monkeypatch.setattr(modules[block], "forward", skip)
    assert distance(reference.run(**inputs).hidden_states[-1], output.hidden_states[-1]) > NOTICEABLE


@pytest.mark.slow
def test_every_bias_moves_the_output(reference, inputs, output):
    for name, parameter in reference.model.named_parameters():
        if not name.endswith(".bias"):
            continue
        kept = parameter.detach().clone()
        parameter.data.zero_()
        moved = distance(reference.run(**inputs).hidden_states[-1], output.hidden_states[-1])
        parameter.data.copy_(kept)
        assert moved > NOTICEABLE, name


@pytest.mark.slow
def test_a_deep_random_model_stays_sane(tmp_path, inputs):
    deep = write_checkpoint(
        tmp_path, text={"num_hidden_layers": 36}, vision={"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    )
    sdpa = TransformersReference.from_pretrained(deep).run(**inputs)
    eager = TransformersReference.from_pretrained(deep, attn_implementation="eager").run(**inputs)
    assert 0.5 < sdpa.hidden_states[-2].std() < 20
    assert 0.5 < sdpa.logits.std() < 5
    # Two ways of the same sum must agree much better than the 1e-5 that the package promises, or no test could.
    assert distance(eager.hidden_states[-1], sdpa.hidden_states[-1]) < 3e-6


# --- trained-like weights ---


@dataclass(frozen=True)
class Activations:
    """Of a sample with two images, in float32.

    Attributes:
        streams: Every block's output (T, width), by network.
        attention: Every attention's probabilities (heads, queries, keys), by network.
        hidden: Inputs of every MLP's last layer (T, width).
        sinks: Bool (T,), which of the decoder's tokens are <|im_start|>.
    """

    streams: dict[str, list[torch.Tensor]]
    attention: dict[str, list[torch.Tensor]]
    hidden: list[torch.Tensor]
    sinks: torch.Tensor


def activations_of(folder):
    reference = TransformersReference.from_pretrained(folder, attn_implementation="eager")
    inputs = reference.processor_inputs(frames(((140, 196), (84, 140))), TEXT)
    sinks = inputs["input_ids"][0] == reference.tokenizer.convert_tokens_to_ids("<|im_start|>")
    found = Activations({"visual": [], "decoder": []}, {"visual": [], "decoder": []}, [], sinks)
    for part, blocks in (("visual", reference.visual.blocks), ("decoder", reference.decoder.layers)):
        for block in blocks:
            block.register_forward_hook(
                lambda _, args, output, part=part: found.streams[part].append(
                    (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
                )
            )
            *_, last = (module for module in block.mlp.modules() if isinstance(module, nn.Linear))
            last.register_forward_pre_hook(lambda _, args: found.hidden.append(args[0].flatten(0, -2)))
    softmax = nn.functional.softmax

    def seen_softmax(scores, *args, **kwargs):
        probabilities = softmax(scores, *args, **kwargs)
        part = "visual" if len(found.streams["visual"]) < len(reference.visual.blocks) else "decoder"
        # The vision tower's are without a batch in early versions of transformers.
        found.attention[part].append(probabilities.flatten(0, -3))
        return probabilities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", seen_softmax)
        reference.run(**inputs)
    return found


SMALL = ["small", "qwen2-vl-small", "qwen3-vl-small"]
LOW = {"min_pixels": 56 * 56}  # the image config's, of every family


def skip_unless_readable(preset):
    architecture = FAMILIES[PRESETS[preset].family].architecture
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")


@pytest.fixture(scope="module", params=SMALL)
def activations(request, tmp_path_factory):
    skip_unless_readable(request.param)
    root = tmp_path_factory.mktemp("kinds")
    return {
        kind: activations_of(write_checkpoint(root / kind, request.param, weights=kind, image=LOW))
        for kind in testing.WEIGHTS
    }


def over_median(values):
    """Of each channel, the median token over the median of everything, largest first."""
    size = values.abs()
    return (size.median(dim=0).values / size.median()).sort(descending=True).values


def flatness(probabilities):
    """Entropy over that of a flat distribution: 0 for one token, 1 for all alike; queries of more than 8 keys."""
    flat = (probabilities > 0).sum(dim=-1).double().log()
    entropy = -(probabilities.double() * probabilities.double().clamp(min=1e-300).log()).sum(dim=-1)
    return (entropy / flat)[flat > math.log(8)].mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["visual", "decoder"])
def test_trained_like_streams_have_a_few_massive_channels(activations, part):
    for stream in activations["trained-like"].streams[part][WRITER:]:
        channels = over_median(stream)
        assert channels[2] > 1e2 and channels[0] < 1e3
        assert channels[3] < 10
        # On every token, and not on the median one alone.
        assert (stream[:, MASSIVE].abs().amin(dim=1).median() > 50 * stream.abs().median()).item()
    for stream in activations["random"].streams[part]:
        assert over_median(stream)[0] < 10


@pytest.mark.slow
@pytest.mark.parametrize("part", ["visual", "decoder"])
def test_trained_like_attention_is_peaked(activations, part):
    flat, peaked = ([flatness(p) for p in activations[kind].attention[part]] for kind in ("random", "trained-like"))
    assert len(flat) == len(peaked) > 0
    assert sum(flat) / len(flat) > 0.7
    assert sum(peaked) / len(peaked) < 0.6
    top = [p.amax(dim=-1).mean().item() for p in activations["trained-like"].attention[part]]
    assert 0.3 < sum(top) / len(top) < 0.9  # and is no lookup of one token


def test_trained_like_decoders_have_an_attention_sink(activations):
    def share(kind):  # of what image tokens look at, after the block that makes the sink
        found = activations[kind]
        return torch.stack([p[:, 20:60, found.sinks].sum(-1).mean() for p in found.attention["decoder"][1:]]).mean()

    assert share("random") < 0.15
    assert share("trained-like") > 0.3


def test_trained_like_mlps_have_outliers(activations):
    outlier = {
        kind: max((h.abs().max() / h.abs().median()).item() for h in found.hidden)
        for kind, found in activations.items()
    }
    assert outlier["trained-like"] > 10 * outlier["random"]


@pytest.mark.parametrize(("preset", "more"), list(zip(SMALL, (0, 0, 3 + 2 * 4), strict=True)))
def test_trained_like_norms_differ_and_keep_to_one_sign(tmp_path, preset, more):
    """`more`: norms of deep features, and of the heads of queries and keys."""
    prefix = "model.language_model." if preset.startswith("qwen3") else "model."
    weights = stored_tensors(write_checkpoint(tmp_path, preset, weights="trained-like"))
    norms = {name: x for name, x in weights.items() if ("norm" in name or "ln_q" in name) and name.endswith("weight")}
    assert len(norms) == 2 * 6 + 1 + 2 * 4 + 1 + more
    for name, tensor in norms.items():
        assert tensor.min() > 0, name
        assert tensor[5:].log().std() > 0.4, name
    deep = norms[f"{prefix}layers.3.input_layernorm.weight"]
    assert deep[MASSIVE].max() < 0.1 * deep[5:].median()


def test_trained_like_mergers_of_deep_features_level_the_massive_channels_of_every_patch(tmp_path):
    weights = stored_tensors(write_checkpoint(tmp_path, "qwen3-vl-small", weights="trained-like"))
    for index in range(3):
        for patch in weights[f"model.visual.deepstack_merger_list.{index}.norm.weight"].chunk(4):
            assert patch[MASSIVE].max() < 0.1 * patch[5:].median()


def test_trained_like_weights_are_the_same_in_every_layout(tmp_path):
    plain = stored_tensors(write_checkpoint(tmp_path / "plain", weights="trained-like"))
    nested = stored_tensors(
        write_checkpoint(tmp_path / "nested", weights="trained-like", key_layout="nested", shards=2)
    )
    assert torch.equal(plain["visual.blocks.0.attn.qkv.bias"], nested["model.visual.blocks.0.attn.qkv.bias"])
    assert sum(tensor.double().sum() for tensor in plain.values()) == pytest.approx(
        sum(tensor.double().sum() for tensor in nested.values())
    )


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("tiny", "9cb8f0a759f3db4e85ed63f0c98e0b17367baf7912919698e1e4391ccba911e3"),
        ("small", "4fa303163c2b87d56a69fefb22f143dcc60020130abeba2357421e298ba467f6"),
    ],
)
def test_trained_like_weights_of_a_seed_are_what_they_were(tmp_path, preset, expected):
    """Logged deviations are of these."""
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(write_checkpoint(tmp_path, preset, weights="trained-like")).items()):
        digest.update(name.encode() + tensor.bfloat16().view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == expected


DEEP_VISION = {
    "small": {"fullatt_block_indexes": [7, 15, 23, 31]},
    "qwen3-vl-small": {"deepstack_visual_indexes": [5, 11, 17]},
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", SMALL)
def test_a_deep_trained_like_model_stays_sane(tmp_path, preset):
    """As deep as the 3B model and a quarter as wide: no stream grows without end, no rounding is amplified."""
    skip_unless_readable(preset)
    deep = write_checkpoint(
        tmp_path,
        preset,
        weights="trained-like",
        text={"num_hidden_layers": 36},
        vision={"depth": 32, **DEEP_VISION.get(preset, {})},
        image=LOW,
    )
    sdpa = TransformersReference.from_pretrained(deep)
    small = sdpa.processor_inputs(frames(((84, 84),)), TEXT)
    first = sdpa.run(**small)
    assert 0.2 < first.hidden_states[-1][..., 5:].std() < 5
    assert 0.5 < first.logits.std() < 5
    eager = TransformersReference.from_pretrained(deep, attn_implementation="eager").run(**small)
    assert distance(eager.hidden_states[-1], first.hidden_states[-1]) < 5e-6


# --- configs ---


def test_overridden_fields_reach_the_files(tmp_path):
    folder = write_checkpoint(
        tmp_path,
        text={"rope_theta": 5e5, "num_hidden_layers": 1},
        vision={"tokens_per_second": 4},
        image={"min_pixels": None, "size": {"shortest_edge": 3136, "longest_edge": 50176}},
        generation={"repetition_penalty": 1.05},
    )
    config, image = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json")
    assert config["rope_theta"] == 5e5
    assert config["vision_config"]["tokens_per_second"] == 4
    assert "min_pixels" not in image
    assert image["size"]["longest_edge"] == 50176
    assert read_json(folder / "generation_config.json")["repetition_penalty"] == 1.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; known: 3b, 7b, cosmos"),
        ({"weights": "trained"}, "unknown weights 'trained'; known: random, trained-like"),
        ({"key_layout": "old"}, "known: nested, published"),
        ({"config_layout": "old"}, "known: flat, nested"),
        ({"text": {"hiden_size": 1}}, "unknown text field 'hiden_size'; known: .*hidden_size"),
        ({"vision": {"window": 1}}, "unknown vision field 'window'; known: .*window_size"),
        ({"image": {"pixels": 1}}, "unknown image field 'pixels'; known: .*min_pixels"),
        ({"generation": {"beams": 1}}, "unknown generation field 'beams'; known: .*do_sample"),
        ({"dtype": torch.int8}, "floating dtype"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"special_token_start": 590}, "special_token_start .* expected 432 to 578 .* got 590"),
        ({"text": {"mrope_section": [1, 1, 1]}}, "mrope_section"),
        ({"text": {"num_key_value_heads": 3}}, "4 attention heads do not divide by 3"),
        ({"vision": {"num_heads": 3}}, "hidden_size 80 does not divide by its 3 heads"),
        ({"vision": {"out_hidden_size": 32}}, "out_hidden_size 32 must equal text hidden_size 64"),
    ],
)
def test_a_wrong_argument_raises_and_writes_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused(folder):
    with pytest.raises(ValueError, match="empty folder"):
        write_checkpoint(folder)


def test_default_checkpoint_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_checkpoint()
    assert folder.parent == tmp_path / "qwen_batched"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert default_checkpoint() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no unfinished folder stays behind"


# --- tokenizer ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Pick up the red block and place it on the blue plate.",
        "  leading, and  double  spaces \t tab ",
        "lines\n\n\n  and\r\nmore\n",
        "把红色的积木放在盘子上。机器人 ロボット 로봇",
        "🤖🦾👩‍🔬 café ελληνικά",
        "It's 2024: THEY'LL do x=3.14;\n\n\tdef f():\n        return {}",
    ],
)
def test_tokenizer_round_trips(reference, text):
    assert reference.tokenizer.decode(reference.tokenizer(text)["input_ids"]) == text


def test_merges_happen_in_words_and_across_spaces_and_newlines(reference):
    for text in ("robot", " robot", "\n\n", "    "):
        assert len(reference.tokenizer(text)["input_ids"]) < len(text), text
    assert reference.tokenizer("\n\n")["input_ids"] != 2 * reference.tokenizer("\n")["input_ids"]


def test_every_single_byte_is_a_token(folder):
    vocabulary = read_json(folder / "vocab.json")
    assert sorted(vocabulary[symbol] for symbol in pre_tokenizers.ByteLevel.alphabet()) == list(range(256))


@pytest.mark.parametrize("special_token_start", [432, 433, 500, 578])
def test_special_token_ids_equal_the_configs(tmp_path, special_token_start):
    folder = write_checkpoint(tmp_path, special_token_start=special_token_start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    start = special_token_start
    assert tokenizer.convert_tokens_to_ids(list(testing.ADDED_TOKENS)) == list(range(start, start + 22))
    assert [tokenizer(token)["input_ids"] for token in testing.ADDED_TOKENS] == [[start + i] for i in range(22)]
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config["video_token_id"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config["vision_start_token_id"] == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert config["vision_end_token_id"] == tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert config["eos_token_id"] == generation["eos_token_id"][0] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id == start
    assert tokenizer.decode([start + 2, start + 14], skip_special_tokens=True) == "<tool_call>"


@pytest.mark.slow
def test_large_presets_have_the_published_token_ids(tmp_path):
    narrow = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1}
    folder = write_checkpoint(tmp_path, "3b", text=narrow | {"num_hidden_layers": 1}, vision=vision)
    config = read_json(folder / "config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    assert tokenizer("<|im_start|><|file_sep|>")["input_ids"] == [151644, 151664]
    assert len(tokenizer) == 151665


def test_chat_template_gives_the_published_layout(reference):
    assert reference.prompt(2, TEXT) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        f"{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_other_templates(reference):
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert reference.prompt(2, "go", "plain") == f"go {image} {image}"
    assert reference.prompt(2, "{images}", "<{images}|{text}>") == f"<{image}{image}|{{images}}>"
    with pytest.raises(ValueError, match="expected 'chat', 'plain'"):
        reference.prompt(1, "go", "{text}")


# --- the reference ---


@pytest.mark.parametrize(
    "version", ["4.51.3", "4.52.4", "4.56.0", "4.57.6", "5.0.0", "5.2.9", "5.5.4", "5.17.0", "5.23.0"]
)
def test_right_versions_are_accepted(version):
    check_reference_version(version)


@pytest.mark.parametrize("version", ["4.53.0", "4.54.1", "4.55.4", "5.3.0", "5.4.0.dev0", "5.5", "5.5.3"])
def test_wrong_versions_are_refused(version):
    with pytest.raises(RuntimeError, match=f"transformers {version} cannot be the reference"):
        check_reference_version(version)


def test_hidden_states_are_each_blocks_output_and_the_last_is_normed(reference, inputs, output):
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in reference.decoder.layers
    ]
    reference.run(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(output.hidden_states) == len(outputs) + 1
    for k, block_output in enumerate(outputs[:-1], start=1):
        assert torch.equal(output.hidden_states[k], block_output)
    with torch.no_grad():
        assert torch.equal(output.hidden_states[-1], reference.decoder.norm(outputs[-1]))
        assert torch.equal(output.logits, reference.model.lm_head(output.hidden_states[-1]))


def test_image_features_stand_at_the_image_tokens_in_raster_order(reference, inputs, output):
    assert [tuple(features.shape) for features in output.image_features] == [(9 * 11, 64), (5 * 5, 64)]
    is_image = inputs["input_ids"] == reference.model.config.image_token_id
    assert torch.equal(output.hidden_states[0][is_image], torch.cat(output.image_features))


def test_position_ids_follow_the_grids(reference, inputs, output):
    position_ids = output.position_ids[:, 0]
    start = int((inputs["input_ids"][0] == reference.model.config.image_token_id).nonzero()[0])
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(11), indexing="ij")
    expected = start + torch.stack([torch.zeros(99, dtype=torch.long), rows.flatten(), columns.flatten()])
    assert torch.equal(position_ids[:, start : start + 99], expected)
    assert position_ids[:, start + 99].tolist() == [start + 11] * 3


def test_vision_block_outputs_are_in_raster_order(reference, inputs, output):
    last = PRESETS["tiny"].vision["depth"] - 1
    for image, features in zip(
        reference.vision_block_outputs(inputs["pixel_values"], inputs["image_grid_thw"], [1, last])[1],
        output.image_features,
        strict=True,
    ):
        height, width, channels = image.shape
        blocks = image.view(height // 2, 2, width // 2, 2, channels).transpose(1, 2)
        with torch.no_grad():
            merged = reference.visual.merger(blocks.reshape(-1, channels))
        # Equal only if every patch is back at its place.
        torch.testing.assert_close(merged, features)


def test_greedy_continues_with_the_most_likely_token(reference, inputs):
    tokens = reference.greedy(inputs, max_new_tokens=4)
    input_ids = inputs["input_ids"]
    for token in tokens:
        assert reference.run(**inputs | {"input_ids": input_ids}).logits[0, -1].argmax() == token
        input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)
    assert len(tokens.unique()) > 1, "one token for ever would not test a cache"


def test_text_alone_runs_after_images(reference, inputs):
    text_only = reference.processor_inputs([], TEXT)
    first = reference.run(**text_only)
    reference.greedy(inputs, max_new_tokens=2)
    again = reference.run(**text_only)
    assert first.image_features == []
    assert torch.equal(first.hidden_states[-1], again.hidden_states[-1])
    length = text_only["input_ids"].shape[1]
    assert torch.equal(first.position_ids[:, 0], torch.arange(length).expand(3, -1))


def test_more_than_one_sample_is_refused(reference):
    with pytest.raises(ValueError, match="one sample at a time"):
        reference.run(torch.zeros(2, 3, dtype=torch.long))

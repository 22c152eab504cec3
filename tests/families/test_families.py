"""Families by their `model_type`, and the names that each layout of keys has for a parameter."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch

from qwen_batched import BatchedDecoder, BatchedVisionTransformer, BatchedVL, QwenBatchedVL
from qwen_batched.checkpoint.keys import KeyLayout
from qwen_batched.families import FAMILIES, family_of
from qwen_batched.testing import write_checkpoint

# Nested as published, with a prefix of an older release, and keys that are never used.
OTHER = KeyLayout(
    adapters=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    others=(("vision_tower.vision_model.", "visual."), ("language_model.model.", "model.")),
    saved=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    ignored=("vision_tower.vision_model.post_layernorm.",),
)
NAMES = ["visual.blocks.0.attn.qkv.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    "model_type", ["qwen2_5_vl_moe", "qwen3_vl_moe", "qwen3_5", "qwen4_exp", "cosmos3_vl", "", None, 3, ["qwen2_5_vl"]]
)
def test_an_unknown_family_is_refused_with_those_that_there_are(model_type):
    with pytest.raises(ValueError, match=r"model_type must be one of qwen2_5_vl, qwen2_vl, qwen3_vl, got "):
        family_of(model_type)


def test_a_family_builds_its_own_networks():
    family = family_of("qwen2_5_vl")
    sizes = {"vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 8}
    text = dataclasses.replace(family.config.text, num_attention_heads=1, num_key_value_heads=1, **sizes)
    vision = dataclasses.replace(family.config.vision, depth=1, hidden_size=16, num_heads=1, out_hidden_size=128)
    config = dataclasses.replace(family.config, vision=vision, text=text)
    assert type(family.build_vision(config)) is BatchedVisionTransformer
    assert type(family.build_decoder(config)) is BatchedDecoder


@pytest.mark.parametrize("keys", [*(family.keys for family in FAMILIES.values()), OTHER])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_leads_back_to_the_module(keys, name):
    assert keys.module_name(keys.adapter_name(name)) == name
    assert keys.module_name(keys.saved_name(name)) == name
    assert keys.module_name(name) == name


def test_layouts_name_parameters_as_transformers_does():
    assert OTHER.saved_name("visual.merger.ln_q.weight") == "model.visual.merger.ln_q.weight"
    assert OTHER.module_name("language_model.model.norm.weight") == "model.norm.weight"
    assert OTHER.module_name("vision_tower.vision_model.embeddings.x") == "visual.embeddings.x"
    qwen = FAMILIES["qwen2_5_vl"].keys
    assert qwen.saved_name("model.norm.weight") == "model.norm.weight"
    assert qwen.adapter_name("model.norm.weight") == "model.language_model.norm.weight"
    assert qwen.module_name("language_model.norm.weight") == "model.norm.weight"


def test_both_names_of_the_model_are_one_class():
    assert BatchedVL is QwenBatchedVL


def raw_config(preset):
    """config.json of a preset."""
    with tempfile.TemporaryDirectory() as folder:
        return json.loads((write_checkpoint(Path(folder) / "c", preset) / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("preset", "section", "field", "value", "message"),
    [
        ("qwen3-vl-tiny", "vision_config", "deepstack_visual_indexes", [1, 6], "must be below the depth 6, got 6"),
        ("qwen3-vl-tiny", "vision_config", "num_position_embeddings", 50, "must be a square and 0 leading tokens"),
        ("qwen3-vl-tiny", "text_config", "attention_bias", True, "attention_bias must be False, got True"),
        ("qwen3-vl-tiny", "text_config", "head_dim", 0, "explicit_head_dim must be like 128, got 0"),
        ("qwen2-vl-tiny", "vision_config", "embed_dim", "80", "hidden_size must be like 1280, got '80'"),
        ("qwen2-vl-tiny", "vision_config", "hidden_size", 80, "must be the decoder's hidden_size 64, got 80"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(preset, section, field, value, message):
    raw = raw_config(preset)
    raw[section][field] = value
    with pytest.raises(ValueError, match=message):
        family_of(raw["model_type"]).read_config(raw)


@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_the_networks_of_any_family_load_alone(preset, tmp_path):
    whole = BatchedVL.from_pretrained(write_checkpoint(tmp_path, preset), device="cpu")
    for kind, part in {BatchedVisionTransformer: whole.visual, BatchedDecoder: whole.model}.items():
        own = type("Own", (type(part),), {})  # a user's class stays what it is
        for asked, expected in ((kind, type(part)), (own, own)):
            found = asked.from_pretrained(tmp_path, device="cpu")
            stored, alone = part.state_dict(), found.state_dict()
            assert type(found) is expected
            assert stored.keys() == alone.keys() and all(torch.equal(alone[name], stored[name]) for name in stored)

"""`model.config` is read and assigned as transformers' is, and never says what is not so."""

import copy
import json
import pickle

import pytest
import torch
import transformers

from qwen_batched import QwenBatchedVL
from qwen_batched.training.model_config import ModelConfig

TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
TEXT += ("vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act")
TOP = ("model_type", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TOP += ("tie_word_embeddings", "architectures")
VISION = ("depth", "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size", "hidden_act")


@pytest.fixture(params=["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def loaded(request, sisters):
    return sisters(request.param)


def test_its_fields_are_those_of_transformers(loaded):
    theirs = transformers.AutoConfig.from_pretrained(loaded.folder)
    for ours in (loaded.model.config, ModelConfig.from_pretrained(loaded.folder)):
        assert [getattr(ours, name) for name in TOP] == [getattr(theirs, name) for name in TOP]
        for name in TEXT:
            expected = getattr(theirs.get_text_config(), name)
            assert getattr(ours, name) == getattr(ours.text_config, name) == expected, name
            assert getattr(ours.get_text_config(), name) == expected
        for name in VISION:
            assert getattr(ours.vision_config, name) == getattr(theirs.vision_config, name), name


def test_the_names_that_a_file_leaves_out_have_transformers_defaults(loaded):
    theirs, ours = transformers.AutoConfig.from_pretrained(loaded.folder), loaded.model.config
    for name in ("return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.use_return_dict and ours.use_cache and ours.pad_token_id is None
    assert not hasattr(ours, "quantization_config") and not hasattr(ours, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018
    assert ours.dtype == ours.torch_dtype == torch.float32


def test_dictionaries_and_json_are_of_all_fields(loaded):
    config = loaded.load().config
    config.my_field = 3
    for fields in (config.to_dict(), json.loads(config.to_json_string())):
        assert fields["text_config"]["hidden_size"] == config.text.hidden_size and fields["my_field"] == 3
        assert fields["vision_config"]["depth"] == config.vision.depth and fields["dtype"] == "float32"
    config.to_dict()["text_config"]["hidden_size"] = 1
    assert config.hidden_size == config.text.hidden_size
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and copied.text == config.text


@pytest.mark.parametrize("name", [*TEXT, "head_dim", "model_type", "image_token_id", "rope_theta"])
def test_what_modules_are_built_from_cannot_be_assigned_another_value(load, name):
    config = load().config
    before = getattr(config, name)
    setattr(config, name, before)
    with pytest.raises(ValueError, match=name):
        setattr(config, name, 7)
    if hasattr(config.text_config, name):
        with pytest.raises(ValueError, match=name):
            setattr(config.text_config, name, 7)
    assert getattr(config, name) == before
    with pytest.raises(ValueError, match="depth"):
        config.vision_config.depth = 1
    with pytest.raises(ValueError, match="text_config"):
        config.text_config = {}


def test_other_fields_can_be_assigned_and_are_saved(loaded, tmp_path):
    model = loaded.load()
    model.config.use_cache = False
    model.config.pad_token_id = 5
    model.config.my_field = {"scale": [1, 2]}
    model.config.update({"action_dim": 7})
    model.config.text_config.mine = "text"
    model.config.vision_config.mine = "vision"
    model.save_pretrained(tmp_path)
    for saved in (QwenBatchedVL.from_pretrained(tmp_path, device="cpu").config, loaded.reference and model.config):
        assert (saved.use_cache, saved.pad_token_id, saved.action_dim) == (False, 5, 7)
        assert saved.my_field == {"scale": [1, 2]} and saved.text_config.mine == "text"
        assert saved.vision_config.mine == "vision"
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.my_field == {"scale": [1, 2]} and theirs.action_dim == 7
    assert theirs.get_text_config().vocab_size == model.config.vocab_size


def test_what_json_cannot_hold_is_refused_at_saving(load, tmp_path):
    model = load()
    model.config.my_field = torch.zeros(2)
    with pytest.raises(ValueError, match="my_field"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.slow
def test_the_tie_is_followed_where_it_is_assigned(sisters):
    model = sisters("qwen2-vl-tiny").load()
    tied = model.config.tie_word_embeddings
    model.config.tie_word_embeddings = not tied
    assert model.config.shape.tie_word_embeddings is not tied


def test_it_says_how_many_blocks_were_kept(load):
    config = load(num_layers=2).config
    assert config.num_hidden_layers == config.text_config.num_hidden_layers == config.text.num_hidden_layers == 2


def test_new_text_fields_follow_the_modules(load):
    from dataclasses import replace

    config = load().config
    config.text = replace(config.text, vocab_size=1000)
    assert config.vocab_size == config.text_config.vocab_size == config.shape.text.vocab_size == 1000


def test_the_name_of_the_checkpoint_is_there(loaded):
    model = loaded.model
    assert model.name_or_path == model.config.name_or_path == model.config._name_or_path == str(loaded.folder)

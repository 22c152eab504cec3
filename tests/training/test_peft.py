"""peft's own calls on our model: the same layers, the same files and the same numbers as on transformers' model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.sisters import Sister
from tests.support import assert_equal_to, own_tokens, relative_error

peft = pytest.importorskip("peft")

TEXTS = ["Pick up the red block.", "Open the top drawer, then close it."]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "all-linear": {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    "a task of features": {"target_modules": DECODER, "task_type": "FEATURE_EXTRACTION"},
    "the tower": {"target_modules": ["qkv", "mlp.0"]},
    "a pattern": {"target_modules": r".*language_model.*\.q_proj"},
    "a pattern of what is not": {"target_modules": r"^(?!.*visual).*(q_proj|v_proj)$"},
    "paths": {"target_modules": ["model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.qkv"]},
    "DoRA": {"target_modules": ["q_proj", "qkv"], "use_dora": True},
    "rank-stabilised with biases": {"target_modules": ["v_proj", "qkv"], "use_rslora": True, "bias": "lora_only"},
    "all biases": {"target_modules": ["v_proj", "o_proj"], "bias": "all"},
    "whole modules": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["model.visual.merger", "model.language_model.norm"],
    },
    "the whole tower": {"target_modules": ["q_proj"], "modules_to_save": ["visual"]},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
    "some layers": {
        "target_modules": ["qkv", "q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["language_model.layers"],
    },
    "all but a pattern": {
        "target_modules": [*DECODER, "qkv"],
        "exclude_modules": r"model\.language_model\.layers\.0\..*",
    },
    "ranks by pattern": {
        "target_modules": DECODER,
        "rank_pattern": {r"model\.language_model\.layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 300]},
}
IN_ALL_FAMILIES = ("all-linear", "whole modules")
# The same in the published names, where it is spelled otherwise.
PUBLISHED = {
    "a pattern": {"target_modules": r"model\..*\.q_proj"},
    "paths": {"target_modules": ["model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["visual.merger", "model.norm"]},
    "some layers": KINDS["some layers"] | {"layers_pattern": "model.layers"},
    "all but a pattern": KINDS["all but a pattern"] | {"exclude_modules": r"model\.layers\.0\..*"},
    "ranks by pattern": KINDS["ranks by pattern"] | {"rank_pattern": {r"model\.layers\.1\.self_attn\.q_proj": 2}},
}


@pytest.fixture(scope="module", params=["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def family(request, tmp_path_factory):
    return Sister(request.param, tmp_path_factory.mktemp("family") / "checkpoint")


@pytest.fixture
def ours(family):
    return copy.deepcopy(family.model).requires_grad_(True)


@pytest.fixture
def theirs(family):
    return copy.deepcopy(family.reference)


def adapt(model, **settings):
    """peft's model with an adapter whose weights, and what else it trains, are far from where they began."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in adapted.named_parameters():
        torch.manual_seed(len(name))
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return adapted


def logits(family, model):
    """Of each sample's own tokens, back to back; `model` is ours or peft's."""
    frames = family.photos(2, 2, 2, 3).to(family.device)
    with torch.no_grad():
        out = model(frames, TEXTS, logits="all")
    return torch.cat([own_tokens(out.logits, out.attention_mask, sample) for sample in range(len(TEXTS))])


def their_logits(family, reference):
    frames = family.photos(2, 2, 2, 3)
    inputs = [reference.processor_inputs(list(own), text) for own, text in zip(frames, TEXTS, strict=True)]
    return torch.cat([reference.run(**sample).logits[0] for sample in inputs])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_by_pefts_own_calls_to_transformers_and_back(family, ours, theirs, tmp_path, kind):
    if family.preset != "tiny" and kind not in IN_ALL_FAMILIES:
        pytest.skip("one family stands for all")
    trained = adapt(theirs.model, **KINDS[kind])
    trained.save_pretrained(tmp_path / "theirs")
    adapted = adapt(ours, **KINDS[kind])
    adapted.save_pretrained(tmp_path / "ours")
    shapes = [
        {name: x.shape for name, x in load_file(tmp_path / side / "adapter_model.safetensors").items()}
        for side in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]

    expected = logits(family, adapted)
    assert relative_error(expected, logits(family, family.model)) > 0.02
    assert_equal_to(their_logits(family, theirs), expected)  # the same draws on the same layers
    other = copy.deepcopy(family.reference)
    peft.PeftModel.from_pretrained(other.model, tmp_path / "ours", torch_device=family.device)
    assert_equal_to(their_logits(family, other), expected)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(family.model), tmp_path / "theirs", torch_device=family.device
    )
    assert_equal_to(logits(family, loaded), expected)
    trained.merge_and_unload()  # which changes a tied head where it was the embedding's adapter
    assert_equal_to(logits(family, adapted.merge_and_unload()), their_logits(family, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_names_select_the_same_layers(family, ours, kind):
    if family.preset != "tiny":
        pytest.skip("the names are the same in all families")
    found = {name: x.shape for name, x in adapt(ours, **PUBLISHED[kind]).named_parameters() if x.requires_grad}
    nested = adapt(copy.deepcopy(family.model), **KINDS[kind])
    expected = {name: x.shape for name, x in nested.named_parameters() if x.requires_grad}
    assert found == expected


@pytest.mark.slow
def test_an_adapter_of_a_few_steps_is_the_same_in_transformers(family, ours, theirs, tmp_path):
    adapted = peft.get_peft_model(ours, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([x for x in adapted.parameters() if x.requires_grad], lr=0.02)
    frames = family.photos(2, 2, 2, 3).to(family.device)
    for _ in range(3):
        adapted(frames, TEXTS, targets=["left", "right"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(family, adapted)
    assert relative_error(expected, logits(family, family.model)) > 0.02
    adapted.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(theirs.model, tmp_path, torch_device=family.device)
    assert_equal_to(their_logits(family, theirs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_calls_of_every_form_reach_the_model_through_peft(family, ours, task):
    adapted = adapt(ours, target_modules=["q_proj", "qkv"], task_type=task)
    frames, mask = family.photos(2, 2, 2, 3).to(family.device), torch.tensor([[True, False], [True, True]])
    prepared = ours.processor(frames, TEXTS, camera_mask=mask)
    expected = ours(frames, TEXTS, mask).last_hidden_state
    for out in (
        adapted(frames, TEXTS, mask),
        adapted(frames, TEXTS, camera_mask=mask),
        adapted(images=frames, texts=TEXTS, camera_mask=mask),
        adapted(**prepared),
    ):
        assert_equal_to(out.last_hidden_state, expected)
    assert torch.equal(adapted(None, "a").last_hidden_state, ours(None, "a").last_hidden_state)
    found = adapted.generate(frames, TEXTS, max_new_tokens=2)
    assert found.texts == ours.generate(frames, TEXTS, max_new_tokens=2).texts
    with adapted.disable_adapter():
        assert_equal_to(logits(family, adapted), logits(family, family.model))


@pytest.mark.slow
def test_several_adapters_are_added_loaded_and_resumed_by_peft(family, ours, theirs, tmp_path):
    adapt(theirs.model, target_modules=r".*language_model.*\.down_proj").save_pretrained(tmp_path)
    second = their_logits(family, theirs)
    adapted = adapt(ours, target_modules=["q_proj"])
    first = logits(family, adapted)
    adapted.load_adapter(tmp_path, "second", torch_device=family.device)
    assert_equal_to(logits(family, adapted), first)
    adapted.set_adapter("second")
    assert_equal_to(logits(family, adapted), second)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".second." in name:
                parameter.zero_()
    assert_equal_to(logits(family, adapted), logits(family, family.model))
    adapted.load_adapter(tmp_path, "second", torch_device=family.device)  # as a Trainer that resumes
    assert_equal_to(logits(family, adapted), second)


@pytest.mark.slow
def test_names_and_keys_are_the_published_ones_without_adapters_and_copies_keep_theirs(family, ours):
    names, keys = [name for name, _ in ours.named_modules()], list(ours.state_dict())
    adapted = adapt(ours, target_modules=["q_proj", "qkv"])
    state = adapted.state_dict()
    own = {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in state if "lora_" not in key}
    assert own == set(keys)
    front = ("base_model.model.model.language_model.", "base_model.model.model.visual.")
    assert all(key.startswith(front) for key in state if "lora_" in key)
    assert copy.deepcopy(adapted).state_dict().keys() == state.keys()

    other = adapt(copy.deepcopy(family.model), target_modules=["q_proj", "qkv"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert all(map(torch.equal, other.state_dict().values(), state.values()))
    plain = adapted.unload()
    assert ([name for name, _ in plain.named_modules()], list(plain.state_dict())) == (names, keys)

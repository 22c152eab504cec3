"""LoRA by peft: adapters go from transformers to our model and back, and train the same in both."""

import copy
import json
import sys

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_batched.lora import load_adapter, save_adapter
from tests.support import assert_equal_to, own_tokens, photos, relative_error
from tests.training.gradients import assert_gradients_equal, photos_as_floats, probe_loss, reference_probe_loss

peft = pytest.importorskip("peft")

FRAMES = photos(2, 2, 56, 84)
TEXTS = ["Pick up the red block.", "Open the top drawer, then close it."]
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["qkv", "proj", "mlp.0", "mlp.2"]
# transformers' paths of the decoder and the tower
NESTED = Version(transformers.__version__) >= Version("4.52")
DECODER_PATH, VISION_PATH = ("model.language_model", "model.visual") if NESTED else ("model", "visual")
ADAPTERS = {
    "decoder": {"target_modules": DECODER, "task_type": "CAUSAL_LM"},
    "vision": {"target_modules": VISION},  # "proj" is the patch embedding's too
    "all": {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": rf"{DECODER_PATH}\.layers.*\.(q_proj|down_proj)|{VISION_PATH}\.blocks.*\.qkv",
        "rank_pattern": {rf"{DECODER_PATH}\.layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {rf"{VISION_PATH}\.blocks\.2\.attn\.qkv": 3, "down_proj": 5},
    },
    "dora": {"target_modules": ["q_proj", "qkv"], "use_dora": True},
    "rank-stabilised with biases": {"target_modules": ["v_proj", "qkv"], "use_rslora": True, "bias": "lora_only"},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["merger", "embed_tokens"]},
    "modules by their paths": {
        "target_modules": ["q_proj", "o_proj"],
        "modules_to_save": [f"{DECODER_PATH}.norm", f"{VISION_PATH}.merger.mlp.0"],
    },
    "all biases": {"target_modules": ["v_proj", "o_proj"], "bias": "all"},
}
# Enough to move hidden states by a tenth and more; much more, and rounding errors grow along the layers.
SCALE = 0.1


@pytest.fixture
def fresh(load, device):
    return load(device=device)


@pytest.fixture
def theirs(reference):
    """transformers' model, to be changed."""
    return copy.deepcopy(reference)


def adapt(model, **settings):
    """Puts an adapter with random weights on a model, and returns peft's."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=SCALE)
        elif parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return adapted


def hidden_states(model, device):
    """Of each sample's own tokens, back to back."""
    out = model(FRAMES.to(device), TEXTS)
    return torch.cat([own_tokens(out.last_hidden_state, out.attention_mask, sample) for sample in range(len(TEXTS))])


def their_hidden_states(reference):
    inputs = [reference.processor_inputs(list(frames), text) for frames, text in zip(FRAMES, TEXTS, strict=True)]
    return torch.cat([reference.run(**sample).hidden_states[-1][0] for sample in inputs])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_trained_in_transformers_gives_the_same_hidden_states(theirs, fresh, device, tmp_path, kind):
    without = their_hidden_states(theirs)
    adapt(theirs.model, **ADAPTERS[kind]).save_pretrained(tmp_path)
    expected = their_hidden_states(theirs)
    assert relative_error(expected, without) > SCALE
    adapted = load_adapter(fresh, tmp_path)
    assert_equal_to(hidden_states(adapted, device), expected)
    merged = adapted.merge_and_unload()
    assert merged is fresh
    assert_equal_to(hidden_states(merged, device), expected)


def test_an_adapter_by_the_names_before_transformers_4_52_gives_the_same_hidden_states(theirs, fresh, device, tmp_path):
    adapt(theirs.model, target_modules=["q_proj", "qkv"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {"model.visual.": "visual.", "model.language_model.": "model."}
    tensors = load_file(file)
    for new_front, old_front in old.items():
        tensors = {
            key.replace(f"base_model.model.{new_front}", f"base_model.model.{old_front}"): x
            for key, x in tensors.items()
        }
    assert not any("language_model" in key for key in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    assert_equal_to(hidden_states(load_adapter(fresh, tmp_path), device), their_hidden_states(theirs))


@pytest.mark.slow
def test_peft_itself_loads_an_adapter_whose_settings_name_no_paths(theirs, fresh, device, tmp_path):
    adapt(theirs.model, target_modules=DECODER + VISION).save_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path, torch_device=device)
    assert_equal_to(hidden_states(adapted, device), their_hidden_states(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "vision", "all"])
def test_trap27_gradients_of_an_adapter_equal_those_in_transformers(theirs, fresh, device, tmp_path, kind):
    trained = adapt(theirs.model, **ADAPTERS[kind])
    trained.save_pretrained(tmp_path)
    adapted = load_adapter(fresh, tmp_path, is_trainable=True)
    frames = photos_as_floats(FRAMES.to(device))
    ours = gradients_by_layer(probe_loss(adapted(frames, TEXTS, resize=None)), adapted)
    expected = gradients_by_layer(reference_probe_loss(theirs, frames, TEXTS), trained)
    assert len(ours) == 2 * len({name.partition(".lora_")[0] for name in ours})
    assert_gradients_equal(ours, expected)


def gradients_by_layer(loss, adapted):
    """Gradients of an adapter, by names without what transformers puts before them."""
    named = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in named)
    found = torch.autograd.grad(loss, list(named.values()))
    fronts = ("base_model.model.", "model.", "language_model.", "visual.")
    names = list(named)
    for front in fronts:
        names = [name.removeprefix(front) for name in names]
    return dict(zip(names, found, strict=True))


@pytest.mark.slow
def test_an_adapter_trained_here_acts_the_same_in_transformers_and_loaded_again(theirs, load, device, tmp_path):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(device=device), peft.LoraConfig(r=2, target_modules=DECODER + VISION))
    before = hidden_states(adapted, device)
    assert_equal_to(before, their_hidden_states(theirs))
    optimizer = torch.optim.Adam([x for x in adapted.parameters() if x.requires_grad], lr=0.02)
    for _ in range(3):
        hidden_states(adapted, device).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = hidden_states(adapted, device)
    assert relative_error(expected, before) > SCALE
    if NESTED:
        save_adapter(adapted, tmp_path)
    else:
        adapted.save_pretrained(tmp_path)
    assert_equal_to(hidden_states(load_adapter(load(device=device), tmp_path), device), expected)
    peft.PeftModel.from_pretrained(theirs.model, tmp_path, torch_device=device)
    assert_equal_to(their_hidden_states(theirs), expected)


@pytest.mark.parametrize("name", DECODER + VISION)
def test_trap27_lora_on_every_published_name_gets_gradients(load, device, name):
    adapted = adapt(load(device=device), target_modules=[name])
    hidden_states(adapted, device).square().mean().backward()
    trained = {key: parameter.grad for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in key for key in trained)
    for key, gradient in trained.items():
        assert gradient is not None and bool(gradient.isfinite().all()) and float(gradient.norm()) > 0, key


def test_other_methods_of_the_model_run_with_the_adapter(fresh, device):
    features = fresh.encode_images(FRAMES.to(device))
    adapted = adapt(fresh, target_modules=["qkv"])
    assert relative_error(adapted.encode_images(FRAMES.to(device)), features) > 0.01
    assert len(adapted.generate(FRAMES.to(device), TEXTS, max_new_tokens=2).texts) == len(TEXTS)
    with adapted.disable_adapter():
        assert_equal_to(adapted.encode_images(FRAMES.to(device)), features)


# --- a policy that contains the model ---


class Policy(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.action_head = nn.Linear(backbone.config.text.hidden_size, 7)

    def forward(self, images, texts):
        return self.action_head(self.backbone(images, texts).last_hidden_state[:, -1])


POLICIES = {
    "everywhere": {"target_modules": [*DECODER, "qkv"]},
    "by a pattern": {
        "target_modules": r"backbone\.model\.layers.*\.(q_proj|down_proj)|backbone\.visual.*\.qkv",
        "rank_pattern": {r"backbone\.model\.layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    },
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["backbone.visual.merger", "model.norm"]},
}


@pytest.mark.slow
@pytest.mark.skipif(not NESTED, reason="save_adapter writes the names of transformers 4.52 and later")
@pytest.mark.parametrize("kind", POLICIES)
def test_the_adapter_of_a_policy_is_saved_as_that_of_its_model(theirs, load, device, tmp_path, kind):
    policy = adapt(Policy(load(device=device)).to(device), **POLICIES[kind])
    policy.base_model.model.action_head.requires_grad_(True)  # the policy's own, and saved by whoever trains it
    expected = hidden_states(policy.base_model.model.backbone, device)
    assert relative_error(expected, hidden_states(load(device=device), device)) > 0.01
    save_adapter(policy, tmp_path)
    assert_equal_to(hidden_states(load_adapter(load(device=device), tmp_path), device), expected)
    peft.PeftModel.from_pretrained(theirs.model, tmp_path, torch_device=device)
    assert_equal_to(their_hidden_states(theirs), expected)


def test_what_an_adapter_of_the_model_cannot_hold_is_refused_by_name(load, tmp_path):
    outside = peft.LoraConfig(target_modules=["q_proj", "action_head"])
    with pytest.raises(ValueError, match=r"backbone.*outside.*action_head"):
        save_adapter(peft.get_peft_model(Policy(load()), outside), tmp_path / "a")
    saved = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["action_head"])
    with pytest.raises(ValueError, match=r"backbone.*outside.*action_head\.weight"):
        save_adapter(peft.get_peft_model(Policy(load()), saved), tmp_path / "a")
    adapted = adapt(load(), target_modules=["q_proj"])
    adapted.base_model.model.visual.merger.requires_grad_(True)
    with pytest.raises(ValueError, match=r"not in the adapter.*visual\.merger.*modules_to_save"):
        save_adapter(adapted, tmp_path / "a")
    with pytest.raises(ValueError, match="one QwenBatchedVL, got 0 in Sequential"):
        save_adapter(adapt(nn.Sequential(nn.Linear(2, 2)), target_modules=["0"]), tmp_path / "a")
    with pytest.raises(ValueError, match=r"must be LoRA, got .*IA3"):
        ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        save_adapter(peft.get_peft_model(load(), ia3), tmp_path / "a")
    with pytest.raises(ValueError, match=r"one of \['default'\], got 'other'"):
        save_adapter(adapt(load(), target_modules=["q_proj"]), tmp_path / "a", "other")
    with pytest.raises(TypeError, match="PeftModel, got QwenBatchedVL"):
        save_adapter(load(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_two_adapters_are_loaded_and_chosen_by_name(fresh, load, device, tmp_path):
    expected = {}
    for name, layer in (("one", "q_proj"), ("two", "down_proj")):
        adapted = adapt(load(device=device), target_modules=[layer])
        expected[name] = hidden_states(adapted, device)
        save_adapter(adapted, tmp_path / name)
    load_adapter(fresh, tmp_path / "one", "one")
    adapted = load_adapter(fresh, tmp_path / "two", "two")
    for name, hidden in expected.items():
        adapted.set_adapter(name)
        assert_equal_to(hidden_states(adapted, device), hidden)
    with pytest.raises(ValueError, match="new to the model"):
        load_adapter(fresh, tmp_path / "one", "one")


# --- bad input ---


def not_safetensors(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def not_lora(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))


def change_weights(change):
    def apply(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


A_KEY = f"base_model.model.{DECODER_PATH}.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "has no adapter_model.safetensors": not_safetensors,
    "must be LoRA, got": not_lora,
    r"layers of the model, got \['model.layers.9": change_weights(
        lambda tensors: {key.replace("layers.0", "layers.9"): x for key, x in tensors.items()}
    ),
    "layers of the model, got none": change_weights(lambda tensors: {"base_model.model.x": torch.zeros(1)}),
    "size mismatch": change_weights(lambda tensors: tensors | {A_KEY: torch.zeros(4, 7)}),
    "misses .*lora_A": change_weights(lambda tensors: {key: x for key, x in tensors.items() if key != A_KEY}),
    "unknown .*surprise": change_weights(
        lambda tensors: tensors | {A_KEY.replace("lora_A.weight", "surprise"): torch.zeros(1)}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_layers_as_they_were(theirs, load, tmp_path, message):
    model = load()
    expected = hidden_states(model, "cpu")
    adapt(theirs.model, target_modules=["q_proj"]).save_pretrained(tmp_path)
    BROKEN[message](tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(hidden_states(model, "cpu"), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["whole modules", "embeddings", "rank-stabilised with biases"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=str)
def test_an_error_on_the_way_leaves_the_model_as_it_was(theirs, load, tmp_path, monkeypatch, kind, error):
    from tests.fuzz.damaged_adapters import state_of  # which needs peft

    adapt(theirs.model, **ADAPTERS[kind]).save_pretrained(tmp_path)
    model = load()
    model.visual.merger.requires_grad_(False)
    before, expected = state_of(model), hidden_states(model, "cpu")
    put = peft.set_peft_model_state_dict

    def fails_with_values(adapted, *arguments):
        result = put(adapted, *arguments)
        if not next(adapted.parameters()).is_meta:
            raise error
        return result

    monkeypatch.setattr(peft, "set_peft_model_state_dict", fails_with_values)
    with pytest.raises(type(error)):
        load_adapter(model, tmp_path)
    assert state_of(model) == before
    assert torch.equal(hidden_states(model, "cpu"), expected)


@pytest.mark.slow
def test_damaged_adapters_are_refused_and_leave_the_model_as_it_was():
    from tests.fuzz.damaged_adapters import faults

    assert [(what, fault) for what, fault in faults(count=15, seed=7) if fault is not None] == []


@pytest.mark.parametrize("name", ["", "a.b", 7, None])
def test_a_bad_adapter_name_is_refused(load, tmp_path, name):
    model = load()
    with pytest.raises((TypeError, ValueError), match="adapter_name"):
        load_adapter(model, tmp_path, name)
    with pytest.raises(TypeError, match="QwenBatchedVL, got Linear"):
        load_adapter(nn.Linear(2, 2), tmp_path)


def test_a_model_with_an_adapter_inside_is_not_saved(fresh, tmp_path):
    """Its folder would have other names than any checkpoint."""
    adapt(fresh, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj.*merged or unloaded"):
        fresh.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_missing_adapter_is_refused(fresh, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_adapter(fresh, tmp_path / "nowhere")


def test_without_peft_the_error_names_the_extra(fresh, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # an import fails
    for call in (lambda: load_adapter(fresh, tmp_path), lambda: save_adapter(fresh, tmp_path)):
        with pytest.raises(ImportError, match=r"qwen_batched\[lora\]"):
            call()

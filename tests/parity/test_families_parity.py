"""Every output equals transformers' Qwen2-VL and Qwen3-VL, run one sample at a time on the same folder."""

from __future__ import annotations

import pytest
import torch

from qwen_batched import QwenBatchedVL
from qwen_batched.lora import load_adapter, save_adapter
from qwen_batched.transformers_reference import TransformersReference
from tests.parity.test_whole_model_parity import assert_equals_transformers, to
from tests.sisters import Sister
from tests.support import assert_equal_to, noise, relative_error

RAGGED = ["", "Pick up the red block.\n\nThen:\n  - open the drawer \n", "把红色的积木放在盘子上。", "🤖 naïve café 🦾"]
GRADIENT_TOLERANCE = 1e-4


# More cells than the tiny position table has rows, as many, and one; heights that are not widths.
@pytest.mark.parametrize("cells", [(1, 1), (1, 4), (2, 2), (3, 2), (5, 9), (13, 10)], ids=str)
def test_every_output_equals_transformers_at_every_size(family, cells):
    family.check(family.photos(1, 1, *cells), ["Pick up the red block."])


@pytest.mark.parametrize(("cameras", "cells"), [(2, (3, 2)), (3, (1, 3)), (8, (2, 2))])
def test_every_output_equals_transformers_for_every_number_of_cameras(family, cameras, cells):
    family.check(
        family.photos(3, cameras, *cells, seed=cameras), ["Pick up the red block.", "", "Open the top drawer."]
    )


def test_every_output_equals_transformers_on_noise(family):
    family.check(noise(2, 2, 5 * family.factor, 3 * family.factor), ["a", "the robot's arm"])


def test_every_output_equals_transformers_for_text_only(family):
    family.check(None, RAGGED)


def test_every_output_equals_transformers_for_cameras_of_mixed_sizes(family):
    images = [family.photos(2, 1, *cells, seed=index)[:, 0] for index, cells in enumerate([(4, 3), (2, 2), (1, 5)])]
    family.check(images, ["What is the robot doing?", "Describe."])


@pytest.mark.parametrize("template", ["chat", "plain", "{images}{text}", "What? {text}\nLook:{images}"])
def test_every_output_equals_transformers_for_ragged_texts_and_templates(family, template):
    family.check(family.photos(len(RAGGED), 2, 2, 3), RAGGED, template=template)


def test_greedy_tokens_equal_transformers(family):
    images, texts = family.photos(3, 2, 2, 3), ["a", "", "Pick up the red block."]
    for model in family.models.values():
        found = model.generate(to(images, family.device), texts, max_new_tokens=12)
        for i, text in enumerate(texts):
            inputs = family.reference.processor_inputs(list(images[i]), text)
            assert found.token_ids[i].tolist() == family.reference.greedy(inputs, 12).tolist()


def test_gradients_of_every_parameter_equal_transformers(family):
    model, reference = family.load(), TransformersReference.from_pretrained(family.folder, device=family.device)
    images, text = family.photos(1, 2, 2, 3), "Pick up the red block."
    model(to(images, family.device), [text]).last_hidden_state.square().mean().backward()
    inputs = reference._model_inputs(**reference.processor_inputs(list(images[0]), text))
    reference.model(**inputs, output_hidden_states=True).hidden_states[-1].square().mean().backward()
    keys = model.family.keys
    theirs = {keys.module_name(name): x for name, x in reference.model.named_parameters()}
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None
            continue
        checked += 1
        assert_equal_to(parameter.grad, theirs[name].grad, GRADIENT_TOLERANCE)
    assert checked > 50


@pytest.mark.parametrize("options", [{"key_layout": "nested", "config_layout": "nested"}, {"tied": False}], ids=str)
def test_other_layouts_of_a_checkpoint_give_the_same_or_load(family, tmp_path, options):
    other = Sister(family.preset, tmp_path / "other", family.device, **options)
    other.check(family.photos(2, 1, 2, 3), ["a", "Pick up the red block."])


def test_a_saved_checkpoint_is_transformers_and_ours(family, tmp_path):
    family.models["left"].save_pretrained(tmp_path / "saved")
    reference = TransformersReference.from_pretrained(tmp_path / "saved", device=family.device)
    model = QwenBatchedVL.from_pretrained(tmp_path / "saved", device=family.device)
    images = family.photos(2, 1, 2, 3)
    assert_equals_transformers({"left": model}, reference, images, ["a", "bc"], layers=family.layers)
    state = family.models["left"].state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("mixed", [False, True], ids=["one size", "mixed sizes"])
def test_deep_features_are_transformers(family, mixed):
    model, images = family.models["left"], family.photos(2, 2, 2, 3)
    images = [images[:, 0], images[:, 1, :, : family.factor]] if mixed else images
    mask = torch.tensor([[True, True], [False, True]])
    if model.config.vision.deepstack_visual_indexes is None:
        with pytest.raises(ValueError, match="deepstack needs a model with deep features"):
            model.encode_images(to(images, family.device), deepstack=True)
        return
    found = model.encode_images(to(images, family.device), camera_mask=mask, deepstack=True)
    merged = model.encode_images(to(images, family.device), camera_mask=mask)
    assert all(map(torch.equal, found.main, merged)) if mixed else torch.equal(found.main, merged)
    deep = []
    hook = family.reference.visual.register_forward_hook(lambda _, args, output: deep.append(output.deepstack_features))
    with hook:
        for i in range(2):
            for camera in range(2):
                frame = images[camera][i] if mixed else images[i, camera]
                family.reference.run(**family.reference.processor_inputs([frame], "a"))
    for level, ours in enumerate(found.deep):
        for i in range(2):
            for camera in range(2):
                of_camera = ours[camera][i] if mixed else ours[i, camera]
                if mask[i, camera]:
                    assert_equal_to(of_camera.flatten(0, 1), deep[2 * i + camera][level])
                else:
                    assert not of_camera.any()


def test_layers_and_deep_features_are_not_asked_for_at_once(family):
    with pytest.raises(ValueError, match="deepstack needs"):
        family.models["left"].encode_images(family.photos(1, 1, 2, 2), layers=[0], deepstack=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "all"])
def test_lora_goes_from_transformers_to_ours_and_back(family, tmp_path, kind):
    peft = pytest.importorskip("peft")
    targets = {"decoder": ["q_proj", "v_proj", "o_proj", "down_proj"], "all": "all-linear"}[kind]
    theirs = TransformersReference.from_pretrained(family.folder, device=family.device)
    settings = {"target_modules": targets, "exclude_modules": ["lm_head"] if kind == "all" else None}

    def adapt(model):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted

    def expected(reference):
        return reference.run(**inputs).hidden_states[-1][0]

    images, text = family.photos(1, 2, 2, 3), "Pick up the red block."
    inputs = theirs.processor_inputs(list(images[0]), text)
    without = expected(theirs)
    adapt(theirs.model).save_pretrained(tmp_path / "theirs")
    adapted = load_adapter(family.load(), tmp_path / "theirs")
    with torch.no_grad():
        ours = adapted(to(images, family.device), [text]).last_hidden_state[0]
    assert relative_error(ours, without) > 0.05
    assert_equal_to(ours, expected(theirs))
    save_adapter(adapted, tmp_path / "ours")
    again = TransformersReference.from_pretrained(family.folder, device=family.device)
    peft.PeftModel.from_pretrained(again.model, tmp_path / "ours", torch_device=family.device)
    assert_equal_to(expected(again), ours)

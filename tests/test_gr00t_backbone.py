"""The example of GR00T's backbone returns what that policy takes from transformers' model."""

import pytest
import torch
import transformers
from torch.nn.functional import pad

from qwen_batched.testing import write_checkpoint
from tests.processes import ROOT, run_python
from tests.support import assert_equal_to, photos

EXAMPLES = ROOT / "examples"
TEXTS = ["pick up the apple", "", "open the drawer, then close it"]

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Qwen3VLForConditionalGeneration"), reason="transformers has no Qwen3-VL"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cosmos") / "c", "qwen3-vl-tiny", image={"min_pixels": 32 * 32})


@pytest.fixture
def make_backbone(monkeypatch, folder, device):
    monkeypatch.syspath_prepend(EXAMPLES)
    from gr00t_backbone import Backbone

    return lambda **options: Backbone(folder, device=device, **options).eval()


def theirs(folder, device, frames, text, select_layer):
    """As the policy calls transformers: layers above are popped, and its last state is before the final norm."""
    from qwen_batched.transformers_reference import TransformersReference

    reference = TransformersReference.from_pretrained(folder, device=device)
    reference.decoder.layers = reference.decoder.layers[:select_layer]
    inputs = reference.processor_inputs(list(frames.flatten(0, 1)), text)
    seen = []
    with reference.decoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        reference.run(**inputs)
    return seen[0][0], inputs["input_ids"][0] == reference.model.config.image_token_id


@pytest.mark.slow
@pytest.mark.parametrize("select_layer", [2, 4])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@torch.no_grad()
def test_its_outputs_are_those_of_transformers(make_backbone, folder, device, select_layer, kind):
    frames = photos(3, 4, 64, 96).unflatten(1, (2, 2))
    given = frames if kind == torch.uint8 else frames.float() / 255
    found = make_backbone(select_layer=select_layer)(given.to(device), TEXTS)
    assert len(found["backbone_features"]) == 3
    for i, text in enumerate(TEXTS):
        expected, is_image = theirs(folder, device, frames[i], text, select_layer)
        own = found["backbone_attention_mask"][i]
        assert_equal_to(found["backbone_features"][i][own], expected)
        assert torch.equal(found["image_mask"][i], pad(is_image, (len(own) - len(is_image), 0)))


@torch.no_grad()
def test_a_missing_view_is_as_good_as_none(make_backbone, device):
    frames, mask = photos(1, 4, 64, 96).unflatten(1, (2, 2)), torch.tensor([[[True, False], [True, False]]])
    backbone = make_backbone(select_layer=4)
    found = backbone(frames.to(device), TEXTS[:1], view_mask=mask)
    expected = backbone(frames[:, :, :1].to(device), TEXTS[:1])
    own = found["backbone_attention_mask"][0]
    assert_equal_to(found["backbone_features"][0][own], expected["backbone_features"][0])


def test_only_what_is_tuned_gets_gradients(make_backbone, device):
    backbone = make_backbone(select_layer=2)
    backbone.set_trainable_parameters(tune_llm=True, tune_visual=False)
    found = backbone(photos(1, 2, 64, 64).unflatten(1, (2, 1)).to(device), ["go"])
    found["backbone_features"].square().mean().backward()
    assert all(x.grad is None for x in backbone.model.visual.parameters())
    trained = dict(backbone.model.model.named_parameters())
    assert [name for name, x in trained.items() if x.grad is None] == ["norm.weight"]


@pytest.mark.slow
def test_the_example_runs():
    done = run_python(EXAMPLES / "gr00t_backbone.py", "--calls", "2")
    assert done.returncode == 0, done.stderr
    assert "backbone_features" in done.stdout and "ms a call" in done.stdout

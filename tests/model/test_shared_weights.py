"""`from_transformers`: one set of parameters in two models."""

import shutil

import pytest
import torch
import transformers
from packaging.version import Version

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.sisters import FACTORS, skip_without
from tests.support import assert_equal_to, photos

IS_5 = Version(transformers.__version__).release >= (5,)
TEXTS = ["Pick up the red block.", "Go."]


class Both:
    """A checkpoint's model of transformers, and ours of its parameters."""

    def __init__(self, folder, preset, tied=None):
        skip_without(preset)
        self.folder = write_checkpoint(folder, preset, tied=tied, image={"min_pixels": FACTORS[preset] ** 2})
        self.reference = TransformersReference.from_pretrained(self.folder, device="cpu")
        self.theirs = self.reference.model.requires_grad_(True)
        self.frames = photos(2, 1, 2 * FACTORS[preset], 3 * FACTORS[preset])

    def share(self, model=None):
        return QwenBatchedVL.from_transformers(model or self.theirs, self.folder)

    def assert_same_logits(self, ours, theirs=None):
        for i, text in enumerate(TEXTS):
            inputs = self.reference.processor_inputs(list(self.frames[i]), text)
            if IS_5:
                inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.theirs.config.image_token_id).int()
            with torch.no_grad():
                expected = (theirs or self.theirs)(**inputs).logits[0, -1]
                found = ours(self.frames[i : i + 1], [text], logits="last").logits[0]
            assert_equal_to(found, expected)


@pytest.fixture(params=["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def both(request, tmp_path):
    return Both(tmp_path / "checkpoint", request.param)


def test_every_parameter_is_the_same_object_and_results_are_equal(both):
    ours = both.share()
    shared = {id(parameter) for parameter in both.theirs.parameters()}
    assert {id(parameter) for parameter in ours.parameters()} == shared
    both.assert_same_logits(ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "qwen2-vl-tiny", "qwen3-vl-tiny"])
def test_tied_and_untied_heads_stay_so(preset, tied, tmp_path):
    both = Both(tmp_path, preset, tied=tied)
    ours = both.share()
    assert ours.has_tied_head is ours.config.tie_word_embeddings is tied
    with torch.no_grad():
        both.theirs.get_input_embeddings().weight.mul_(0.5)
    both.assert_same_logits(ours)
    assert ("lm_head.weight" in ours.state_dict()) is not tied


def test_an_optimizer_step_on_either_is_seen_by_both(both):
    ours = both.share()
    before = both.theirs.get_input_embeddings().weight.detach().clone()
    for model in (both.theirs, ours):
        steps = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ours(both.frames, TEXTS, targets=["yes", "no"]).loss.backward()
        steps.step()
        steps.zero_grad()
        both.assert_same_logits(ours)
    assert not torch.equal(before, both.theirs.get_input_embeddings().weight)


def test_gradients_of_either_are_one(both):
    ours = both.share()
    ours(both.frames, TEXTS, targets=["yes", "no"]).loss.backward()
    own = both.theirs.get_input_embeddings().weight.grad
    assert own is ours.model.embed_tokens.weight.grad and bool((own != 0).any())


def test_moving_and_freezing_one_moves_and_freezes_the_other(both):
    ours = both.share()
    both.theirs.double().requires_grad_(False)
    assert ours.dtype is torch.float64 and not any(x.requires_grad for x in ours.parameters())
    assert not ours.training
    assert both.share(both.theirs.float().train()).training


def test_peft_models_are_shared_with_their_adapters(both):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "qkv", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(both.theirs, config).eval()
    ours = both.share(adapted)
    assert {id(x) for x in ours.parameters()} == {id(x) for x in adapted.parameters()}
    both.assert_same_logits(ours, adapted)
    with adapted.disable_adapter():
        both.assert_same_logits(ours, adapted)
    trained = [x for x in adapted.parameters() if x.requires_grad]
    steps = torch.optim.SGD(trained, lr=1.0)
    ours.train()(both.frames, TEXTS, targets=["yes", "no"]).loss.backward()
    assert all(x.grad is not None for x in trained)
    steps.step()
    ours.eval()
    both.assert_same_logits(ours, adapted)


class Processor(transformers.ProcessorMixin):
    """transformers' own need torchvision to be made, and only to be saved here."""

    def __init__(self, folder):
        self.folder = folder

    def save_pretrained(self, folder):
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder)


def test_a_processor_serves_in_place_of_a_folder_and_the_result_is_saved(both, tmp_path):
    ours = QwenBatchedVL.from_transformers(both.theirs, Processor(both.folder))
    both.assert_same_logits(ours)
    ours.save_pretrained(tmp_path / "saved")
    loaded = QwenBatchedVL.from_pretrained(tmp_path / "saved", device="cpu")
    assert all(map(torch.equal, loaded.parameters(), ours.parameters()))


def test_a_model_without_a_head_is_shared_without_one(both):
    if not hasattr(both.theirs.model, "visual"):
        pytest.skip("no such model before 4.52")
    ours = both.share(both.theirs.model)
    assert ours.lm_head is None
    frames = both.frames[:1]
    expected = both.share()(frames, TEXTS[:1]).last_hidden_state
    assert torch.equal(ours(frames, TEXTS[:1]).last_hidden_state, expected)


def test_what_cannot_be_shared_is_refused_by_name(both):
    with pytest.raises(TypeError, match="Linear"):
        QwenBatchedVL.from_transformers(torch.nn.Linear(2, 2), both.folder)
    with pytest.raises(TypeError, match="QwenBatchedVL"):
        QwenBatchedVL.from_transformers(both.share(), both.folder)
    with pytest.raises(TypeError, match="processor"):
        QwenBatchedVL.from_transformers(both.theirs, 3)
    layer = both.reference.decoder.layers[1]
    layer.self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="extra"):
        both.share()
    del layer.self_attn.extra
    layer.input_layernorm = torch.nn.Identity()
    with pytest.raises(ValueError, match="input_layernorm"):
        both.share()


def test_shared_parameters_are_not_resized(family):
    """transformers' model would not know of it."""
    theirs = TransformersReference.from_pretrained(family.folder, device=family.device).model
    model = QwenBatchedVL.from_transformers(theirs, family.folder)
    rows = len(theirs.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="resize that one"):
        model.resize_token_embeddings(rows + 64)
    assert len(theirs.get_input_embeddings().weight) == rows

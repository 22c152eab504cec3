"""A tied head and adapters (trap 34): whatever peft wraps, it acts as on transformers' model, where the head is a layer
of its own that shares the embedding's parameter."""

import copy
import io

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from qwen_batched import QwenBatchedVL
from qwen_batched.lora import load_adapter, save_adapter
from tests.support import assert_equal_to, relative_error

peft = pytest.importorskip("peft")

TEXT = "Pick up the red block. "
NESTED = Version(transformers.__version__) >= Version("4.52")
# One token of the text, one of the chat template, one of neither.
TOKENS = [40, 260, 599]
ADAPTERS = {
    "the embedding saved": {"modules_to_save": ["embed_tokens"]},
    "the head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "LoRA on the head, the embedding saved": {
        "target_modules": ["q_proj", "lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "some tokens": {"trainable_token_indices": TOKENS},
    "some tokens of the embedding by name": {"trainable_token_indices": {"embed_tokens": TOKENS}},
}
CAN_TIE = "ensure_weight_tying" in peft.LoraConfig.__dataclass_fields__
if CAN_TIE:
    ADAPTERS |= {
        "the embedding saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "the head saved, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        "LoRA on the embedding, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "LoRA on the head, tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
        "some tokens, tied": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
        "other tokens of the head": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS[:2]}},
    }
SCALE = 0.05


@pytest.fixture
def theirs(reference):
    """transformers' model, to be changed."""
    return copy.deepcopy(reference.model)


def adapt(model, settings):
    """Puts an adapter with random weights on a model."""
    settings = {"target_modules": ["q_proj"], **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters(), key=lambda item: item[0].split(".")[::-1]):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name.split("."))))
                parameter.add_(SCALE * noise.to(parameter.device))
    return adapted


class Inputs:
    """The same sample for our model and for transformers'."""

    def __init__(self, model):
        self.ids = model.processor(None, [TEXT])["input_ids"].to(model.device)

    def ours(self, model):
        out = model(None, [TEXT], logits="all")
        return out.last_hidden_state[0], out.logits[0]

    def theirs(self, model):
        out = model(input_ids=self.ids, output_hidden_states=True)
        return out.hidden_states[-1][0], out.logits[0]


@pytest.fixture
def inputs(model):
    return Inputs(model)


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal_to(mine, other)


def gradients(outputs, model):
    """Of what is trained, by the ends of names that both models have."""
    loss = sum(
        (output * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum()
        for output in outputs
    )
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name.split("layers.")[-1].split("model.")[-1]: x for name, x in zip(named, found, strict=True)}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_trap34_an_adapter_of_transformers_acts_the_same_loaded_here_and_merged(
    theirs, load, inputs, device, tmp_path, kind
):
    base = inputs.theirs(theirs)
    trained = adapt(theirs, ADAPTERS[kind])
    expected = inputs.theirs(trained)
    assert min(relative_error(x, y) for x, y in zip(expected, base, strict=True)) > 0.001
    trained.save_pretrained(tmp_path / "adapter")
    adapted = load_adapter(load(device=device), tmp_path / "adapter", is_trainable=True)
    assert_same(inputs.ours(adapted), expected)
    wanted = gradients(inputs.theirs(trained), trained)
    found = gradients(inputs.ours(adapted), adapted)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None and float(gradient.norm()) > 0:
            assert relative_error(found[name], gradient) < 1e-4, name
    with adapted.disable_adapter(), trained.disable_adapter():
        assert_same(inputs.ours(adapted), inputs.theirs(trained))
    for change in ("merge_adapter", "unmerge_adapter"):
        for each in (trained, adapted):
            getattr(each, change)()
        assert_same(inputs.ours(adapted), inputs.theirs(trained))
    merged, expected = adapted.merge_and_unload(), trained.merge_and_unload()
    assert merged.has_tied_head == (expected.lm_head.weight is expected.get_input_embeddings().weight)
    assert_same(inputs.ours(merged), inputs.theirs(expected))

    merged.save_pretrained(tmp_path / "merged")
    again = QwenBatchedVL.from_pretrained(tmp_path / "merged", device=device)
    assert again.has_tied_head == merged.has_tied_head
    assert_same(inputs.ours(again), inputs.ours(merged))
    read = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged").to(device).eval()
    assert_same(inputs.ours(merged), inputs.theirs(read))


@pytest.mark.skipif(not NESTED, reason="save_adapter writes the names of transformers 4.52 and later")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_trap34_an_adapter_trained_here_acts_the_same_in_transformers(theirs, load, inputs, device, tmp_path, kind):
    trained = adapt(load(device=device), ADAPTERS[kind])
    expected = inputs.ours(trained)
    save_adapter(trained, tmp_path)
    assert_same(inputs.ours(load_adapter(load(device=device), tmp_path)), expected)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path, torch_device=device).eval()
    assert_same(expected, inputs.theirs(read))


def test_generation_with_an_adapter_around_the_embedding_goes_by_the_forward_pass(load, device):
    adapted = adapt(load(device=device), ADAPTERS["the embedding saved"])
    tokens = adapted.generate(None, [TEXT], max_new_tokens=3).token_ids[0]
    assert int(tokens[0]) == int(adapted(None, [TEXT], logits="last").logits.argmax())


# --- one parameter, one key ---


def test_a_tied_head_has_no_key_and_is_one_parameter(model):
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(key.startswith("lm_head") for key in model.state_dict())
    assert sum(x is model.lm_head.weight for x in model.parameters()) == 1
    policy = nn.Module()
    policy.backbone = model
    assert policy.state_dict().keys() == {f"backbone.{key}" for key in model.state_dict()}


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(model):
    return copy.deepcopy(model).to("meta").to_empty(device="cpu")


def swapped(model):
    model = copy.deepcopy(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def loaded(assign):
    def load_state(model):
        other = copy.deepcopy(model)
        state = {key: value.clone() + 1 for key, value in model.state_dict().items()}
        assert other.load_state_dict(state, assign=assign).missing_keys == []
        assert torch.equal(other.lm_head.weight, model.lm_head.weight + 1)
        return other

    return load_state


@pytest.mark.parametrize(
    "change",
    [
        *(copy.deepcopy, pickled, emptied, swapped, lambda model: copy.deepcopy(model).double()),
        *(loaded(False), loaded(True)),
    ],
    ids=["deepcopy", "pickle", "to_empty", "swap", "double", "load_state_dict", "load_state_dict(assign)"],
)
def test_a_tied_head_stays_tied(load, change):
    model = load()
    changed = change(model)
    assert changed.lm_head.weight is changed.model.embed_tokens.weight
    assert changed.lm_head.weight is not model.lm_head.weight
    assert changed.lm_head.weight.requires_grad


def test_a_state_dict_with_the_head_in_it_loads_where_it_equals_the_embedding(load):
    model = load()
    state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
    assert load().load_state_dict(state).unexpected_keys == []
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"tied.*lm_head\.weight differs"):
        model.load_state_dict(state)


def test_without_its_head_a_tied_model_takes_adapters_of_the_embedding(load, checkpoint, inputs, device, tmp_path):
    save_adapter(adapt(load(device=device), ADAPTERS["some tokens"]), tmp_path)
    whole = load_adapter(load(device=device), tmp_path)
    headless = load_adapter(load(device=device, lm_head=False), tmp_path)
    assert_equal_to(headless(None, [TEXT]).last_hidden_state, whole(None, [TEXT]).last_hidden_state)
    save_adapter(adapt(load(device=device), ADAPTERS["the head saved"]), tmp_path / "head")
    with pytest.raises(ValueError, match="lm_head"):
        load_adapter(load(device=device, lm_head=False), tmp_path / "head")

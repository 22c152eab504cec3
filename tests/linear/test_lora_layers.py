"""peft's LoRA layers run as few operations where they are nothing more, and as peft runs them where they are."""

import pytest
import torch
from torch import nn

from qwen_batched.linear.apply import apply_linear, resolve_linear
from qwen_batched.linear.lora import unwrap_lora
from tests.support import assert_equal_to, photos, relative_error

peft = pytest.importorskip("peft")

FRAMES, TEXTS = photos(2, 2, 56, 84), ["Pick up the red block.", "Open the drawer, then close it again."]
EVERY_LAYER = r".*(\.(q|k|v|o|gate|up|down)_proj|\.qkv|attn\.proj|merger\.mlp\.[02])"


@pytest.fixture
def calls_of_peft(monkeypatch):
    """The layers that peft's own code runs."""
    calls, forward = [], peft.tuners.lora.layer.Linear.forward
    monkeypatch.setattr(
        peft.tuners.lora.layer.Linear, "forward", lambda self, x: calls.append(self) or forward(self, x)
    )
    return calls


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1).to(parameter)
    return model


def adapted_layer(dim=12, width=7, bias=True, **settings):
    """A LoRA layer of peft's, with random weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(dim, width, bias=bias))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], **settings))
    return randomise(adapted).base_model.model[0]


def is_unwrapped(layer):
    inside, _ = unwrap_lora(layer)
    assert inside in (layer, layer.base_layer)
    return inside is layer.base_layer


def check_layer(layer, unwrapped):
    """It is or is not unwrapped, and gives what peft gives, its gradients too."""
    assert is_unwrapped(layer) == unwrapped
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3), requires_grad=True)
    results = []
    for run in (apply_linear, lambda layer, x: layer(x)):
        torch.manual_seed(1)  # dropout's
        out = run(layer, x)
        grads = torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True)
        results.append([out, *(torch.zeros(1) if grad is None else grad for grad in grads)])
    for ours, theirs in zip(*results, strict=True):
        assert_equal_to(ours, theirs)


# --- one layer ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_plain_lora_is_unwrapped(bias, settings):
    check_layer(adapted_layer(bias=bias, **settings), True)


def double_output(module, args, out):
    return 2 * out


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrise(layer):
    nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())


def triple_forward(layer):
    layer.forward = lambda x: 3 * peft.tuners.lora.layer.Linear.forward(layer, x)


# name: (settings, what is done to the layer)
MORE_THAN_LORA = {
    "dora": ({"use_dora": True}, lambda layer: None),
    "dropout": ({"lora_dropout": 0.5}, lambda layer: None),
    "a bias": ({"lora_bias": True}, lambda layer: None),
    "merged": ({}, lambda layer: layer.merge()),
    "hooked": ({}, lambda layer: layer.register_forward_hook(double_output)),
    "hooked inside": ({}, lambda layer: layer.lora_A["default"].register_forward_hook(double_output)),
    "another forward": ({}, triple_forward),
    "another kind of matrix": ({}, lambda layer: setattr(layer.lora_B["default"], "__class__", DoubledLinear)),
    "parametrised": ({}, parametrise),
}


@pytest.mark.parametrize("name", MORE_THAN_LORA)
def test_what_is_more_than_lora_runs_as_it_is(name):
    settings, change = MORE_THAN_LORA[name]
    layer = adapted_layer(**settings)
    change(layer)
    check_layer(layer, False)


def give_shape(name, *shape):
    return lambda layer: setattr(getattr(layer, name)["default"], "weight", nn.Parameter(torch.ones(shape)))


def give_a_tensor_for_a_bias(layer):
    del layer.base_layer.bias
    layer.base_layer.bias = torch.ones(7, requires_grad=True)


NOT_KNOWN = {
    "two dtypes": lambda layer: layer.lora_B["default"].bfloat16(),
    "narrow A": give_shape("lora_A", 3, 8),
    "narrow B": give_shape("lora_B", 5, 3),
    "wide B": give_shape("lora_B", 9, 3),
    "a trained scaling": lambda layer: layer.scaling.update(default=nn.Parameter(torch.tensor(2.0))),
    "a hooked dropout": lambda layer: layer.lora_dropout["default"].register_forward_hook(double_output),
    "a variant": lambda layer: layer.lora_variant.update(default=object()),
    "inputs as they come": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "a tensor for a bias": give_a_tensor_for_a_bias,
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_is_not_known_to_be_plain_is_left_to_peft(name):
    layer = adapted_layer()
    NOT_KNOWN[name](layer)
    assert unwrap_lora(layer) == (layer, ())


def test_dropout_is_nothing_in_evaluation():
    check_layer(adapted_layer(lora_dropout=0.5).eval(), True)


def test_a_hook_of_all_modules_is_called():
    layer, seen = adapted_layer(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        apply_linear(layer, torch.ones(2, 12))
    finally:
        hook.remove()
    assert layer in seen


def test_disabled_adapters_add_nothing():
    layer = adapted_layer()
    layer.enable_adapters(False)
    assert unwrap_lora(layer) == (layer.base_layer, ())
    check_layer(layer, True)


def test_a_merged_layer_with_its_adapters_disabled_is_peft_s_to_unmerge():
    layer = adapted_layer()
    expected = layer.base_layer(torch.ones(2, 12))
    layer.merge()
    layer.enable_adapters(False)
    assert_equal_to(apply_linear(layer, torch.ones(2, 12)), expected)


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"], ["second", "missing"]])
def test_active_adapters_are_added_and_no_others(active):
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 7))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0"]))
    adapted.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["0"]))
    adapted.add_adapter("missing", peft.LoraConfig(r=2, target_modules=["1"]))
    layer = randomise(adapted).base_model.model[0]
    layer._active_adapter = active
    check_layer(layer, True)
    assert len(unwrap_lora(layer)[1]) == len(set(active) - {"missing"})


def test_a_frozen_adapter_still_gives_the_input_its_gradient():
    layer = adapted_layer()
    layer.requires_grad_(False)
    check_layer(layer, True)


def test_a_base_layer_that_is_trained_gets_gradients():
    layer = adapted_layer()
    layer.base_layer.requires_grad_(True)
    check_layer(layer, True)


def test_a_layer_of_no_adapter_is_itself():
    for layer in (nn.Linear(3, 4), nn.Identity()):
        assert unwrap_lora(layer) == (layer, ())


# --- the whole model ---


def hidden_states(model, device):
    out = model(FRAMES.to(device), TEXTS)
    return out.last_hidden_state[out.attention_mask]


def step(adapted, device):
    """Hidden states, and the gradients of all that is trained."""
    hidden = hidden_states(adapted, device)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(hidden.square().mean(), list(trained.values()))
    return hidden, dict(zip(trained, gradients, strict=True))


def check_model(model, device, settings, calls_of_peft, expected_calls):
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    adapted = randomise(peft.get_peft_model(model, config))
    hidden, gradients = step(adapted, device)
    assert len(calls_of_peft) == expected_calls
    hooks = [
        module.register_forward_hook(lambda module, args, out: None)
        for module in adapted.modules()
        if isinstance(module, peft.tuners.lora.layer.Linear)
    ]
    expected, expected_gradients = step(adapted, device)
    assert len(calls_of_peft) - expected_calls == len(hooks) > 0
    assert_equal_to(hidden, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_equal_to(gradient, expected_gradients[name])
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": EVERY_LAYER}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["up_proj", "qkv"]}],
    ids=["every layer", "some of qkv", "up and vision"],
)
def test_a_model_runs_no_layer_of_peft_and_gives_what_peft_gives(load, always_packed, calls_of_peft, settings):
    merger = 2 if settings["target_modules"] == EVERY_LAYER else 0  # called as they are
    check_model(load(), "cpu", settings, calls_of_peft, merger)


@pytest.mark.gpu
def test_a_model_on_a_gpu_runs_no_layer_of_peft(load, calls_of_peft):
    check_model(load(device="cuda"), "cuda", {"target_modules": EVERY_LAYER}, calls_of_peft, 2)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_get_gradients(load, always_packed, calls_of_peft, bias):
    check_model(load(), "cpu", {"target_modules": ["q_proj", "up_proj", "qkv"], "bias": bias}, calls_of_peft, 0)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_with_more_than_lora_are_called(load, always_packed, calls_of_peft, settings):
    model = load()
    layers = len(model.model.layers)
    check_model(model, "cpu", {"target_modules": ["k_proj"], **settings}, calls_of_peft, layers)


def test_gradient_checkpointing_gives_the_same_gradients(load, always_packed):
    adapted = randomise(peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules=EVERY_LAYER)))
    _, expected = step(adapted, "cpu")
    adapted.gradient_checkpointing_enable()
    _, found = step(adapted, "cpu")
    for name, gradient in found.items():
        assert_equal_to(gradient, expected[name])


@pytest.mark.slow
def test_adapters_in_float32_beside_a_bfloat16_model(load, device):
    """As peft makes them; ours is as near to float32 as peft's own layers."""
    runs = {}
    for kind in ("exact", "ours", "peft"):
        model = load(device=device, dtype=torch.float32 if kind == "exact" else torch.bfloat16)
        adapted = randomise(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=EVERY_LAYER)))
        if kind == "peft":
            for module in adapted.modules():
                if isinstance(module, peft.tuners.lora.layer.Linear):
                    module.register_forward_hook(lambda module, args, out: None)
        runs[kind] = hidden_states(adapted, device).float()
    ours, theirs = (relative_error(runs[kind], runs["exact"]) for kind in ("ours", "peft"))
    assert ours <= 1.1 * theirs


@pytest.mark.slow
def test_adapters_that_come_and_go_are_followed(load, always_packed):
    """Merged, unmerged, disabled, changed by an optimiser, taken off."""
    model = load()
    without = hidden_states(model, "cpu")
    adapted = randomise(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=EVERY_LAYER)))
    with torch.no_grad():
        expected = hidden_states(adapted, "cpu")
        assert relative_error(expected, without) > 0.01
        adapted.merge_adapter()
        assert_equal_to(hidden_states(adapted, "cpu"), expected)
        adapted.unmerge_adapter()
        assert_equal_to(hidden_states(adapted, "cpu"), expected)
        with adapted.disable_adapter():
            assert_equal_to(hidden_states(adapted, "cpu"), without)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        assert relative_error(hidden_states(adapted, "cpu"), expected) > 0.01
        assert_equal_to(hidden_states(adapted.unload(), "cpu"), without)


def test_weights_that_fsdp_lends_are_not_joined_behind_a_lora_layer(load, always_packed):
    """Autograd would keep those of all blocks. `fully_shard` leaves such a hook on what it has sharded."""
    adapted = peft.get_peft_model(load(), peft.LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    attention = adapted.base_model.model.model.layers[0].self_attn
    linears = [resolve_linear(layer) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert attention._qkv._operands(attention, linears) is not None
    attention.q_proj.base_layer.register_load_state_dict_post_hook(lambda module, keys: None)
    assert attention._qkv._operands(attention, linears) is None

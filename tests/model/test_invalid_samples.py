"""A sick sample (trap 38): one whose logits are not finite ends at once, and its neighbours do not feel it."""

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_batched import QwenBatchedVL
from qwen_batched.generation import Sampling
from qwen_batched.testing import write_checkpoint
from tests.support import photos

TEXTS = ["Pick up the red block.", "Go.", "What is the robot doing in this picture?"]
NEW_TOKENS = 12
WAYS = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 0},
    "among few": {"temperature": 0.7, "top_k": 3, "seed": 1},
    "among the likeliest": {"temperature": 2.0, "top_p": 0.5, "seed": 2},
    "cold": {"temperature": 1e-30, "top_k": 2, "top_p": 1e-9, "seed": 3},
}


@pytest.fixture(scope="module")
def endless(tmp_path_factory, device):
    """A model that ends at no token."""
    return load(tmp_path_factory.mktemp("endless"), device, {"eos_token_id": None})


@pytest.fixture(scope="module")
def penalised(tmp_path_factory, device):
    return load(tmp_path_factory.mktemp("penalised"), device, {"eos_token_id": None, "repetition_penalty": 1.3})


def load(folder, device, generation):
    write_checkpoint(folder, image={"min_pixels": 28 * 28}, generation=generation)
    return QwenBatchedVL.from_pretrained(folder, device=device).requires_grad_(False)


@functools.cache
def frames():
    return photos(3, 1, 56, 84).float() / 255


def with_nan(*samples, value=float("nan")):
    sick = frames().clone()
    for sample in samples:
        sick[sample, 0, 1, 20, 30] = value
    return sick


def tokens(out):
    return [ids.tolist() for ids in out.token_ids]


def assert_neighbours_unmoved(model, images, sick, **options):
    """Generates with sick samples and without: the healthy ones' tokens are the same, seeded draws included."""
    expected = model.generate(frames().to(model.device), TEXTS, max_new_tokens=NEW_TOKENS, **options)
    calls = []
    out = model.generate(
        images.to(model.device), TEXTS, max_new_tokens=NEW_TOKENS, stream=calls.append, progress=True, **options
    )
    for sample in range(len(TEXTS)):
        if sample in sick:
            assert (tokens(out)[sample], out.texts[sample]) == ([], "")
            assert out.finish_reasons[sample] == "invalid"
            assert out.token_ids[sample].dtype == torch.int64
        else:
            assert tokens(out)[sample] == tokens(expected)[sample]
            assert out.texts[sample] == expected.texts[sample]
            assert out.finish_reasons[sample] == expected.finish_reasons[sample] == "length"
    assert ["".join(pieces) for pieces in zip(*calls, strict=True)] == out.texts
    # The next call is a good one, in the same process.
    again = model.generate(frames().to(model.device), TEXTS, max_new_tokens=NEW_TOKENS, **options)
    assert tokens(again) == tokens(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sick", [(1,), (0, 2), (0, 1, 2)], ids=str)
def test_trap38_a_sick_sample_ends_at_once_and_its_neighbours_do_not_feel_it(endless, way, sick):
    assert_neighbours_unmoved(endless, with_nan(*sick), sick, **WAYS[way])


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_trap38_infinite_pixels_are_as_sick(endless, value):
    assert_neighbours_unmoved(endless, with_nan(1, value=value), (1,), temperature=1.0, seed=0)


@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_trap38_with_a_repetition_penalty_too(penalised, way):
    assert_neighbours_unmoved(penalised, with_nan(0), (0,), **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_trap38_with_one_new_token(endless, way):
    out = endless.generate(with_nan(1).to(endless.device), TEXTS, max_new_tokens=1, **WAYS[way])
    assert out.finish_reasons == ["length", "invalid", "length"]
    assert [len(ids) for ids in tokens(out)] == [1, 0, 1]


def test_trap38_when_all_are_sick_nothing_more_is_run(endless):
    steps = []
    handle = endless.model.layers[0].register_forward_hook(lambda *_: steps.append(1))
    out = endless.generate(with_nan(0, 1, 2).to(endless.device), TEXTS, max_new_tokens=200)
    handle.remove()
    assert out.finish_reasons == ["invalid"] * 3
    assert len(steps) < 20


@pytest.mark.parametrize("way", ["greedy", "drawn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [1, 3])
def test_trap38_a_sample_that_falls_sick_later_keeps_its_tokens_till_then(endless, way, value, at):
    """As where half precision overflows on the way."""
    images = frames().to(endless.device)
    expected = endless.generate(images, TEXTS, max_new_tokens=NEW_TOKENS, **WAYS[way])
    calls = []

    def fall_sick(module, inputs, output):
        calls.append(1)
        if len(calls) == at + 1:
            output = output.clone()
            output[1, 7] = value
        return output

    handle = endless.lm_head.register_forward_hook(fall_sick)
    out = endless.generate(images, TEXTS, max_new_tokens=NEW_TOKENS, **WAYS[way])
    handle.remove()
    assert out.finish_reasons == ["length", "invalid", "length"]
    assert tokens(out) == [tokens(expected)[0], tokens(expected)[1][:at], tokens(expected)[2]]
    prompts = endless.processor.prompts
    assert out.texts == [prompts.decode(ids) for ids in tokens(out)]


@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_trap38_float16_that_overflows_says_so(tmp_path, device, way):
    model = load(tmp_path, device, {"eos_token_id": None})
    healthy = model.half().generate(frames().to(device), TEXTS, max_new_tokens=4, **WAYS[way])
    assert healthy.finish_reasons == ["length"] * 3
    model.model.norm.weight.mul_(6e4)
    model.lm_head.weight.mul_(100)
    out = model.generate(frames().to(device), TEXTS, max_new_tokens=4, **WAYS[way])
    assert out.finish_reasons == ["invalid"] * 3
    assert tokens(out) == [[], [], []]


# --- no index from a model's values ---

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@example(rows=[[float("nan")] * 4], temperature=1.0, top_k=2, top_p=0.5, uniform=0.999)
@example(rows=[[-float("inf")] * 4, [float("inf")] * 4], temperature=5e-324, top_k=0, top_p=1.0, uniform=0.0)
@given(
    rows=st.lists(st.lists(ANY_FLOAT, min_size=4, max_size=4), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 5e-324, 1e-30, 1.0, 1e300]),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([1e-300, 0.3, 1.0]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
)
def test_trap38_any_logits_give_a_token_of_the_vocabulary(device, rows, temperature, top_k, top_p, uniform):
    logits = torch.tensor(rows, device=device)
    uniform_B = None if temperature == 0 else torch.full((len(rows),), uniform, dtype=torch.float64, device=device)
    chosen = Sampling(temperature, top_k, top_p).choose(logits, uniform_B)
    assert bool(((chosen >= 0) & (chosen < 4)).all())
    for row, token in zip(rows, chosen.tolist(), strict=True):  # a row's token is that of the row alone
        first = None if uniform_B is None else uniform_B[:1]
        alone = Sampling(temperature, top_k, top_p).choose(torch.tensor([row], device=device), first)
        assert alone.tolist() == [token]

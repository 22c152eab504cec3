"""`generate(**batch)` with a batch of transformers' processor gives what transformers' `generate` gives."""

import pytest
import torch
import transformers

from qwen_batched.generation.arguments import read_arguments
from qwen_batched.generation.sampling import Sampling
from tests.conversations import transformers_batch
from tests.sisters import FACTORS, Sister

NEW = 10


@pytest.fixture(params=list(FACTORS), scope="module")
def sister(request, tmp_path_factory, device):
    return Sister(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint", device)


@pytest.fixture
def batch(sister):
    made = transformers_batch(sister.reference, sister.factor, [2, 0, 1], seed=21, side="left")
    return {name: x.to(sister.device) for name, x in made.items()}


@torch.no_grad()
def theirs(sister, batch, **options):
    return sister.reference.model.generate(**batch, **options)


# What evaluation harnesses pass.
HARNESS = {"num_beams": 1, "use_cache": True, "temperature": None, "top_p": None, "top_k": None, "do_sample": False}


@pytest.mark.parametrize("options", [{}, HARNESS, {"return_dict_in_generate": True}], ids=["bare", "harness", "dict"])
def test_greedy_tokens_equal_transformers(sister, batch, options):
    found = sister.model.generate(**batch, max_new_tokens=NEW, **options)
    want = theirs(sister, batch, max_new_tokens=NEW, **{"do_sample": False, **options})
    if "return_dict_in_generate" in options:
        found, want = found.sequences, want.sequences
    assert torch.equal(found, want)


def test_end_and_pad_tokens_equal_transformers(sister, batch):
    free = theirs(sister, batch, max_new_tokens=NEW, do_sample=False)
    length = batch["input_ids"].shape[1]
    ends = [int(free[0, length + 2]), int(free[1, length + 4])]
    for options in ({}, {"min_new_tokens": 6}, {"max_length": length + 4}):
        given = {"eos_token_id": ends, "pad_token_id": 7, "max_new_tokens": NEW, **options}
        if "max_length" in options:
            del given["max_new_tokens"]
        assert torch.equal(sister.model.generate(**batch, **given), theirs(sister, batch, do_sample=False, **given))


def test_right_padding_gives_each_sample_its_own_tokens(sister):
    """Where transformers gives garbage, each sample's tokens are those of it alone."""
    made = transformers_batch(sister.reference, sister.factor, [1, 0], seed=4, side="right")
    found = sister.model.generate(**made, max_new_tokens=4)
    left = transformers_batch(sister.reference, sister.factor, [1, 0], seed=4, side="left")
    assert torch.equal(found[:, -4:], sister.model.generate(**left, max_new_tokens=4)[:, -4:])


def test_a_generation_config_is_followed(sister, batch):
    own = transformers.GenerationConfig(max_new_tokens=3, repetition_penalty=1.7)
    found = sister.model.generate(**batch, generation_config=own)
    assert torch.equal(found, theirs(sister, batch, generation_config=own, do_sample=False))


def test_a_prepared_batch_gives_what_frames_and_texts_give(sister):
    images, texts = sister.photos(2, 1, 2, 2), ["a", "Pick up the red block."]
    prepared = sister.model.processor(images, texts, max_new_tokens=4, device=sister.device)
    found = sister.model.generate(**prepared, max_new_tokens=4)
    want = sister.model.generate(images, texts, max_new_tokens=4)
    assert found.texts == want.texts and found.finish_reasons == want.finish_reasons


def test_several_sequences_stand_sample_by_sample(sister, batch):
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "seed": 5}
    found = sister.model.generate(**batch, **options)
    assert found.shape == (9, batch["input_ids"].shape[1] + 4)
    assert torch.equal(found[:, :-4], batch["input_ids"].repeat_interleave(3, dim=0))


@pytest.mark.slow
def test_what_is_assigned_to_the_models_generation_config_is_followed_and_saved(sister, batch, tmp_path):
    model = sister.load()
    greedy = model.generate(**batch, max_new_tokens=3, do_sample=False)
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.max_new_tokens = 3
    assert model.generation_config.temperature == 5.0
    assert model.generate(**batch, seed=0).shape == greedy.shape
    model.generation_config.do_sample = False
    assert torch.equal(model.generate(**batch), greedy)
    model.generation_config.eos_token_id = 4
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", device=sister.device)
    assert again.generation_config.eos_token_ids == (4,) and again.generation_config.max_new_tokens == 3
    with pytest.raises(ValueError, match="num_beams"):
        model.generation_config.num_beams = 3
        model.generate(**batch)


def test_transformers_own_generation_config_may_take_the_models_place(sister, batch):
    model = sister.load()
    stored = transformers.GenerationConfig.from_pretrained(sister.folder)
    stored.max_new_tokens, stored.do_sample = 3, False
    want = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(**batch, generation_config=stored), want)
    model.generation_config = stored
    assert torch.equal(model.generate(**batch), want)
    own = transformers.GenerationConfig(min_new_tokens=2, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert model.generate(**batch, generation_config=own, seed=1).shape == (6, want.shape[1])
    with pytest.raises(TypeError, match="generation_config"):
        model.generate(**batch, generation_config={"max_new_tokens": 4})


def test_prompts_and_new_tokens_must_fit_the_model(sister, batch):
    with pytest.raises(ValueError, match="must fit into"):
        sister.model.generate(**batch, max_new_tokens=10**7)


# --- the arguments ---


def read(given, model, length=5):
    return read_arguments(given, model.generation_config, 0, length, None)


def test_drawn_tokens_follow_transformers_defaults(load):
    model = load()
    assert read({"do_sample": True}, model).sampling == Sampling(1.0, 50, 1.0)
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9}
    assert read(drawn, model).sampling == Sampling(0.5, 0, 0.9)
    assert read({}, model).sampling == read({"temperature": 0.5}, model).sampling == Sampling()
    assert read({}, model).max_new_tokens == 20 and read({"max_length": 9}, model).max_new_tokens == 4
    assert read({"max_length": 20}, model).max_new_tokens == 15


def test_the_checkpoint_says_whether_to_draw(load):
    model = load()
    model.generation_config.settings = {"do_sample": True, "temperature": 0.3, "top_k": 4, "eos_token_id": [1, 2]}
    assert read({}, model).sampling == Sampling(0.3, 4, 1.0)
    assert read({"do_sample": False}, model).sampling == Sampling()
    assert read({"temperature": 0.7}, model).sampling == Sampling(0.7, 4, 1.0)
    own = transformers.GenerationConfig(temperature=0.9)
    assert read({"generation_config": own}, model).sampling == Sampling(0.9, 4, 1.0)
    found = read({}, model)
    assert found.end_tokens == (1, 2) and found.pad_token_id == 1


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"generation_config": transformers.GenerationConfig(num_beams=2)},
        {"max_length": 5},
        {"num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.0},
        {"repetition_penalty": 0},
        {"eos_token_id": -2},
        {"output_scores": True},
        {"min_length": torch.tensor([1, 2])},
        {"streamer": "one"},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_is_not_supported_is_refused(load, given):
    with pytest.raises(ValueError):
        read(given, load())


def test_an_unknown_argument_is_refused_by_name(load):
    with pytest.raises(TypeError, match="nonsense"):
        read({"nonsense": 1}, load())


def transformers_probabilities(logits, sampling):
    """Of transformers' own logits processors, in the order in which its `generate` applies them."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{}, {"temperature": 0.6}, {"top_k": 5, "temperature": 1.7}, {"top_k": 0, "top_p": 0.8}]
)
def test_drawn_tokens_have_the_distribution_of_transformers(sister, batch, given):
    sampling = read({"do_sample": True, **given}, sister.model).sampling
    with torch.no_grad():
        logits = sister.model(**batch, logits_to_keep=1).logits[0].float().cpu() * 3
    points = 20001
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = sampling.choose(logits.expand(points, -1), uniform).bincount(minlength=logits.shape[-1]) / points
    want = transformers_probabilities(logits, sampling)[0]
    assert (drawn - want).abs().max() <= 2 / points
    assert not want[drawn == 0].gt(2 / points).any()

"""Generation: greedy tokens equal transformers', end tokens stop, draws follow the distribution."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched import QwenBatchedVL
from qwen_batched.generation import STEPS_PER_POLL, Sampling
from qwen_batched.generation.text_stream import TextStream
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.support import assert_equal_to, photos

MIN_PIXELS = 28 * 28
NEW_TOKENS = 24
TEXTS = ["Pick up the red block.", "", "把杯子放在桌子上。\n" * 6, "What is the robot doing in this picture?"]
NO_END = {"eos_token_id": None}


def write(folder, generation, **options):
    return write_checkpoint(folder / "checkpoint", image={"min_pixels": MIN_PIXELS}, generation=generation, **options)


@functools.cache
def frames():
    return photos(4, 2, 84, 140)


def greedy_by_transformers(reference, images, text, template="chat", new_tokens=NEW_TOKENS):
    inputs = reference.processor_inputs([] if images is None else list(images), text, template)
    return reference.greedy(inputs, new_tokens).tolist()


def tokens(out):
    return [ids.tolist() for ids in out.token_ids]


# --- greedy ---


@pytest.fixture(scope="module")
def expected(reference):
    """What transformers goes on with, by text: with two images, and without."""
    return {
        True: [greedy_by_transformers(reference, frames()[i], text) for i, text in enumerate(TEXTS)],
        False: [greedy_by_transformers(reference, None, text) for text in TEXTS],
    }


@pytest.mark.slow
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text only"])
def test_greedy_tokens_equal_transformers_in_a_ragged_batch(model, right_padded_model, expected, with_images):
    images = frames() if with_images else None
    for ours in (model, right_padded_model):
        out = ours.generate(images if images is None else images.to(ours.device), TEXTS, max_new_tokens=NEW_TOKENS)
        assert tokens(out) == expected[with_images]
    # A model that repeats one token for ever would hide an error.
    assert all(len(set(ids)) >= 2 for ids in expected[with_images])
    assert len(set().union(*expected[with_images])) >= 8
    assert len({tuple(ids) for ids in expected[with_images]}) == len(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text only"])
def test_greedy_tokens_of_a_sample_alone_are_those_in_the_batch(model, expected, with_images):
    for i, text in enumerate(TEXTS):
        images = frames()[[i]].to(model.device) if with_images else None
        assert tokens(model.generate(images, [text], max_new_tokens=NEW_TOKENS)) == [expected[with_images][i]]


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_with_masked_cameras(model, right_padded_model, reference):
    mask = torch.tensor([[True, False], [False, False], [False, True], [True, True]])
    expected = [greedy_by_transformers(reference, frames()[i, mask[i]], text) for i, text in enumerate(TEXTS)]
    for ours in (model, right_padded_model):
        out = ours.generate(frames().to(ours.device), TEXTS, max_new_tokens=NEW_TOKENS, camera_mask=mask)
        assert tokens(out) == expected


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_with_mixed_sizes_and_another_template(model, reference):
    images = [frames()[:, 0], frames()[:, 1, :, :56]]
    out = model.generate(
        [camera.to(model.device) for camera in images], TEXTS, max_new_tokens=NEW_TOKENS, template="{text} {images}"
    )
    for i, text in enumerate(TEXTS):
        own = [camera[i] for camera in images]
        inputs = reference.processor_inputs(own, text, "{text} {images}")
        assert tokens(out)[i] == reference.greedy(inputs, NEW_TOKENS).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_tokens_equal_transformers_with_a_repetition_penalty(tmp_path, device, penalty, expected):
    folder = write(tmp_path, {"repetition_penalty": penalty})
    reference = TransformersReference.from_pretrained(folder, device=device)
    theirs = [greedy_by_transformers(reference, frames()[i], text) for i, text in enumerate(TEXTS)]
    assert theirs != expected[True]
    for side in ("left", "right"):
        model = QwenBatchedVL.from_pretrained(folder, device=device, padding_side=side)
        out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
        assert tokens(out) == theirs


@pytest.mark.slow
def test_the_repetition_penalty_does_not_see_padding(tmp_path, device):
    # With these ids the padding token is the random model's favourite, and is no end token.
    folder = write(tmp_path, {"repetition_penalty": 1.3, "eos_token_id": 599}, special_token_start=498)
    reference = TransformersReference.from_pretrained(folder, device=device)
    theirs = [greedy_by_transformers(reference, frames()[i], text) for i, text in enumerate(TEXTS)]
    for side in ("left", "right"):
        model = QwenBatchedVL.from_pretrained(folder, device=device, padding_side=side)
        prompts = model.processor(frames(), TEXTS)
        padded = (~prompts["attention_mask"]).any(1).tolist()
        favourite = model.processor.prompts.pad_token_id
        assert any(favourite in ids for ids, is_padded in zip(theirs, padded, strict=True) if is_padded)
        out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
        assert tokens(out) == theirs


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_with_an_untied_head_and_grouped_heads(tmp_path, device):
    text = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
    folder = write(tmp_path, {}, tied=False, text=text)
    reference = TransformersReference.from_pretrained(folder, device=device)
    theirs = [greedy_by_transformers(reference, frames()[i], text) for i, text in enumerate(TEXTS)]
    out = QwenBatchedVL.from_pretrained(folder, device=device).generate(
        frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS
    )
    assert tokens(out) == theirs


def test_each_greedy_token_is_the_likeliest_of_the_whole_sequence_so_far(model):
    """The cache against no cache: the same prompt with the new tokens at its end."""
    out = model.generate(None, TEXTS, max_new_tokens=8)
    for text, ids in zip(TEXTS, tokens(out), strict=True):
        prompt = model.processor(None, [text], device=model.device)["input_ids"]
        whole = torch.cat((prompt, torch.tensor([ids], device=model.device)), dim=1)
        positions = torch.arange(whole.shape[1], device=model.device).expand(3, 1, -1)
        embeds = model.model.embed_tokens(whole)
        hidden = model.model(embeds, positions, torch.ones_like(whole, dtype=torch.bool))[0]
        likeliest = model.logits(hidden)[0, prompt.shape[1] - 1 : -1].argmax(-1)
        assert likeliest.tolist() == ids


# --- ends ---


def stop_tokens(expected):
    """A token that sample 0 first makes at some step and one that sample 3 does, and where each sample then ends."""
    ends = [
        next(t for step, t in enumerate(expected[i]) if step >= at and t not in expected[i][:step])
        for i, at in ((0, 3), (3, 6))
    ]
    cut = []
    for ids in expected:
        steps = [step for step, token in enumerate(ids) if token in ends]
        cut.append(ids[: steps[0] + 1] if steps else ids)
    return ends, cut


@pytest.mark.slow
def test_generation_stops_at_any_of_the_end_tokens_as_transformers_does(tmp_path, device, expected):
    ends, cut = stop_tokens(expected[True])
    lengths = {len(ids) for ids in cut}
    assert len(lengths) > 1, "the samples must end at different steps"
    folder = write(tmp_path, {"eos_token_id": ends})
    reference = TransformersReference.from_pretrained(folder, device=device)
    assert cut == [greedy_by_transformers(reference, frames()[i], text) for i, text in enumerate(TEXTS)]
    for side in ("left", "right"):
        model = QwenBatchedVL.from_pretrained(folder, device=device, padding_side=side)
        out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
        assert tokens(out) == cut
        assert out.finish_reasons == ["eos" if ids[-1] in ends else "length" for ids in cut]
        assert out.finish_reasons[0] == out.finish_reasons[3] == "eos"


@pytest.mark.slow
def test_each_end_token_alone_stops(tmp_path, device, expected):
    ends, _ = stop_tokens(expected[True])
    for index, end in enumerate(ends):
        folder = write(tmp_path / str(index), {"eos_token_id": end})  # one number, not a list
        model = QwenBatchedVL.from_pretrained(folder, device=device)
        out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
        for ids, reason, full in zip(tokens(out), out.finish_reasons, expected[True], strict=True):
            assert ids == (full[: full.index(end) + 1] if end in full else full)
            assert reason == ("eos" if end in full else "length")


@pytest.mark.slow
def test_generation_stops_early_once_every_sample_has_ended(tmp_path, device, expected):
    first = sorted({ids[0] for ids in expected[True]})
    model = QwenBatchedVL.from_pretrained(write(tmp_path, {"eos_token_id": first}), device=device)
    steps = []
    model.model.layers[0].register_forward_hook(lambda *_: steps.append(1))
    out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
    assert tokens(out) == [ids[:1] for ids in expected[True]]
    assert out.finish_reasons == ["eos"] * 4
    # A GPU is one stretch ahead of the host.
    assert len(steps) == (1 if device == "cpu" else 2 * STEPS_PER_POLL)


def test_an_end_token_as_the_last_allowed_token_is_an_end(tmp_path, device, expected):
    ends, _ = stop_tokens(expected[True])
    at = expected[True][0].index(ends[0])
    model = QwenBatchedVL.from_pretrained(write(tmp_path, {"eos_token_id": ends[0]}), device=device)
    images = frames()[:1].to(device)
    assert model.generate(images, TEXTS[:1], max_new_tokens=at + 1).finish_reasons == ["eos"]
    assert model.generate(images, TEXTS[:1], max_new_tokens=at).finish_reasons == ["length"]


@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_as_many_tokens_come_as_asked_for(model, expected, new_tokens):
    out = model.generate(frames().to(model.device), TEXTS, max_new_tokens=new_tokens)
    assert tokens(out) == [ids[:new_tokens] for ids in expected[True]]
    assert out.finish_reasons == ["length"] * 4


def test_texts_are_the_decoded_tokens_without_special_tokens(tmp_path, device):
    # With these ids, the random model's favourite tokens are special ones and added ones that are not special.
    folder = write(tmp_path, NO_END, special_token_start=480)
    model = QwenBatchedVL.from_pretrained(folder, device=device)
    out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS)
    tokenizer = model.processor.prompts.tokenizer
    special, added = set(tokenizer.all_special_ids), set(tokenizer.get_added_vocab().values())
    seen = set().union(*tokens(out))
    assert seen & special and seen & (added - special) and seen - added
    for text, ids in zip(out.texts, tokens(out), strict=True):
        assert text == tokenizer.decode([index for index in ids if index not in special])


# --- as it comes ---


@pytest.mark.parametrize("special_token_start", [480, None])
def test_streamed_pieces_are_the_texts(tmp_path, device, special_token_start):
    """With ids from 480 the random model's favourites are special tokens and halves of characters."""
    options = {} if special_token_start is None else {"special_token_start": special_token_start}
    model = QwenBatchedVL.from_pretrained(write(tmp_path, NO_END, **options), device=device)
    images = frames().to(device)
    expected = model.generate(images, TEXTS, max_new_tokens=NEW_TOKENS)
    calls = []
    out = model.generate(images, TEXTS, max_new_tokens=NEW_TOKENS, stream=calls.append)
    assert tokens(out) == tokens(expected)
    assert all(isinstance(pieces, list) and len(pieces) == len(TEXTS) for pieces in calls)
    assert ["".join(pieces) for pieces in zip(*calls, strict=True)] == out.texts == expected.texts
    assert len(calls) >= NEW_TOKENS / STEPS_PER_POLL, "text must come as it is made, not at the end"


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_streamed_pieces_of_any_tokens_are_their_text(model, data):
    prompts = model.processor.prompts
    ids = data.draw(st.lists(st.integers(0, len(prompts.tokenizer) - 1), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    stream, text = TextStream(prompts, 1), ""
    for start, stop in itertools.pairwise([0, *cuts, len(ids)]):
        text += stream.pieces([ids[start:stop]])[0]
    assert text + stream.rest()[0] == prompts.decode(ids)


def test_a_stream_gets_nothing_after_a_samples_end(tmp_path, device, expected):
    ends, cut = stop_tokens(expected[True])
    model = QwenBatchedVL.from_pretrained(write(tmp_path, {"eos_token_id": ends}), device=device)
    pieces = []
    out = model.generate(frames().to(device), TEXTS, max_new_tokens=NEW_TOKENS, stream=pieces.append)
    assert tokens(out) == cut
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == out.texts


def test_an_error_in_the_stream_reaches_the_caller_and_leaves_the_model_usable(model):
    def fails(pieces):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(None, ["a"], max_new_tokens=4, stream=fails)
    assert len(model.generate(None, ["a"], max_new_tokens=4).token_ids[0]) <= 4


def test_a_progress_bar_comes_on_request_only(model, capsys):
    model.generate(None, ["a"], max_new_tokens=3)
    assert capsys.readouterr().err == ""
    model.generate(None, ["a"], max_new_tokens=3, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.gpu
def test_tokens_are_looked_at_every_few_steps_and_never_waited_for(load):
    model = load(device="cuda").requires_grad_(False)
    model.generation_config = dataclasses.replace(model.generation_config, eos_token_ids=(10**6,))
    model.generate(None, ["a"], max_new_tokens=4 * STEPS_PER_POLL)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.generate(None, ["a"], max_new_tokens=4 * STEPS_PER_POLL)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- draws ---


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.4}], ids=str)
def test_every_number_below_1_draws_a_token_that_may_be_drawn(uniform, options):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 500:] = -torch.inf
    chosen = Sampling(temperature=0.7, **options).choose(logits, torch.full((64,), uniform, dtype=torch.float64))
    assert (chosen < 500).all()
    if uniform == 0:
        assert torch.equal(chosen, logits.argmax(-1))
    if options.get("top_k"):
        assert (logits.gather(1, chosen[:, None]) >= logits.topk(3).values[:, -1:]).all()


def test_top_k_1_a_tiny_top_p_and_a_tiny_temperature_equal_greedy(model, expected):
    images = frames().to(model.device)
    for options in ({"top_k": 1, "temperature": 1.0}, {"top_p": 1e-6, "temperature": 1.0}, {"temperature": 1e-4}):
        out = model.generate(images, TEXTS, max_new_tokens=NEW_TOKENS, seed=0, **options)
        assert tokens(out) == expected[True], options


@pytest.mark.slow
def test_a_seed_makes_draws_reproducible_and_another_one_others(model):
    images = frames().to(model.device)

    def draw(seed):
        return tokens(model.generate(images, TEXTS, max_new_tokens=16, temperature=1.5, seed=seed))

    first = draw(7)
    torch.rand(3)  # whoever else draws does not matter
    assert draw(7) == first
    assert draw(8) != first
    assert draw(None) != draw(None)


def test_more_tokens_asked_for_change_no_draw_of_the_first_ones(load):
    """On a GPU PyTorch lays numbers of another size out differently."""
    model = load(device="cpu")
    model.generation_config = dataclasses.replace(model.generation_config, eos_token_ids=())
    short, long = (
        tokens(model.generate(None, TEXTS, max_new_tokens=count, temperature=1.0, seed=1)) for count in (4, 9)
    )
    assert [ids[:4] for ids in long] == short


def test_a_samples_tokens_keep_no_neighbours_alive(model):
    out = model.generate(None, TEXTS, max_new_tokens=3)
    assert all(ids.untyped_storage().nbytes() == ids.numel() * 8 for ids in out.token_ids)


def test_a_stream_is_called_in_the_callers_grad_mode(model):
    modes = []
    model.generate(None, ["a"], max_new_tokens=3, stream=lambda pieces: modes.append(torch.is_grad_enabled()))
    assert modes and all(modes)


def test_a_seed_leaves_pytorchs_own_generator_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.generate(None, ["a"], max_new_tokens=3, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(4), expected)


DRAWS = 1500


def first_draws(model, **options):
    """How often each token came first in `DRAWS` independent draws, and the distribution of the logits."""
    out = model.generate(None, ["a"] * DRAWS, max_new_tokens=1, seed=1, template="plain", **options)
    counts = torch.bincount(torch.cat(out.token_ids).cpu(), minlength=model.config.text.vocab_size)
    logits = model(None, ["a"], template="plain", logits="last").logits[0].double().cpu()
    return counts.double(), logits


def assert_draws_follow(counts, probabilities):
    """Pearson's chi-square over tokens expected at least 5 times, the others in one bin.

    Its mean is the degrees of freedom f, its variance 2 f; six deviations above the mean is less likely than 1e-6, and
    the seed is fixed, so that the test either always passes or never.
    """
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    assert freedom >= 3, "too few bins to tell distributions apart"
    chi_square = float(((observed - expected)[kept].square() / expected[kept]).sum())
    assert chi_square <= freedom + 6 * (2 * freedom) ** 0.5, (chi_square, freedom)
    assert counts[probabilities == 0].sum() == 0


def nucleus(probabilities, p):
    """The fewest likeliest tokens whose probabilities reach p, one by one."""
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_logits_over_the_temperature(model, temperature):
    counts, logits = first_draws(model, temperature=temperature)
    assert_draws_follow(counts, (logits / temperature).softmax(0))


@pytest.mark.parametrize("k", [5, 20])
def test_draws_with_top_k_follow_the_k_likeliest(model, k):
    counts, logits = first_draws(model, temperature=1.0, top_k=k)
    kth = logits.sort(descending=True).values[k - 1]
    assert_draws_follow(counts, logits.masked_fill(logits < kth, -torch.inf).softmax(0))
    assert int((counts > 0).sum()) <= k


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
def test_draws_with_top_p_follow_the_nucleus(model, p):
    counts, logits = first_draws(model, temperature=1.0, top_p=p)
    assert_draws_follow(counts, nucleus(logits.softmax(0), p))


def test_top_k_comes_before_top_p_and_temperature_before_both(model):
    counts, logits = first_draws(model, temperature=0.7, top_k=20, top_p=0.8)
    scaled = logits / 0.7
    kth = scaled.sort(descending=True).values[19]
    assert_draws_follow(counts, nucleus(scaled.masked_fill(scaled < kth, -torch.inf).softmax(0), 0.8))


def test_the_chi_square_test_tells_a_wrong_distribution(model):
    counts, logits = first_draws(model, temperature=1.0)
    for wrong in (logits / 1.3, logits / 0.8, logits.roll(1)):
        with pytest.raises(AssertionError):
            assert_draws_follow(counts, wrong.softmax(0))


# --- refusals ---


@pytest.mark.slow
def test_prompt_and_new_tokens_may_fill_the_maximum_and_no_more(model):
    limit = model.config.text.max_position_embeddings
    text = "1" * (limit - 3)
    assert len(model.generate(None, [text], max_new_tokens=3, template="plain").token_ids[0]) == 3
    with pytest.raises(ValueError, match=str(limit)):
        model.generate(None, [text], max_new_tokens=4, template="plain")


def test_generation_leaves_the_model_as_it_was(load, device):
    model = load(device=device)
    before = model(frames().to(device), TEXTS).last_hidden_state.detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    out = model.generate(frames().to(device), TEXTS, max_new_tokens=2)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(ids.requires_grad for ids in out.token_ids)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_equal_to(model(frames().to(device), TEXTS).last_hidden_state.detach(), before)

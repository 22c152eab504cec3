"""What a generation may choose, how likely that was, and where a sample ends."""

import dataclasses

import pytest
import torch

from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.generation import Rules, Sampling, generate_texts
from qwen_batched.model.pipeline import Wanted
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.model.test_generation import MIN_PIXELS, TEXTS, assert_draws_follow, frames, tokens
from tests.support import assert_equal_to

STEPS = 12
ALLOWED = [3, 17, 29, 64, 128, 250, 251, 400]


def vocabulary(model):
    return model.config.text.vocab_size


def without_ends(model):
    model.generation_config = dataclasses.replace(model.generation_config, eos_token_ids=())
    return model


@pytest.fixture(scope="module")
def endless(load, device):
    """A model that has no end token. Read only."""
    return without_ends(load(device=device).requires_grad_(False))


def by_transformers(reference, text, images=None, **options):
    inputs = reference._model_inputs(**reference.processor_inputs([] if images is None else list(images), text))
    returned = {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    out = reference.model.generate(**inputs, max_new_tokens=STEPS, **returned, **options)
    scores = reference.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), scores[0]


# --- allowed_tokens, logprobs ---


@pytest.mark.slow
def test_allowed_tokens_and_logprobs_equal_transformers(model, reference):
    images = frames().to(model.device)
    for allowed in (None, ALLOWED, [ALLOWED[step % 3 :: 3] for step in range(STEPS)]):
        out = model.generate(images, TEXTS, max_new_tokens=STEPS, allowed_tokens=allowed, logprobs=True)
        for i, text in enumerate(TEXTS):
            options = {}
            if allowed is not None:
                prompt = reference.processor_inputs(list(frames()[i]), text)["input_ids"].shape[1]
                rows = allowed if isinstance(allowed[0], list) else [allowed] * STEPS
                options["prefix_allowed_tokens_fn"] = lambda _, ids, p=prompt, rows=rows: rows[len(ids) - p]
            expected, logprobs = by_transformers(reference, text, frames()[i], **options)
            assert tokens(out)[i] == expected
            assert out.logprobs[i].dtype == torch.float32 and out.logprobs[i].shape == out.token_ids[i].shape
            assert torch.allclose(out.logprobs[i], logprobs.float(), atol=1e-4)


@pytest.mark.slow
def test_logprobs_are_of_the_penalised_logits(tmp_path):
    from qwen_batched import QwenBatchedVL

    folder = write_checkpoint(
        tmp_path / "c", image={"min_pixels": MIN_PIXELS}, generation={"repetition_penalty": 1.3, "eos_token_id": None}
    )
    reference = TransformersReference.from_pretrained(folder)
    model = QwenBatchedVL.from_pretrained(folder, device="cpu")
    out = model.generate(None, TEXTS[:2], max_new_tokens=STEPS, allowed_tokens=ALLOWED, logprobs=True)
    for i in range(2):
        expected, logprobs = by_transformers(reference, TEXTS[i], prefix_allowed_tokens_fn=lambda *_: ALLOWED)
        assert tokens(out)[i] == expected
        assert torch.allclose(out.logprobs[i], logprobs.float(), atol=1e-4)


def test_all_forms_of_allowed_tokens_mean_the_same(endless):
    mask = torch.zeros(vocabulary(endless), dtype=torch.bool)
    mask[ALLOWED] = True
    forms = [ALLOWED, tuple(ALLOWED), mask, mask.to(endless.device), [ALLOWED] * 4, mask.repeat(4, 1)]
    results = [tokens(endless.generate(None, TEXTS, max_new_tokens=4, allowed_tokens=form)) for form in forms]
    assert all(result == results[0] for result in results)
    assert results[0] != tokens(endless.generate(None, TEXTS, max_new_tokens=4))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 3.0, "seed": 1}, {"temperature": 9.0, "seed": 2, "top_p": 0.9}]
)
def test_generation_never_leaves_the_allowed_tokens(endless, options):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 37):
        for count in (1, 5):
            rows = [torch.randperm(vocabulary(endless), generator=generator)[:size].tolist() for _ in range(count)]
            out = endless.generate(None, TEXTS, 5, allowed_tokens=rows[0] if count == 1 else rows, **options)
            for ids in tokens(out):
                assert len(ids) == 5
                assert all(token in rows[step % count] for step, token in enumerate(ids))


def test_an_end_token_ends_only_where_it_is_allowed(load):
    model = load()
    model.generation_config = dataclasses.replace(model.generation_config, eos_token_ids=(ALLOWED[0],))
    for rows, reason in ((ALLOWED[1:], "length"), (ALLOWED[:1], "eos")):
        out = model.generate(None, ["a"], max_new_tokens=3, allowed_tokens=rows)
        assert out.finish_reasons == [reason] and len(out.token_ids[0]) == (3 if reason == "length" else 1)


def test_draws_follow_the_softmax_over_the_allowed_tokens(endless):
    out = endless.generate(
        None, ["a"], max_new_tokens=1, temperature=2.0, seed=3, template="plain", allowed_tokens=ALLOWED,
        num_return_sequences=1500, logprobs=True,
    )  # fmt: skip
    logits = endless(None, ["a"], template="plain", logits="last").logits[0].double().cpu()
    masked = torch.full_like(logits, -torch.inf)
    masked[ALLOWED] = logits[ALLOWED]
    counts = torch.bincount(torch.cat(out.token_ids).cpu(), minlength=len(logits)).double()
    assert_draws_follow(counts, (masked / 2).softmax(0))
    chosen = torch.cat(out.token_ids).cpu()
    # Before the temperature.
    assert torch.allclose(torch.cat(out.logprobs).cpu().double(), masked.log_softmax(0)[chosen], atol=1e-4)


# --- num_return_sequences ---


def test_results_of_a_prompt_are_those_of_as_many_samples(endless):
    images, options = frames().to(endless.device)[:2], {"temperature": 1.5, "seed": 4, "max_new_tokens": 5}
    out = endless.generate(images, TEXTS[:2], num_return_sequences=3, logprobs=True, **options)
    repeated = images.repeat_interleave(3, dim=0)
    expected = endless.generate(repeated, [TEXTS[0]] * 3 + [TEXTS[1]] * 3, logprobs=True, **options)
    assert tokens(out) == tokens(expected) and out.texts == expected.texts
    assert len({tuple(ids) for ids in tokens(out)}) > 2
    assert_equal_to(torch.cat(out.logprobs), torch.cat(expected.logprobs))


def test_each_result_of_a_prompt_has_its_own_repetition_penalty(load):
    model = without_ends(load())
    model.generation_config = dataclasses.replace(model.generation_config, repetition_penalty=1.5)
    options = {"temperature": 1.5, "seed": 4, "max_new_tokens": 5}
    out = model.generate(None, TEXTS[:2], num_return_sequences=2, **options)
    expected = model.generate(None, [TEXTS[0]] * 2 + [TEXTS[1]] * 2, **options)
    assert tokens(out) == tokens(expected)


# --- stop ---


def stop_of(model, text, size):
    """Some characters that the model writes after `text`, but not first."""
    whole = model.generate(None, [text], max_new_tokens=STEPS).texts[0]
    return next(whole[i : i + size] for i in range(2, len(whole)) if "\ufffd" not in whole[i : i + size])


@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_ends_when_its_text_contains_a_stop_string(endless, size):
    stop = [stop_of(endless, TEXTS[0], size), "never comes"]
    prompts = endless.processor.prompts
    whole = endless.generate(None, TEXTS, max_new_tokens=STEPS)
    for given in (stop, tuple(stop), stop[0]):
        pieces = []
        out = endless.generate(None, TEXTS, max_new_tokens=STEPS, stop=given, stream=pieces.append)
        assert out.finish_reasons[0] == "stop"
        for i, ids in enumerate(tokens(whole)):
            count = next((n for n in range(len(ids) + 1) if stop[0] in prompts.decode(ids[:n])), None)
            assert out.finish_reasons[i] == ("length" if count is None else "stop")
            assert tokens(out)[i] == ids[:count]
            assert out.texts[i] == whole.texts[i].partition(stop[0])[0]
        assert ["".join(parts) for parts in zip(*pieces, strict=True)] == out.texts


def test_a_stream_shows_nothing_of_a_stop_string_and_all_of_what_only_began_as_one(endless):
    text = endless.generate(None, TEXTS[:1], max_new_tokens=STEPS).texts[0]
    began = text[-2:] + "\x00"
    pieces = []
    out = endless.generate(None, TEXTS[:1], max_new_tokens=STEPS, stop=began, stream=pieces.append)
    assert out.finish_reasons == ["length"] and "".join(part for (part,) in pieces) == out.texts[0] == text


def test_samples_that_stop_leave_the_others_alone(endless):
    stop = stop_of(endless, TEXTS[0], 2)
    out = endless.generate(None, TEXTS, max_new_tokens=STEPS, stop=stop, logprobs=True)
    assert [len(x) for x in out.logprobs] == [len(x) for x in out.token_ids]
    whole = tokens(endless.generate(None, TEXTS, max_new_tokens=STEPS))
    assert all(ids == full[: len(ids)] for ids, full in zip(tokens(out), whole, strict=True))


# --- for transformers' batches ---


def test_no_end_token_comes_before_min_new_tokens_as_in_transformers(model, reference):
    request = model.processor.request(None, TEXTS, device=model.device)
    free = tokens(model.generate(None, TEXTS, max_new_tokens=STEPS))
    ends = [free[0][0], free[1][1]]
    rules = Rules.read(vocabulary(model), GenerationConfig(), STEPS, Sampling(), end_tokens=ends, min_new_tokens=4)
    caller = model._caller(True)
    prefilled = model._calls.prefill(caller, request, Wanted((), "post", "last"))
    with model._calls.decoding(caller, prefilled, Sampling(), rules) as (decoding, run):
        out = generate_texts(decoding, run, model.processor.prompts, rules)
    for i, text in enumerate(TEXTS):
        expected, _ = by_transformers(reference, text, eos_token_id=ends, min_new_tokens=4)
        assert tokens(out)[i] == expected
        assert not set(tokens(out)[i][:4]) & set(ends)


# --- refusals ---


def bad_masks(size):
    nothing = torch.ones(3, size, dtype=torch.bool)
    nothing[1] = False
    return [torch.zeros(size, dtype=torch.bool), torch.ones(size), torch.ones(size - 1, dtype=torch.bool),
            torch.ones(2, size, dtype=torch.bool), nothing, torch.tensor([1, 2])]  # fmt: skip


def test_wrong_arguments_are_refused_before_any_work(model, monkeypatch):
    monkeypatch.setattr(type(model.processor), "request", lambda *_, **__: pytest.fail("worked"))
    size = vocabulary(model)
    values = [
        *(("allowed_tokens", value) for value in [[], [size], [-1], [1.5], [True], [[1]]]),
        *(("allowed_tokens", value) for value in [[[1], [], [2]], [[1], [size], [2]]]),
        *(("allowed_tokens", value) for value in [*bad_masks(size), [[[1]]] * 3]),
        *(("stop", value) for value in ["", [], ["a", ""], ["\ud800"]]),
        *(("num_return_sequences", value) for value in [0, -1, 1.5, True, 2]),
    ]  # fmt: skip
    for name, value in values:
        with pytest.raises(ValueError, match=r"allowed|stop|num_return"):
            model.generate(None, ["a"], max_new_tokens=3, **{name: value})
    wrong_types = {"allowed_tokens": [5, "a", {1}, [[1], 2, [3]]], "stop": [1, [1], b"a"], "logprobs": [1, None, "yes"]}
    for name, bad in wrong_types.items():
        for value in bad:
            with pytest.raises(TypeError, match=name):
                model.generate(None, ["a"], max_new_tokens=3, **{name: value})


def test_steps_that_may_only_end_too_early_are_refused():
    read = {"end_tokens": [2], "min_new_tokens": 2, "allowed_tokens": [[1, 2], [2], [2]]}
    with pytest.raises(ValueError, match="step 1"):
        Rules.read(4, GenerationConfig(), 3, Sampling(), **read)
    assert Rules.read(4, GenerationConfig(), 3, Sampling(), **{**read, "min_new_tokens": 1}).allowed.shape == (3, 4)

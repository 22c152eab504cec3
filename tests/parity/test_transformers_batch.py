"""A batch of transformers' processor: any turns, any number and sizes of images, either padding; as its model gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_batched.transformers_reference import TransformersReference
from tests.conversations import transformers_batch
from tests.sisters import FACTORS, Sister
from tests.support import assert_equal_to, relative_error

GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(params=list(FACTORS), scope="module")
def sister(request, tmp_path_factory, device):
    return Sister(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint", device)


def make(sister, counts, **options):
    return transformers_batch(sister.reference, sister.factor, counts, **options)


def theirs(reference, batch, **options):
    return reference.model(**{name: x.to(reference.device) for name, x in batch.items()}, use_cache=False, **options)


counts = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(counts=counts, seed=st.integers(0, 10**6), side=st.sampled_from(["left", "right"]), turns=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_every_output_equals_transformers(sister, counts, seed, side, turns):
    batch = make(sister, counts, seed=seed, side=side, turns=turns, labels=True)
    moved = {name: x.to(sister.device) for name, x in batch.items()}
    with torch.no_grad():
        out = sister.model(**moved, output_hidden_states=True)
        want = theirs(sister.reference, batch, output_hidden_states=True)
    assert_equal_to(out.loss, want.loss)
    assert len(out.hidden_states) == len(want.hidden_states) and isinstance(out.hidden_states, tuple)
    mask = batch["attention_mask"].bool()
    for ours, reference in zip((*out.hidden_states, out.logits), (*want.hidden_states, want.logits), strict=True):
        assert ours.shape == reference.shape
        assert_equal_to(ours[mask], reference[mask])
    assert out["loss"] is out[0] and out["logits"] is out[1]


def test_one_sample_of_five_images_equals_transformers(sister):
    batch = make(sister, [5, 0, 1], seed=3)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        out, want = sister.model(**batch), theirs(sister.reference, batch)
    assert_equal_to(out.logits[mask], want.logits[mask])
    assert len(out.image_features) == 6 and out.loss is None


def test_text_alone_equals_transformers(sister):
    batch = make(sister, [0, 0], seed=5, labels=True)
    with torch.no_grad():
        assert_equal_to(sister.model(**batch).loss, theirs(sister.reference, batch).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_every_parameter_equal_transformers(sister, side):
    model, reference = sister.load(), TransformersReference.from_pretrained(sister.folder, device=sister.device)
    batch = make(sister, [2, 0, 3], seed=11, side=side, labels=True)
    model(**batch).loss.backward()
    theirs(reference, batch).loss.backward()
    keys = model.family.keys
    want = {keys.module_name(name): x for name, x in reference.model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (want[name].grad is None), name
        if parameter.grad is not None and want[name].grad.norm() > 0:
            assert relative_error(parameter.grad, want[name].grad) <= GRADIENT_TOLERANCE, name


def test_gradients_reach_pixels(sister):
    batch = make(sister, [2, 1], seed=2, labels=True)
    ours, want = ({**batch, "pixel_values": batch["pixel_values"].clone().requires_grad_()} for _ in range(2))
    sister.model(**ours).loss.backward()
    theirs(sister.reference, want).loss.backward()
    assert relative_error(ours["pixel_values"].grad, want["pixel_values"].grad) <= GRADIENT_TOLERANCE


def test_the_loss_is_divided_by_the_number_of_items(sister):
    batch = make(sister, [1, 1], seed=4, labels=True)
    with torch.no_grad():
        want = theirs(sister.reference, batch, num_items_in_batch=97).loss
        assert_equal_to(sister.model(**batch, num_items_in_batch=97).loss, want)
        assert_equal_to(sister.model(**batch, num_items_in_batch=torch.tensor(97)).loss, want)


def test_logits_to_keep(sister):
    batch = make(sister, [1, 2], seed=6, side="left", labels=True)
    with torch.no_grad():
        whole, kept = sister.model(**batch), sister.model(**batch, logits_to_keep=2)
    assert_equal_to(kept.logits, whole.logits[:, -2:])
    assert_equal_to(kept.loss, whole.loss)


def test_positions_of_the_callers_own(sister):
    batch = make(sister, [1, 0], seed=7, side="left")
    mask = batch["attention_mask"].bool()
    text = mask.long().cumsum(1)[None].to(sister.device) - 1
    with torch.no_grad():
        out = sister.model(**batch)
        for given in (out.position_ids, torch.cat((text, out.position_ids))):
            assert_equal_to(sister.model(**batch, position_ids=given.clamp(min=0)).logits[mask], out.logits[mask])
        flat = text[0].clamp(min=0)
        want = theirs(sister.reference, batch, position_ids=flat.expand(3, -1, -1))
        assert_equal_to(sister.model(**batch, position_ids=flat).logits[mask], want.logits[mask])


def test_a_mask_with_holes_equals_transformers(sister):
    batch = make(sister, [1, 1], seed=8, side="right", turns=1)
    text = (batch["attention_mask"] == 1) & (batch["mm_token_type_ids"] == 0)
    batch["attention_mask"][0, text[0].nonzero()[1, 0]] = 0
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_equal_to(sister.model(**batch).logits[mask], theirs(sister.reference, batch).logits[mask])


def test_a_mask_of_floats_and_what_wrappers_pass(sister):
    batch = make(sister, [1, 0], seed=8)
    with torch.no_grad():
        want = sister.model(**batch).logits
        given = {**batch, "attention_mask": batch["attention_mask"].float(), "cache_position": torch.arange(3)}
        assert torch.equal(sister.model(**given, logits_to_keep=None, use_cache=True).logits, want)


def test_a_model_without_a_head_gives_hidden_states(sister):
    batch = make(sister, [1], seed=9)
    with torch.no_grad():
        out = sister.load(lm_head=False)(**batch)
        want = theirs(sister.reference, batch, output_hidden_states=True).hidden_states[-1]
    assert out.logits is None
    assert_equal_to(out.last_hidden_state, want)


# --- what is not one ---


def change(name, function):
    return lambda batch: {**batch, name: function(batch[name].clone())}


def put(x, index, value):
    x[index] = value
    return x


def cut(names):
    return lambda batch: {name: x[:1] if names is None or name in names else x for name, x in batch.items()}


def first_image_token(batch):
    return tuple((batch["mm_token_type_ids"] == 1).nonzero()[0].tolist())


def positions(function):
    """A batch with position ids, of a function of (B, S) from 0 on."""

    def add(batch):
        batch_size, length = batch["input_ids"].shape
        return {**batch, "position_ids": function(torch.arange(length).repeat(batch_size, 1))}

    return add


TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")
# By what only a look at values shows: on a GPU such a sample becomes NaN.
WRONG_VALUES = {
    "rows cut": cut(TEXT),
    "an image token less": lambda b: {**b, "input_ids": put(b["input_ids"].clone(), first_image_token(b), 5)},
    "an id beyond the embedding": change("input_ids", lambda x: put(x, (0, 2), 10**6)),
    "an id below 0": change("input_ids", lambda x: put(x, (0, 2), -1)),
    "no visible token": change("attention_mask", lambda x: put(x, 0, 0)),
    "half an image visible": lambda b: {
        **b, "attention_mask": put(b["attention_mask"].clone(), first_image_token(b), 0)
    },
    "packed sequences": positions(lambda x: put(x, (0, slice(7, None)), 0)),
    "packed sequences without a mask": lambda b: {
        **positions(lambda x: put(x, (0, slice(7, None)), 90).expand(4, -1, -1))(b), "attention_mask": None
    },
    "other token types": change("mm_token_type_ids", lambda x: put(x, 0, 1 - x[0])),
}  # fmt: skip
WRONG = {
    **WRONG_VALUES,
    "all tensors cut": cut(None),
    "an image less": change("image_grid_thw", lambda x: x[:-1]),
    "patches less": change("pixel_values", lambda x: x[:-4]),
    "patches of another width": change("pixel_values", lambda x: x[:, :-1]),
    "a grid in odd patches": change("image_grid_thw", lambda x: put(x, (0, 1), 3)),
    "a grid of two times": change("image_grid_thw", lambda x: put(x, (0, 0), 2)),
    "a label beyond the embedding": change("labels", lambda x: put(x, (0, 2), 10**6)),
    "labels of another shape": change("labels", lambda x: x[:, 1:]),
    "a mask of another shape": change("attention_mask", lambda x: x[:, 1:]),
    "a mask of four dimensions": change("attention_mask", lambda x: x[:, None, None]),
    "positions of another shape": positions(lambda x: x.expand(2, -1, -1)),
    "no grids": lambda b: {name: x for name, x in b.items() if name != "image_grid_thw"},
    "videos": lambda b: {**b, "pixel_values_videos": b["pixel_values"]},
    "embeddings": lambda b: {**b, "inputs_embeds": torch.zeros(1)},
    "a cache": lambda b: {**b, "past_key_values": object()},
    "attentions": lambda b: {**b, "output_attentions": True},
    "attentions by tensor": lambda b: {**b, "output_attentions": torch.tensor([True, False])},
    "no items": lambda b: {**b, "num_items_in_batch": 0},
    "several numbers of items": lambda b: {**b, "num_items_in_batch": torch.tensor([4, 4])},
    "texts too": lambda b: {**b, "texts": ["a"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_together_is_refused(sister, name):
    batch = make(sister, [2, 1], seed=1, side="right", labels=True)
    with pytest.raises(ValueError):
        sister.model(**WRONG[name](batch))


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_sample_that_only_the_device_can_see_to_be_wrong_becomes_nan(sister, name, monkeypatch):
    batch = make(sister, [2, 1], seed=1, side="right", labels=True)
    moved = {key: None if x is None else x.to(sister.device) for key, x in WRONG_VALUES[name](batch).items()}
    monkeypatch.setattr("qwen_batched.inputs.transformers_batch.can_read", lambda *_: False)
    with torch.no_grad():
        right = sister.model(**{key: x.to(sister.device) for key, x in batch.items()})
        assert right.loss.isfinite()
        assert_equal_to(right.loss, theirs(sister.reference, batch).loss)
        out = sister.model(**moved)
    assert out.loss.isnan() and out.logits[0].isnan().any()
    if name in ("an id beyond the embedding", "other token types", "no visible token"):
        mask = batch["attention_mask"][1].bool()  # its neighbour does not feel it
        assert_equal_to(out.logits[1][mask], right.logits[1][mask])


def test_an_unknown_argument_is_refused_by_name(sister):
    with pytest.raises(TypeError, match="something"):
        sister.model(**make(sister, [1]), something=3)

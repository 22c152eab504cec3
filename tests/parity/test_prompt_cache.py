"""Tokens behind a cached prompt, keys and values, and embeddings in place of tokens: as transformers gives them."""

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
    batch = transformers_batch(sister.reference, sister.factor, counts, **options)
    return {name: x.to(sister.device) for name, x in batch.items()}


def theirs(reference, batch, **options):
    return reference.model(**batch, **options)


def drawn(sister, *shape, seed=0):
    width = sister.model.config.text.hidden_size
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))
    return (x * sister.model.get_input_embeddings().weight.std().cpu()).to(sister.device)


def in_place_of_text(sister, batch, seed=0):
    """Embeddings of a batch whose text is replaced by drawn ones, as of states and actions."""
    embeds = sister.model.get_input_embeddings()(batch["input_ids"]).detach()
    is_image = batch["input_ids"] == sister.model.config.image_token_id
    return torch.where(is_image[..., None], embeds, drawn(sister, *is_image.shape, seed=seed))


# --- inputs_embeds ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_in_the_sequence_equal_transformers(sister, side):
    batch = make(sister, [2, 0, 1], seed=5, side=side, labels=True)
    batch["inputs_embeds"] = in_place_of_text(sister, batch)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        out = sister.model(**batch, output_hidden_states=True)
        # transformers takes ids or embeddings; it finds places of images and positions in the ids.
        want = theirs(sister.reference, whole(sister, batch), output_hidden_states=True)
    assert_equal_to(out.loss, want.loss)
    for ours, reference in zip((*out.hidden_states, out.logits), (*want.hidden_states, want.logits), strict=True):
        assert_equal_to(ours[mask], reference[mask])


def whole(sister, batch):
    """The same for transformers: its own image features are in their places, and positions are given."""
    model, ids = sister.model, batch["input_ids"]
    given = {name: batch[name] for name in ("attention_mask", "labels") if name in batch}
    with torch.no_grad():
        out = model(**{name: x for name, x in batch.items() if name != "labels"}, layers=(0,))
        given |= {"inputs_embeds": batch["inputs_embeds"], "position_ids": out.position_ids}
    if "pixel_values" in batch:
        with torch.no_grad():
            features = sister.reference.model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        if getattr(features, "deepstack_features", None) or (isinstance(features, tuple) and features[1:]):
            # Deep features come of pixels only: transformers places them where embeddings are the image token's.
            token = sister.reference.model.get_input_embeddings().weight[model.config.image_token_id].detach()
            is_image = (ids == model.config.image_token_id)[..., None]
            given["inputs_embeds"] = torch.where(is_image, token, batch["inputs_embeds"])
            return given | {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
        rows = features.pooler_output if hasattr(features, "pooler_output") else features
        flat = torch.cat(list(rows))
        is_image = ids == model.config.image_token_id
        given["inputs_embeds"] = given["inputs_embeds"].masked_scatter(is_image[..., None], flat)
    return given


@pytest.mark.parametrize("with_ids", [True, False])
def test_gradients_through_embeddings_equal_transformers(sister, with_ids):
    model, reference = sister.load(), TransformersReference.from_pretrained(sister.folder, device=sister.device)
    batch = make(sister, [0, 0], seed=6, labels=True)
    embeds = in_place_of_text(sister, batch)
    ours, want = (embeds.clone().requires_grad_() for _ in range(2))
    given = {name: batch[name] for name in ("attention_mask", "labels")}
    positions = model(**{**batch, "labels": None}).position_ids
    mine = batch if with_ids else given | {"position_ids": positions}
    found = model(**mine, inputs_embeds=ours)
    expected = reference.model(**given, position_ids=positions, inputs_embeds=want)
    assert_equal_to(found.loss, expected.loss)
    found.loss.backward()
    expected.loss.backward()
    assert relative_error(ours.grad, want.grad) <= GRADIENT_TOLERANCE
    keys = model.family.keys
    gradients = {keys.module_name(name): x.grad for name, x in reference.model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers") or name.startswith("model.norm"):
            assert relative_error(parameter.grad, gradients[name]) <= GRADIENT_TOLERANCE, name
    if not with_ids:
        assert found.input_ids is None and not found.image_mask.any()


def test_embeddings_reach_every_kind_of_batch(sister):
    model, images, texts = sister.model, sister.photos(2, 2, 2, 3), ["a", "Pick up the red block."]
    prepared = model.processor(images, texts, resize=None, device=sister.device)
    embeds = in_place_of_text(sister, prepared)
    with torch.no_grad():
        direct = model(images, texts, resize=None, inputs_embeds=embeds)
        from_batch = model(**prepared, inputs_embeds=embeds)
        plain = model(images, texts, resize=None)
    assert torch.equal(direct.last_hidden_state, from_batch.last_hidden_state)
    assert relative_error(direct.last_hidden_state, plain.last_hidden_state) > 1e-2
    new = model.generate(**prepared, inputs_embeds=embeds, max_new_tokens=3)
    assert new.texts == model.generate(images, texts, resize=None, inputs_embeds=embeds, max_new_tokens=3).texts


def test_tokens_from_embeddings_equal_transformers(sister):
    batch = make(sister, [0, 0], seed=9, side="left")
    embeds = in_place_of_text(sister, batch)
    mask = batch["attention_mask"]
    positions = sister.model(**batch).position_ids
    found = sister.model.generate(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, max_new_tokens=5, do_sample=False
    )
    want = sister.reference.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, want)
    both = sister.model.generate(**batch, inputs_embeds=embeds, max_new_tokens=5, do_sample=False)
    assert torch.equal(both[:, :-5], batch["input_ids"]) and torch.equal(both[:, -5:], want)


# --- keys and values ---


def cached(past, layer):
    if hasattr(past, "layers"):
        return past.layers[layer].keys, past.layers[layer].values
    return past.key_cache[layer], past.value_cache[layer]


@pytest.mark.parametrize("side", ["left", "right"])
def test_keys_and_values_equal_transformers(sister, side):
    batch = make(sister, [1, 0, 2], seed=7, side=side)
    mask, blocks = batch["attention_mask"].bool(), sister.model.config.text.num_hidden_layers
    chosen = (blocks - 1, 0, 1)
    with torch.no_grad():
        out = sister.model(**batch, keys_values=chosen)
        past = theirs(sister.reference, batch, use_cache=True).past_key_values
    assert len(out.keys_values) == 3
    for (k, v), block in zip(out.keys_values, chosen, strict=True):
        for ours, want in zip((k, v), cached(past, block), strict=True):
            assert ours.shape == want.transpose(1, 2).shape and ours.is_contiguous()
            assert_equal_to(ours[mask], want.transpose(1, 2)[mask])
            assert not ours[~mask].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_keys_and_values_equal_transformers(sister, checkpointing):
    model, reference = sister.load(), TransformersReference.from_pretrained(sister.folder, device=sister.device)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = make(sister, [1, 0], seed=8, side="left")
    mask, block = batch["attention_mask"].bool(), model.config.text.num_hidden_layers - 2
    out = model(**batch, keys_values=(block,))
    past = reference.model(**batch, use_cache=True).past_key_values
    draws = [torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(i)).to(sister.device) for i in (0, 1)]

    def loss(pair):
        return sum(((x * draw)[mask] ** 2).sum() for x, draw in zip(pair, draws, strict=True))

    loss(out.keys_values[0]).backward()
    loss([x.transpose(1, 2) for x in cached(past, block)]).backward()
    keys = model.family.keys
    gradients = {keys.module_name(name): x.grad for name, x in reference.model.named_parameters()}
    for name, parameter in model.named_parameters():
        want = gradients[name]
        if parameter.grad is None or want is None or not want.any():
            assert (want is None or not want.any()) and (parameter.grad is None or not parameter.grad.any()), name
        else:
            assert relative_error(parameter.grad, want) <= GRADIENT_TOLERANCE, name


def test_keys_and_values_need_no_later_block(sister):
    images = sister.photos(1, 1, 2, 2)
    calls = []
    blocks = sister.model.model.layers
    handles = [block.register_forward_hook(lambda m, i, o, n=n: calls.append(n)) for n, block in enumerate(blocks)]
    with torch.no_grad():
        out = sister.model(images, ["a"], layers=(1,), keys_values=(1,), resize=None)
    for handle in handles:
        handle.remove()
    assert calls == [0, 1] and len(out.keys_values) == 1 and len(out.hidden_states) == 1


# --- prefill and extend ---


@given(
    counts=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    tokens=st.integers(1, 9),
    causal=st.booleans(),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=7, deadline=None)
def test_extensions_equal_full_forwards(sister, counts, tokens, causal, side, seed):
    """Each sample alone through transformers: prompt and suffix in one sequence, with a mask of four dimensions."""
    batch = make(sister, counts, seed=seed, side=side)
    cache = sister.model.prefill(**batch)
    before = [x.clone() for x in cache.tensors]
    for step in range(2):
        suffix = drawn(sister, len(counts), tokens, seed=step)
        found = sister.model.extend(cache, suffix, causal=causal)
        for sample in range(len(counts)):
            assert_equal_to(found[sample], full_forward(sister, batch, sample, suffix[sample], causal))
    assert all(torch.equal(x, y) for x, y in zip(cache.tensors, before, strict=True))


@torch.no_grad()
def full_forward(sister, batch, sample, suffix, causal):
    """The suffix's hidden states of one sample, from transformers' decoder over prompt and suffix."""
    own = batch["attention_mask"][sample].bool()
    out = sister.model(**batch, layers=(0,))
    if sister.model.config.vision.deepstack_visual_indexes is None:
        embeds = torch.cat((out.hidden_states[0][sample, own], suffix))[None]
        deep = {}
    else:
        # Its decoder takes deep features and where they go.
        maps = (
            sister.reference.model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
            if ("pixel_values" in batch)
            else None
        )
        embeds = torch.cat((out.hidden_states[0][sample, own], suffix))[None]
        deep = {}
        is_image = batch["input_ids"] == sister.model.config.image_token_id
        if maps is not None and is_image[sample].any():
            deep_maps = maps.deepstack_features if hasattr(maps, "deepstack_features") else maps[1]
            places = is_image.flatten().nonzero()[:, 0]
            mine = is_image[sample].nonzero()[:, 0] + sample * is_image.shape[1]
            rows = torch.isin(places, mine)
            flat = [x if isinstance(x, torch.Tensor) else torch.cat(list(x)) for x in deep_maps]
            visual_mask = torch.zeros(1, embeds.shape[1], dtype=torch.bool, device=embeds.device)
            visual_mask[0, : int(own.sum())] = is_image[sample, own]
            deep = {"deepstack_visual_embeds": [x[rows] for x in flat], "visual_pos_masks": visual_mask}
    positions = out.position_ids[:, sample, own]
    first = int(positions.max()) + 1
    steps = first + torch.arange(len(suffix), device=embeds.device)
    positions = torch.cat((positions, steps.expand(3, -1)), dim=1)[:, None]
    length = embeds.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    if not causal:
        sees[-len(suffix) :, -len(suffix) :] = True
    mask = torch.zeros(1, 1, length, length, device=embeds.device).masked_fill(~sees, torch.finfo(torch.float32).min)
    decoder = sister.reference.model.model.language_model
    hidden = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False, **deep)
    return hidden.last_hidden_state[0, -len(suffix) :]


def test_ids_run_behind_a_prompt_as_in_one_sequence(sister):
    batch = make(sister, [1, 0], seed=3, side="right", turns=1)
    whole_batch = make(sister, [1, 0], seed=3, side="left", turns=1)
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]], device=sister.device)
    longer = dict(whole_batch)
    longer["input_ids"] = torch.cat((whole_batch["input_ids"], ids), dim=1)
    longer["attention_mask"] = torch.cat((whole_batch["attention_mask"], torch.ones_like(ids)), dim=1)
    del longer["mm_token_type_ids"]
    with torch.no_grad():
        want = sister.model(**longer, layers=(-1,)).last_hidden_state[:, -3:]
    assert_equal_to(sister.model.extend(sister.model.prefill(**batch), ids), want)


def test_an_extension_takes_positions_and_masks_of_its_own(sister):
    batch = make(sister, [1, 0], seed=4, side="left")
    model, suffix = sister.model, drawn(sister, 2, 5)
    cache = model.prefill(**batch)
    device = sister.device
    plain = model.extend(cache, suffix)
    text = cache.output.position_ids.amax(dim=(0, 2))[:, None] + 1 + torch.arange(5, device=device)
    for positions in (text, text.expand(3, -1, -1), text.expand(4, -1, -1)):
        assert torch.equal(model.extend(cache, suffix, positions), plain)
    assert relative_error(model.extend(cache, suffix, text + 3), plain) > 1e-4

    tril = torch.ones(5, 5, dtype=torch.bool, device=device).tril().expand(2, -1, -1)
    everything = batch["attention_mask"].bool()[:, None].expand(-1, 5, -1)
    assert_equal_to(model.extend(cache, suffix, attention_mask=tril), plain)
    assert_equal_to(model.extend(cache, suffix, causal=False, attention_mask=tril), plain)
    for mask in (torch.cat((everything, tril), dim=2), torch.cat((everything, tril), dim=2)[:, None].long()):
        assert_equal_to(model.extend(cache, suffix, attention_mask=mask), plain)
    ones = torch.ones_like(tril)
    both_ways = model.extend(cache, suffix, causal=False)
    assert_equal_to(model.extend(cache, suffix, attention_mask=ones), both_ways)

    # Padding among the new tokens: the others are as without it.
    padded = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], device=device)
    for causal in (True, False):
        for mask in (padded, torch.cat((batch["attention_mask"], padded), dim=1)):
            found = model.extend(cache, suffix, causal=causal, attention_mask=mask)
            assert found.isfinite().all()
            for sample in range(2):
                own = padded[sample].bool()
                alone = model.prefill(**make(sister, [1, 0], seed=4, side="right"))
                shorter = model.extend(alone, suffix[:, own], causal=causal)
                assert_equal_to(found[sample, own], shorter[sample])


def test_what_a_mask_hides_of_the_prompt_changes_nothing(sister):
    batch = make(sister, [0, 0], seed=4, side="left", turns=1)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    last = other["input_ids"].shape[1] - 1
    other["input_ids"][:, last] = 7
    suffix, model = drawn(sister, 2, 3), sister.model
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 3, dtype=torch.long, device=sister.device)), dim=1)
    mask[:, last] = 0
    first, second = (model.extend(model.prefill(**x), suffix, attention_mask=mask) for x in (batch, other))
    assert torch.equal(first, second)
    plain = [model.extend(model.prefill(**x), suffix) for x in (batch, other)]
    assert relative_error(*plain) > 1e-4


def test_a_prompt_of_frames_texts_and_a_camera_mask(sister):
    images, texts = sister.photos(2, 2, 2, 3), ["a", "Pick up the red block."]
    mask = torch.tensor([[True, False], [True, True]])
    for side in ("left", "right"):
        model = sister.models[side]
        cache = model.prefill(images, texts, camera_mask=mask, resize=None, layers=(0, -1))
        suffix = drawn(sister, 2, 4)
        with torch.no_grad():
            want = model(images, texts, camera_mask=mask, resize=None, layers=(0, -1))
        for ours, expected in zip(cache.output.hidden_states, want.hidden_states, strict=True):
            assert torch.equal(ours, expected)
        alone = model.prefill(images[:1, :1], texts[:1], resize=None)
        assert_equal_to(model.extend(cache, suffix)[:1], model.extend(alone, suffix[:1]))
        prepared = model.processor(images, texts, camera_mask=mask, resize=None, device=sister.device)
        assert torch.equal(model.extend(model.prefill(**prepared), suffix), model.extend(cache, suffix))


def test_a_cache_is_not_changed_through_the_callers_masks(sister):
    model = sister.model
    batch = model.processor(sister.photos(2, 1, 2, 2), ["a", "Pick up the red block."], resize=None)
    batch = {name: x.to(sister.device) for name, x in batch.items()}
    cache, suffix = model.prefill(**batch), drawn(sister, 2, 3)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 3, dtype=torch.bool, device=sister.device)), dim=1)
    want = model.extend(cache, suffix, attention_mask=mask)
    for own in (batch["attention_mask"], cache.output.attention_mask):
        own.fill_(True)
        assert torch.equal(model.extend(cache, suffix, attention_mask=mask), want)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_among_new_tokens_may_hold_anything(sister, causal):
    batch = make(sister, [1, 0], seed=4, side="left")
    cache, suffix = sister.model.prefill(**batch), drawn(sister, 2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]], device=sister.device)
    want = sister.model.extend(cache, suffix, causal=causal, attention_mask=mask)
    suffix[mask == 0] = float("nan")
    found = sister.model.extend(cache, suffix, causal=causal, attention_mask=mask)
    assert found.isfinite().all() and torch.equal(found[mask == 1], want[mask == 1])

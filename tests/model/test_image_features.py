"""Image features in place of frames: of today or from disk, in every kind of batch, with what cannot fit refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_batched import Features
from tests.conversations import transformers_batch
from tests.sisters import FACTORS, Sister
from tests.support import assert_equal_to

TEXTS = ["a", "Pick up the red block."]


@pytest.fixture(params=list(FACTORS), scope="module")
def sister(request, tmp_path_factory, device):
    return Sister(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint", device)


def encode(sister, images, **options):
    deep = sister.model.config.vision.deepstack_visual_indexes is not None
    return sister.model.encode_images(images, resize=None, deepstack=deep, **options)


def through_a_file(features, folder):
    """As a user stores them, with whatever names; a list of cameras camera by camera."""
    main, deep = features if isinstance(features, Features) else (features, [])
    as_list = isinstance(main, list)
    tensors = {}
    for level, maps in enumerate([main, *deep]):
        for camera, x in enumerate(maps if as_list else [maps]):
            tensors[f"{level}.{camera}"] = x.contiguous()
    save_file(tensors, folder / "features.safetensors")
    loaded = load_file(folder / "features.safetensors")
    levels = []
    for level in range(1 + len(deep)):
        cameras = [loaded[f"{level}.{camera}"] for camera in range(len(main) if as_list else 1)]
        levels.append(cameras if as_list else cameras[0])
    return Features(levels[0], levels[1:]) if deep else levels[0]


def cases(sister):
    """Frames, and a camera mask or none."""
    yield sister.photos(2, 2, 2, 3), None
    yield sister.photos(2, 2, 2, 3), torch.tensor([[False, True], [True, True]])
    yield [sister.photos(2, 1, 2, 3)[:, 0], sister.photos(2, 1, 4, 1, seed=3)[:, 0]], None
    yield [sister.photos(2, 1, 2, 2)[:, 0], sister.photos(2, 1, 2, 2, seed=3)[:, 0]], torch.tensor([[True, False]] * 2)


@pytest.mark.parametrize("case", range(4))
def test_features_from_disk_give_what_frames_give(sister, case, tmp_path):
    images, mask = [*cases(sister)][case]
    model, targets = sister.model, ["yes", "no, later"]
    features = through_a_file(encode(sister, images, camera_mask=mask), tmp_path)
    given = {"image_features": features, "camera_mask": mask}
    with torch.no_grad():
        want = model(images, TEXTS, camera_mask=mask, targets=targets, resize=None)
        out = model(None, TEXTS, targets=targets, **given)
        prepared = model.processor(None, TEXTS, targets=targets, **given)
        again = model(**prepared)
    for found in (out, again):
        assert torch.equal(found.last_hidden_state, want.last_hidden_state)
        assert torch.equal(found.loss, want.loss) and torch.equal(found.camera_ids, want.camera_ids)
        pairs = zip(found.image_features, want.image_features, strict=True)
        assert isinstance(found.image_features, list) == isinstance(images, list)
        assert all(torch.equal(x, y.to(x.device)) for x, y in pairs)
    texts = model.generate(images, TEXTS, camera_mask=mask, resize=None, max_new_tokens=4).texts
    assert model.generate(None, TEXTS, max_new_tokens=4, **given).texts == texts
    rows = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in prepared.items()}
    if not isinstance(images, list):  # a loader cuts the batch
        rows["prepared"] = prepared["prepared"][:1]
        with torch.no_grad():
            assert_equal_to(model(**rows).last_hidden_state, want.last_hidden_state[:1])


def test_a_prepared_batch_takes_features_in_place_of_its_pixels(sister):
    model, images = sister.model, sister.photos(2, 2, 2, 3)
    batch = model.processor(images, TEXTS, resize=None, device=sister.device)
    with torch.no_grad():
        want = model(**batch).last_hidden_state
        pixels = batch.pop("pixel_values")
        assert torch.equal(model(**batch, image_features=encode(sister, images)).last_hidden_state, want)
        with pytest.raises(ValueError, match="both"):
            model(**batch, pixel_values=pixels, image_features=encode(sister, images))
        with pytest.raises(ValueError, match="grids"):
            model(**batch, image_features=encode(sister, sister.photos(2, 2, 3, 2)))


def test_transformers_batches_take_features_in_every_form(sister):
    model = sister.model
    made = transformers_batch(sister.reference, sister.factor, [2, 0, 1], seed=3, side="left", labels=True)
    batch = {name: x.to(sister.device) for name, x in made.items()}
    with torch.no_grad():
        want = model(**batch)
        theirs = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    del batch["pixel_values"]
    is_deep = model.config.vision.deepstack_visual_indexes is not None
    main = want.image_features
    deep = []
    if is_deep:
        deep = theirs.deepstack_features if hasattr(theirs, "deepstack_features") else theirs[1]
    forms = [Features(main, deep), Features([x.flatten(0, 1) for x in main], deep)]
    forms.append(Features(torch.cat([x.flatten(0, 1) for x in main]), deep))
    forms.append(theirs)
    forms.append((main, deep) if is_deep else tuple(main))  # as before transformers 5
    for features in forms:
        with torch.no_grad():
            out = model(**batch, image_features=features)
        assert torch.equal(out.logits, want.logits) and torch.equal(out.loss, want.loss)
    del batch["image_grid_thw"]  # the maps' shapes say it
    with torch.no_grad():
        assert torch.equal(model(**batch, image_features=forms[0]).logits, want.logits)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pixels = {name: made[name].to(sister.device) for name in ("pixel_values", "image_grid_thw")}
    tokens = model.generate(**given, image_features=forms[0], max_new_tokens=3)
    assert torch.equal(tokens, model.generate(**given, **pixels, max_new_tokens=3))


def test_the_tower_does_not_run_and_gradients_reach_features(sister):
    model, images = sister.load(), sister.photos(2, 1, 2, 2)
    features = encode(sister, images)
    leaves = (
        [x.clone().requires_grad_() for x in (features.main, *features.deep)]
        if isinstance(features, Features)
        else [features.clone().requires_grad_()]
    )
    given = Features(leaves[0], leaves[1:]) if isinstance(features, Features) else leaves[0]
    ran = []
    handle = model.visual.register_forward_hook(lambda *_: ran.append(1))
    model(None, TEXTS, targets=["x", "y"], image_features=given).loss.backward()
    handle.remove()
    assert not ran and all(x.grad.any() for x in leaves)
    whole = sister.load()
    whole(images, TEXTS, targets=["x", "y"], resize=None).loss.backward()
    for (name, x), y in zip(model.model.named_parameters(), whole.model.parameters(), strict=True):
        assert_equal_to(x.grad, y.grad), name


def test_what_does_not_fit_is_refused(sister):
    model, images = sister.model, sister.photos(2, 2, 2, 3)
    features = encode(sister, images)
    main, deep = features if isinstance(features, Features) else (features, [])

    def made(change):
        return Features(change(main), [change(x) for x in deep]) if deep else change(main)

    wrong = {
        "width": made(lambda x: x[..., :-1]),
        "samples": made(lambda x: x[:1]),
        "dtype": made(lambda x: x.double()),
        "dimensions": made(lambda x: x[:, 0]),
        "integers": made(lambda x: x.long()),
        "deep": main if deep else Features(main, [main]),
        "an empty list": Features([], [[] for _ in deep]) if deep else [],
        "cameras of other batches": Features([main[:, 0], main[:1, 1]], [[x[:, 0], x[:1, 1]] for x in deep]),
    }
    if deep:
        wrong["deep of another grid"] = Features(main, [x.flip(0)[:, :1] for x in deep])
    for name, given in wrong.items():
        with pytest.raises(ValueError), torch.no_grad():
            model(None, TEXTS, image_features=given)
            pytest.fail(name)
    with pytest.raises(TypeError):
        model(None, TEXTS, image_features="features")
    for arguments in (
        {"images": images},
        {"camera_mask": torch.ones(2, 3) > 0},
        {"resize": (sister.factor, sister.factor)},
        {"template": "{image} {text}"},
    ):
        with pytest.raises(ValueError):
            model(arguments.pop("images", None), TEXTS, image_features=features, **arguments)
    with pytest.raises(ValueError, match="one text per sample"):
        model(None, TEXTS[:1], image_features=features)


def test_a_bad_call_of_the_prompt_cache_is_refused(sister):
    model, images = sister.load(), sister.photos(2, 1, 2, 2)
    width = model.config.text.hidden_size
    cache = model.prefill(images, TEXTS, resize=None)
    suffix = torch.zeros(2, 3, width, device=sister.device)
    good = model.extend(cache, suffix)
    length, device = cache.shape[1], sister.device
    ids = torch.zeros(2, 3, dtype=torch.long)
    bad = {
        "of another batch": lambda: model.extend(cache, suffix[:1]),
        "width": lambda: model.extend(cache, suffix[..., 1:]),
        "dimensions": lambda: model.extend(cache, suffix[0]),
        "no token": lambda: model.extend(cache, suffix[:, :0]),
        "dtype": lambda: model.extend(cache, suffix.double()),
        "bool": lambda: model.extend(cache, ids > 0),
        "positions": lambda: model.extend(cache, suffix, torch.zeros(2, 4, dtype=torch.long, device=device)),
        "floating positions": lambda: model.extend(cache, suffix, suffix[..., 0]),
        "mask": lambda: model.extend(cache, suffix, attention_mask=torch.ones(2, length, device=device)),
        "added mask": lambda: model.extend(cache, suffix, attention_mask=torch.zeros(2, 3, 3, device=device)),
        "too long": lambda: model.extend(
            cache, suffix[:, :1].expand(-1, model.config.text.max_position_embeddings - length + 1, -1)
        ),
        "ids": lambda: model.extend(cache, ids + model.config.text.vocab_size),
        "gradients": lambda: model.extend(cache, suffix.clone().requires_grad_()),
        "another model": lambda: sister.load().extend(cache, suffix),
        "gradients of embeddings": lambda: model.prefill(
            images, TEXTS, resize=None, inputs_embeds=torch.zeros(2, length, width, device=device).requires_grad_()
        ),
        "keys of a block": lambda: model(images, TEXTS, resize=None, keys_values=(99,)),
        "embeddings' shape": lambda: model(images, TEXTS, resize=None, inputs_embeds=suffix),
        "no positions": lambda: model(inputs_embeds=suffix),
        "embeddings without ids but images": lambda: model(
            inputs_embeds=suffix,
            position_ids=ids.to(device),
            pixel_values=torch.zeros(4, 8),
            image_grid_thw=torch.tensor([[1, 2, 2]]),
        ),
    }
    for name, call in bad.items():
        with pytest.raises(ValueError):
            call()
            pytest.fail(name)
    for call in (
        lambda: model.extend("cache", suffix),
        lambda: model.extend(cache, "ids"),
        lambda: model.extend(cache, suffix, causal=1),
        lambda: model(images, TEXTS, resize=None, keys_values=("a",)),
    ):
        with pytest.raises(TypeError):
            call()
    assert torch.equal(model.extend(cache, suffix), good)
    model.train()
    with pytest.raises(ValueError, match="no_grad"):
        model.extend(cache, suffix)
    with torch.no_grad():
        assert torch.equal(model.extend(cache, suffix), good)
    model.eval().to(torch.float64)
    with pytest.raises(ValueError, match="moved"):
        model.extend(cache, suffix.double())


def test_a_list_of_images_of_any_sizes_is_encoded_image_by_image(sister):
    f = sister.factor
    sizes = [(2 * f, 3 * f), (f, f), (2 * f, 3 * f), (2 * f + 5, 3 * f - 3), (4 * f, f)]
    images = [sister.photos(1, 1, 5, 5, seed=i)[0, 0, :, :h, :w].contiguous() for i, (h, w) in enumerate(sizes)]
    images.append(images[0].float() / 255)
    with torch.no_grad():
        found = sister.model.encode_image_list(images)
        for image, features in zip(images, found, strict=True):
            assert_equal_to(features, sister.model.encode_images(image[None, None])[0, 0])
        resized = sister.model.encode_image_list(images[:2], resize=(f, 2 * f), chunk_size=1)
        assert [x.shape[:2] for x in resized] == [(1, 2), (1, 2)]
    assert sister.model.encode_image_list([]) == []
    for wrong in ([images[0][None]], [images[0][:2]], [images[0], images[1][0]]):
        with pytest.raises(ValueError):
            sister.model.encode_image_list(wrong)
    for wrong in (images[0], ["a"]):
        with pytest.raises(TypeError):
            sister.model.encode_image_list(wrong)


def test_labels_in_a_prompt_need_the_output_projection(sister):
    headless = sister.load(lm_head=False)
    batch = transformers_batch(sister.reference, sister.factor, [1, 0], seed=3, labels=True)
    prepared = headless.processor(sister.photos(2, 1, 2, 2), TEXTS, targets=["x", "y"], resize=None)
    for given in (batch, prepared):
        with pytest.raises(ValueError, match="output projection"):
            headless.prefill(**given)
    output = sister.model.prefill(**batch).output
    assert_equal_to(output.loss, sister.model(**batch).loss)
    assert output.logits is None


@pytest.mark.parametrize("name", ["logits", "keys_values", "targets", "output_hidden_states", "return_dict", "layer"])
def test_prefill_names_an_argument_that_it_does_not_take(sister, name):
    batch = transformers_batch(sister.reference, sister.factor, [1, 0], seed=3)
    for given in ({"texts": TEXTS}, batch):
        with pytest.raises(TypeError, match=rf"prefill\(\) got an unexpected argument '{name}'"):
            sister.model.prefill(**given, **{name: ("x",)})
        sister.model.prefill(**given, **{name: None})


def test_keys_and_values_of_no_block_are_none(sister):
    for none in (None, (), []):
        with torch.no_grad():
            assert sister.model(None, ["a"], keys_values=none).keys_values is None
    for wrong in (0, -1, "0", {0}, iter([0])):
        with pytest.raises(TypeError, match="keys_values must be a list or tuple of ints"):
            sister.model(None, ["a"], keys_values=wrong)


def test_stored_features_load_without_pickle(sister, tmp_path):
    features = encode(sister, sister.photos(2, 2, 2, 3))
    torch.save(features, tmp_path / "features.pt")
    loaded = torch.load(tmp_path / "features.pt", weights_only=True)
    with torch.no_grad():
        found = sister.model(None, TEXTS, image_features=loaded).last_hidden_state
        assert torch.equal(found, sister.model(None, TEXTS, image_features=features).last_hidden_state)


@pytest.mark.parametrize("as_list", [False, True])
def test_given_features_of_absent_cameras_are_zero_whatever_they_were(sister, as_list):
    model, images, mask = sister.load(), sister.photos(2, 2, 2, 3), torch.tensor([[True, False], [True, True]])
    images = [*images.unbind(1)] if as_list else images

    def poisoned(maps):
        maps = [camera.clone() for camera in maps] if as_list else maps.clone()
        (maps[1] if as_list else maps[:, 1])[0] = float("nan")
        leaves = maps if as_list else [maps]
        assert all(x.requires_grad_() is x for x in leaves)
        return maps

    with torch.no_grad():
        features = encode(sister, images)
        want = model(images, TEXTS, camera_mask=mask, resize=None)
    is_deep = isinstance(features, Features)
    given = Features(poisoned(features.main), [*map(poisoned, features.deep)]) if is_deep else poisoned(features)
    for out in (
        model(None, TEXTS, camera_mask=mask, image_features=given),
        model(**model.processor(None, TEXTS, camera_mask=mask, image_features=given, device=sister.device)),
    ):
        assert_equal_to(out.last_hidden_state, want.last_hidden_state)
        for found, expected in zip(out.image_features, want.image_features, strict=True):
            assert_equal_to(found, expected)
        assert not (out.image_features[1][0] if as_list else out.image_features[0, 1]).any()
    out.last_hidden_state.sum().backward()
    leaves = given if not is_deep else given.main
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (leaves if as_list else [leaves]))


def test_deep_features_of_a_prepared_batch_are_checked(sister):
    model, images = sister.model, sister.photos(2, 2, 2, 3)
    batch = model.processor(None, TEXTS, image_features=encode(sister, images))
    vector, map_ = torch.zeros(4), torch.zeros(2, 1, 2, 3, model.config.vision.out_hidden_size)
    for deep in ("x", [1], [vector], vector, 3, [map_, map_.expand(-1, 2, -1, -1, -1)], map_):
        with pytest.raises(ValueError, match="deep_features must"), torch.no_grad():
            model(**{**batch, "deep_features": deep})


@pytest.mark.parametrize("as_list", [False, True])
def test_prepared_features_are_contiguous_and_own_their_memory(sister, as_list):
    features = encode(sister, sister.photos(2, 2, 2, 3))
    main, deep = features if isinstance(features, Features) else (features, [])

    def channels_first(x):
        x = x.movedim(-1, 2).contiguous().movedim(2, -1)
        return [*x.unbind(1)] if as_list else x

    given = Features(channels_first(main), [channels_first(x) for x in deep])
    batch = sister.model.processor(None, TEXTS, image_features=given)
    for name in {"image_features", "deep_features"} & batch.keys():
        for x in batch[name] if as_list else [batch[name]]:
            assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
            x.fill_(7)
    assert not (torch.stack(given.main) == 7).any() if as_list else not (given.main == 7).any()

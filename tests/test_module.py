"""QwenBatchedVL is an ordinary nn.Module: what users do to modules works, and nothing of a call stays behind."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qwen_batched import QwenBatchedVL, TensorProcessor
from tests.support import assert_equal_to, noise, photos, relative_error

FRAMES = photos(2, 2, 56, 84)
MIXED = [photos(2, 1, 56, 84)[:, 0], photos(2, 1, 84, 140)[:, 0]]
TEXTS = ["Pick up the red block.", "Go."]
MASK = torch.tensor([[True, False], [True, True]])
# Rounding to bfloat16 (8 bits) after each of some 50 operations of the tiny model; a wrong cast gives 0.3 and more.
BFLOAT16_TOLERANCE = 5e-2


@pytest.fixture
def fresh(load):
    """A model of one's own, which nobody has called yet."""
    return load()


def results(model, frames=FRAMES):
    with torch.no_grad():
        out = model(frames, TEXTS, camera_mask=MASK, logits="all")
    return [out.last_hidden_state, out.logits, out.image_features]


def equal(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_trap16_half_precision_stays_near_float32_and_comes_back(fresh, cast):
    before = results(fresh)
    for ours, theirs in zip(results(cast(fresh)), before, strict=True):
        assert relative_error(ours, theirs) < BFLOAT16_TOLERANCE
    rounded = {name: value.float() for name, value in fresh.state_dict().items()}
    fresh.float()
    assert all(torch.equal(value, rounded[name]) for name, value in fresh.state_dict().items())
    assert all(x.dtype == torch.float32 for x in results(fresh))


def test_from_pretrained_is_in_eval_mode_and_train_changes_no_result(fresh):
    assert not any(module.training for module in fresh.modules())
    before = results(fresh)
    assert fresh.train() is fresh
    assert all(module.training for module in fresh.modules())
    assert equal(results(fresh), before)
    assert equal(results(fresh.eval()), before)


def test_requires_grad_decides_which_parameters_get_gradients(fresh):
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    fresh.requires_grad_(False)
    assert not fresh(FRAMES, TEXTS).last_hidden_state.requires_grad
    fresh.visual.merger.requires_grad_(True)
    fresh(FRAMES, TEXTS).last_hidden_state.square().mean().backward()
    trained = {name for name, parameter in fresh.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in fresh.named_parameters() if name.startswith("visual.merger.")}
    assert all(parameter.grad.norm() > 0 for parameter in fresh.visual.merger.parameters())


@pytest.mark.parametrize("used", [False, True])
def test_deepcopy_gives_the_same_result_and_shares_nothing(fresh, used):
    if used:
        results(fresh)
    twin = copy.deepcopy(fresh)
    before = results(fresh)
    assert equal(results(twin), before)
    mine = {parameter.data_ptr() for parameter in fresh.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in twin.parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert equal(results(fresh), before)
    assert not equal(results(twin), before)
    twin.processor.padding_side = "right"
    assert fresh.processor.padding_side == "left"


def test_torch_save_and_load_round_trip(fresh):
    before = results(fresh)
    file = io.BytesIO()
    torch.save(fresh, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again, QwenBatchedVL)
    assert equal(results(again), before)
    assert len(again.processor._tables) > 0  # its caches were saved empty, and filled again
    assert equal(*(model.generate(FRAMES, TEXTS, max_new_tokens=2).token_ids for model in (again, fresh)))


def test_state_dict_goes_through_weights_only_load_into_another_model(load, fresh):
    results(fresh)  # a table of the old weights, if there were any, would stay
    other = load()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    expected = results(other)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    report = fresh.load_state_dict(torch.load(file, weights_only=True))
    assert not report.missing_keys and not report.unexpected_keys
    assert equal(results(fresh), expected)


def test_load_state_dict_is_strict(fresh):
    state = fresh.state_dict()
    state.pop("model.norm.weight")
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        fresh.load_state_dict(state)


@pytest.mark.parametrize("used", [False, True])
def test_processors_are_pickled_for_the_workers_of_a_data_loader(fresh, checkpoint, used):
    for processor in (fresh.processor, TensorProcessor.from_pretrained(checkpoint, padding_side="right")):
        expected = processor(FRAMES, TEXTS, MASK) if used else None
        again = pickle.loads(pickle.dumps(processor))
        expected = expected or processor(FRAMES, TEXTS, MASK)
        batch = again(FRAMES, TEXTS, MASK)
        assert batch.keys() == expected.keys()
        assert batch.pop("prepared") == expected.pop("prepared")
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_hooks_on_every_module_run(fresh):
    ran = set()
    for name, module in fresh.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: ran.add(name))
    results(fresh)
    containers = {name for name, module in fresh.named_modules() if isinstance(module, nn.ModuleList)}
    assert ran == {name for name, _ in fresh.named_modules()} - containers


@pytest.mark.parametrize("images", [FRAMES, MIXED, None], ids=["uniform", "mixed", "text only"])
def test_trap29_training_works_after_the_first_call_was_in_inference_mode(load, fresh, images):
    with torch.inference_mode():
        inferred = fresh(images, TEXTS, logits="last")
        if images is not None:
            fresh.encode_images(images, layers=(0, -1))
        fresh.generate(images, TEXTS, max_new_tokens=2)
    out = fresh(images, TEXTS, logits="last")
    assert torch.equal(out.logits, inferred.logits)
    out.logits.square().mean().backward()
    trained = load()
    trained(images, TEXTS, logits="last").logits.square().mean().backward()
    for (name, ours), theirs in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_trap29_a_batch_prepared_in_inference_mode_trains(fresh):
    with torch.inference_mode():
        fresh.processor(FRAMES, TEXTS, MASK)
    fresh(**fresh.processor(FRAMES, TEXTS, MASK)).last_hidden_state.square().mean().backward()
    assert fresh.visual.patch_embed.proj.weight.grad.norm() > 0


def test_trap29_caches_and_tables_stay_out_of_the_state(fresh):
    names = list(fresh.state_dict())
    results(fresh)
    fresh.generate(MIXED, TEXTS, max_new_tokens=2)
    assert list(fresh.state_dict()) == names == [name for name, _ in fresh.named_parameters()]
    assert list(fresh.buffers()) == []


def test_inputs_are_left_as_they_were(fresh):
    frames, floats, mask = FRAMES.clone(), FRAMES / 255, MASK.clone()
    kept = floats.clone()
    texts = list(TEXTS)
    fresh(frames, texts, camera_mask=mask)
    fresh(floats, texts, camera_mask=mask, resize=(56, 56))
    assert torch.equal(frames, FRAMES) and torch.equal(floats, kept) and torch.equal(mask, MASK) and texts == TEXTS


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_runs_under_autocast(fresh, grad):
    expected = results(fresh)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        out = fresh(FRAMES, TEXTS, camera_mask=MASK, logits="all")
    for ours, theirs in zip([out.last_hidden_state, out.logits, out.image_features], expected, strict=True):
        assert relative_error(ours.detach(), theirs) < BFLOAT16_TOLERANCE
    if grad:
        out.logits.float().square().mean().backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in fresh.parameters())
    assert equal(results(fresh), expected)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_set_elsewhere_changes_nothing(load, checkpoint, default):
    """Training code sets it while it builds models; tables made then must be as any other time."""
    expected = results(load())
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu")
        assert model.dtype == torch.float32
        assert equal(results(model), expected)
    finally:
        torch.set_default_dtype(before)
    assert equal(results(model), expected)


def test_a_default_device_set_elsewhere_changes_nothing(load, checkpoint):
    expected = results(load())
    with torch.device("meta"):
        model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu")
        assert equal(results(model), expected)
        assert len(model.generate(FRAMES, TEXTS, max_new_tokens=2).texts) == 2


# --- on the GPU ---


def without_synchronisation(call):
    """Runs `call` so that any host synchronisation in it is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(x):
    return [part.pin_memory() for part in x] if isinstance(x, list) else x.pin_memory()


def on_gpu(x):
    return [part.cuda() for part in x] if isinstance(x, list) else x.cuda()


FIRST, SECOND = photos(2, 2, 60, 90), noise(2, 2, 60, 90)
MIXED_SECOND = [noise(2, 2, 56, 84)[:, 0], noise(2, 2, 84, 140)[:, 0]]
# name: (place of the frames, first frames, second frames, options, mask's place)
SYNC_CASES = {
    "device frames": (on_gpu, FIRST, SECOND, {}, None),
    "device frames as floats": (on_gpu, FIRST / 255, SECOND / 255, {}, None),
    "pinned host frames": (pinned, FIRST, SECOND, {}, None),
    "device frames, device mask": (on_gpu, FIRST, SECOND, {}, on_gpu),
    "device frames, host mask": (on_gpu, FIRST, SECOND, {}, lambda mask: mask),
    "pinned host frames, host mask": (pinned, FIRST, SECOND, {}, lambda mask: mask),
    "mixed sizes": (on_gpu, MIXED, MIXED_SECOND, {}, None),
    "mixed sizes, device mask": (on_gpu, MIXED, MIXED_SECOND, {}, on_gpu),
    "mixed sizes, host mask": (on_gpu, MIXED, MIXED_SECOND, {}, lambda mask: mask),
    "last logits": (on_gpu, FIRST, SECOND, {"logits": "last"}, None),
    "all logits": (on_gpu, FIRST, SECOND, {"logits": "all", "norm": "pre"}, None),
    "some layers": (on_gpu, FIRST, SECOND, {"layers": (0, 2, -1)}, None),
    "an exact size": (on_gpu, FIRST, SECOND, {"resize": (84, 56)}, None),
    "plain template": (on_gpu, FIRST, SECOND, {"template": "plain"}, None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", SYNC_CASES)
def test_the_second_forward_of_a_shape_makes_no_synchronisation(load, name, grad, dtype):
    place, first, second, options, mask_place = SYNC_CASES[name]
    model = load(device="cuda", dtype=dtype)
    if mask_place is not None:
        options = {**options, "camera_mask": mask_place(MASK)}
    first, second = place(first), place(second)
    with torch.set_grad_enabled(grad):
        model(first, TEXTS, **options)
        out = without_synchronisation(lambda: model(second, TEXTS, **options))
        assert_equal_to(out.last_hidden_state, model(second, TEXTS, **options).last_hidden_state, tolerance=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"logits": "last"}])
def test_the_second_forward_of_text_alone_makes_no_synchronisation(load, options):
    model = load(device="cuda")
    model(None, TEXTS, **options)
    without_synchronisation(lambda: model(None, TEXTS, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("images", [FIRST, None], ids=["frames", "text only"])
def test_texts_not_seen_before_are_copied_without_synchronisation(load, images):
    """Other tokens of the same number: a new length is a new shape."""
    model = load(device="cuda")
    images = None if images is None else images.cuda()
    model(images, ["Pick up the red block."] * 2)
    without_synchronisation(lambda: model(images, ["Pick up the block red.", "Pick up the red block."]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["device frames", "pinned host frames", "device frames, host mask"])
def test_after_warmup_no_text_makes_a_synchronisation(load, name):
    """Of no length that was seen before, in a bucket that is known."""
    place, first, second, options, mask_place = SYNC_CASES[name]
    model = load(device="cuda").requires_grad_(False)
    mask = None if mask_place is None else mask_place(MASK)
    with torch.no_grad():
        model.warmup(place(first), max_text_tokens=60, camera_mask=mask, progress=False, **options)
        graphs = model.graph_count
        for words in (1, 4, 9, 17):
            images, texts = place(second), ["a " * words, "a b"]
            out = without_synchronisation(lambda i=images, t=texts: model(i, t, camera_mask=mask, **options))
            assert model.graph_count == graphs
            assert torch.equal(
                out.last_hidden_state, model(images, texts, camera_mask=mask, cuda_graph=False).last_hidden_state
            )


@pytest.mark.gpu
def test_a_camera_mask_not_seen_before_is_copied_without_synchronisation(load):
    model, frames = load(device="cuda"), FIRST.cuda()
    first, second = torch.tensor([[True, False], [True, True]]), torch.tensor([[True, True], [True, False]])
    model(frames, TEXTS, camera_mask=first)
    without_synchronisation(lambda: model(frames, TEXTS, camera_mask=second))


@pytest.mark.gpu
def test_another_stream_reads_no_text_or_mask_before_it_is_copied(load):
    """The stream that saw them first is busy; the copies wait there."""
    model, frames = load(device="cuda"), FIRST.cuda()
    texts, mask = ["Put the cup down.", "Pick the cup up now."], torch.tensor([[True, False], [False, True]])
    expected = load(device="cuda")(frames, texts, camera_mask=mask).last_hidden_state
    model(frames, TEXTS, camera_mask=torch.ones(2, 2, dtype=torch.bool))
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(2_000_000_000)
        model(frames, texts, camera_mask=mask)
    with torch.cuda.stream(other):
        found = model(frames, texts, camera_mask=mask).last_hidden_state
        assert not busy.query()
    torch.cuda.synchronize()
    assert_equal_to(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("images", [(FIRST, SECOND), (MIXED, MIXED_SECOND)], ids=["uniform", "mixed"])
@pytest.mark.parametrize("layers", [None, (0, -1)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_second_encode_images_of_a_shape_makes_no_synchronisation(load, images, layers, masked):
    model = load(device="cuda")
    first, second = map(on_gpu, images)
    mask = MASK.cuda() if masked else None
    model.encode_images(first, layers=layers, camera_mask=mask)
    without_synchronisation(lambda: model.encode_images(second, layers=layers, camera_mask=mask))


@pytest.mark.gpu
def test_the_second_forward_of_a_prepared_batch_makes_no_synchronisation(load):
    model = load(device="cuda")
    batch = model.processor(FIRST.cuda(), TEXTS)
    model(**batch)
    without_synchronisation(lambda: model(**batch))


@pytest.mark.gpu
def test_the_guard_against_synchronisation_notices_one():
    value = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        without_synchronisation(value.item)


@pytest.mark.gpu
def test_a_used_model_moves_to_the_gpu_and_back(load):
    model = load()
    before = results(model)
    for ours, theirs in zip(results(model.cuda()), before, strict=True):
        assert ours.is_cuda
        assert relative_error(ours, theirs) < 1e-3  # float32 by another device's arithmetic, and frames resized by it
    assert equal(results(model.cpu()), before)

"""Images in several passes: the same results with less memory, and an error that says so where memory runs out."""

import pytest
import torch

from qwen_batched.model import geometry
from qwen_batched.model import vision as modeling
from tests.support import assert_equal_to, photos

# Products over fewer rows may sum in another order.
TOLERANCE = 1e-6
CHUNKS = [1, 2, 3, 7, 100, None]
UNIFORM = photos(5, 2, 56, 140)
MIXED = [photos(5, 1, 56, 140)[:, 0], photos(5, 1, 140, 84, seed=5)[:, 0], photos(5, 1, 28, 28, seed=9)[:, 0]]
IMAGES = {"uniform": UNIFORM, "mixed": MIXED, "single": UNIFORM[:1, :1]}
LAYERS = [None, (0, 4), (-1, 2, 2)]
MASK = torch.tensor([[True, False], [True, True], [False, False], [False, True], [True, True]])


def on(device, images):
    return images.to(device) if isinstance(images, torch.Tensor) else [frames.to(device) for frames in images]


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else [x for item in results for x in flat(item)]


def structure(results):
    return tuple(results.shape) if isinstance(results, torch.Tensor) else [structure(item) for item in results]


def encode(model, images, **options):
    with torch.no_grad():
        return model.encode_images(on(model.device, images), **options)


def see(model, images, camera_mask=None, **options):
    """The vision transformer alone."""
    batch = model.processor(on(model.device, images), None, camera_mask)
    with torch.no_grad():
        return model.visual(**batch, **options)


def assert_same(ours, theirs):
    assert structure(ours) == structure(theirs)
    for mine, expected in zip(flat(ours), flat(theirs), strict=True):
        assert_equal_to(mine, expected, TOLERANCE)


@pytest.fixture
def passes(monkeypatch):
    """How many images of each size went through the vision transformer in each pass."""
    seen = []
    run = modeling.VisionTransformer._run_pass

    def counting(self, parts, *how):
        seen.append([len(pixels) for pixels, _ in parts])
        return run(self, parts, *how)

    monkeypatch.setattr(modeling.VisionTransformer, "_run_pass", counting)
    return seen


@pytest.mark.parametrize(
    ("chunk_size", "name", "layers"),
    [(size, name, LAYERS[(i + j) % 3]) for i, size in enumerate(CHUNKS) for j, name in enumerate(IMAGES)],
    ids=str,
)
def test_chunks_change_no_result(model, name, layers, chunk_size, passes):
    whole = see(model, IMAGES[name], layers=layers, chunk_size=10**6)
    assert len(passes) == 1
    assert_same(see(model, IMAGES[name], layers=layers, chunk_size=chunk_size), whole)
    assert_same(see(model, IMAGES[name], layers=layers), whole)


@pytest.mark.parametrize("cuda_graph", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layers", [None, (-1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_encode_images_takes_chunks(model, name, layers, chunk_size, cuda_graph):
    whole = see(model, IMAGES[name], layers=layers, chunk_size=10**6)
    for _ in range(3 if cuda_graph else 1):
        parts = encode(model, IMAGES[name], layers=layers, chunk_size=chunk_size, cuda_graph=cuda_graph)
        assert_same(parts, whole)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_chunks_do_not_see_the_camera_mask(model, chunk_size):
    mask = MASK.to(model.device)
    whole = see(model, UNIFORM, camera_mask=mask, chunk_size=10**6)
    parts = see(model, UNIFORM, camera_mask=mask, chunk_size=chunk_size)
    assert_same(parts, whole)
    assert (parts[~mask] == 0).all()
    assert (parts[mask] != 0).any()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 10, 100])
def test_a_chunk_is_at_most_so_many_images_and_none_is_much_smaller(model, chunk_size, passes):
    for images, number in ((UNIFORM, 10), (MIXED, 15)):
        passes.clear()
        see(model, images, chunk_size=chunk_size)
        counts = [sum(sizes) for sizes in passes]
        assert max(counts) <= chunk_size
        assert sum(counts) == number
        assert len(counts) == -(-number // chunk_size)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("patches", [1, 39, 40, 41, 100, 120])
@pytest.mark.parametrize("name", IMAGES)
def test_by_default_a_pass_is_bounded_in_patches(model, name, patches, passes, monkeypatch):
    """An image of 56 x 140 has 40 patches. Passes are about equal: none has an image more than its share."""
    whole = see(model, IMAGES[name], chunk_size=10**6)
    passes.clear()
    monkeypatch.setattr(geometry, "PATCHES_PER_PASS", patches)
    assert_same(see(model, IMAGES[name]), whole)
    if name == "uniform":
        share = 400 / -(-400 // patches)
        assert all(count == 1 or count * 40 < share + 40 for (count,) in passes)
        assert sum(count for (count,) in passes) == 10
        assert len(passes) == min(10, -(-400 // patches))


def test_the_whole_model_equals_itself_in_passes(model, passes, monkeypatch):
    texts = ["Go."] * 5
    with torch.no_grad():
        whole = model(UNIFORM.to(model.device), texts).last_hidden_state
        passes.clear()
        monkeypatch.setattr(geometry, "PATCHES_PER_PASS", 100)
        assert_equal_to(model(UNIFORM.to(model.device), texts, cuda_graph=False).last_hidden_state, whole)
    assert len(passes) == 4


def test_gradients_flow_through_chunks(model):
    images = (UNIFORM / 255).to(model.device).requires_grad_()
    gradients = []
    for chunk_size in (None, 3):
        out = model.visual(**model.processor(images), chunk_size=chunk_size)
        gradients.append(torch.autograd.grad(out.square().sum(), images)[0])
    assert_equal_to(gradients[1], gradients[0])
    assert (gradients[1].flatten(2).norm(dim=2) > 0).all()


BAD = [(value, ValueError) for value in (0, -1)]
BAD += [(value, TypeError) for value in (1.0, 2.5, "2", True, False, [1], torch.tensor(2))]


@pytest.mark.parametrize(("chunk_size", "error"), BAD, ids=repr)
def test_a_bad_chunk_size_is_refused_before_any_work(model, chunk_size, error, passes, monkeypatch):
    monkeypatch.setattr(type(model.processor), "__call__", lambda *args, **options: pytest.fail("work was done"))
    with pytest.raises(error, match="chunk_size must be"):
        encode(model, UNIFORM, chunk_size=chunk_size)
    assert not passes


@pytest.mark.parametrize(("chunk_size", "error"), BAD, ids=repr)
def test_the_vision_transformer_alone_refuses_a_bad_chunk_size(model, chunk_size, error, passes):
    with pytest.raises(error, match="chunk_size must be"):
        see(model, UNIFORM, chunk_size=chunk_size)
    assert not passes


# --- out of memory ---


def fail_once(monkeypatch, after=0):
    """A block of the vision transformer runs out of memory, once."""
    state = {"calls": 0, "failed": False}
    advance = modeling.VisionBlock.advance

    def failing(self, *args):
        state["calls"] += 1
        if state["calls"] > after and not state["failed"]:
            state["failed"] = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return advance(self, *args)

    monkeypatch.setattr(modeling.VisionBlock, "advance", failing)


@pytest.mark.parametrize("cuda_graph", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("chunk_size", "after"), [(None, 0), (None, 3), (3, 0), (3, 3), (3, 8)])
def test_out_of_memory_names_the_batch_and_chunk_size_and_the_next_call_works(
    load, device, chunk_size, after, cuda_graph, monkeypatch
):
    model = load(device=device).requires_grad_(False)
    expected = see(load(device=device), UNIFORM, chunk_size=chunk_size)
    fail_once(monkeypatch, after)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        encode(model, UNIFORM, chunk_size=chunk_size, cuda_graph=cuda_graph)
    message = str(raised.value)
    assert f"with chunk_size={chunk_size}" in message
    assert "smaller chunk_size" in message
    assert "(5, 2, 3, 56, 140)" in message
    assert "Tried to allocate 2.00 GiB" in message
    del raised
    for _ in range(4 if cuda_graph else 1):
        assert_same(encode(model, UNIFORM, chunk_size=chunk_size, cuda_graph=cuda_graph), expected)


def test_out_of_memory_names_every_camera_of_mixed_sizes(load, device, monkeypatch):
    model = load(device=device).requires_grad_(False)
    fail_once(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        encode(model, MIXED)
    for frames in MIXED:
        assert str(tuple(frames.shape)) in str(raised.value)


@pytest.mark.gpu
def test_real_exhaustion_leaves_the_model_usable(load):
    model = load(device="cuda").requires_grad_(False)
    expected = encode(model, UNIFORM)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="chunk_size"):
            encode(
                model, torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8).expand(60_000, 1, 3, 28, 28), chunk_size=60_000
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for _ in range(3):
        assert_same(encode(model, UNIFORM), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [65_536, 70_000])
def test_more_images_than_a_grid_dimension_of_cuda(load, count):
    model = load(device="cuda").requires_grad_(False)
    image = photos(1, 1, 28, 28).cuda()
    expected = encode(model, image, cuda_graph=False)
    for chunk_size in (None, count):
        out = encode(model, image.expand(count, 1, 3, 28, 28), chunk_size=chunk_size, cuda_graph=False)
        assert_equal_to(out[-1:], expected)
        assert_equal_to(out[:1], expected)

"""Weights that accelerate keeps elsewhere, and models without values: the same results, or an error before any work."""

import pytest
import torch

from qwen_batched import BatchedVisionTransformer
from tests.support import assert_equal_to, photos

accelerate = pytest.importorskip("accelerate")

FRAMES, TEXTS = photos(2, 1, 56, 84), ["Go.", "Pick up the red block."]


def by_map(places):
    def place(model, folder):
        device = model.device
        names = ["visual", "model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(4))]
        device_map = {
            name: next((to for part, to in places.items() if name.startswith(part)), device) for name in names
        }
        accelerate.dispatch_model(model, device_map, main_device=device, offload_dir=folder, force_hooks=True)

    return place


PLACES = {
    "the tower, in memory": lambda model, folder: accelerate.cpu_offload(model.visual, execution_device=model.device),
    "the blocks, in memory": lambda model, folder: accelerate.cpu_offload(
        model.model.layers, execution_device=model.device
    ),
    "the tower, on disk": lambda model, folder: accelerate.disk_offload(
        model.visual, folder, execution_device=model.device
    ),
    "the tower, by a map": by_map({"visual": "disk"}),
    "some blocks, by a map": by_map({"model.layers.1": "disk", "model.layers.3": "disk"}),
    "nothing, by a map": by_map({}),
    "all, until it is called": lambda model, folder: accelerate.cpu_offload_with_hook(model, model.device),
}


@pytest.mark.parametrize("place", PLACES)
def test_offloaded_parts_give_the_same_results(load, device, tmp_path, place):
    whole, model = load(device=device).requires_grad_(False), load(device=device).requires_grad_(False)
    PLACES[place](model, tmp_path)
    frames = FRAMES.to(device)
    expected, out = whole(frames, TEXTS, logits="last"), model(frames, TEXTS, logits="last")
    assert_equal_to(out.last_hidden_state, expected.last_hidden_state)
    assert_equal_to(out.logits, expected.logits)
    assert_equal_to(model.encode_images(frames), whole.encode_images(frames))
    assert (
        model.generate(frames, TEXTS, max_new_tokens=3).texts == whole.generate(frames, TEXTS, max_new_tokens=3).texts
    )
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6], [7, 8]], device=device))
    behind = (each.extend(each.prefill(frames, TEXTS), embeds) for each in (model, whole))
    assert_equal_to(*behind)


def test_an_offloaded_tower_runs_by_itself(checkpoint, model, device):
    tower = BatchedVisionTransformer.from_pretrained(checkpoint, device=device)
    batch = model.processor(FRAMES.to(device), TEXTS)
    inputs = batch["pixel_values"], batch["raster_order"]
    accelerate.cpu_offload(tower, execution_device=torch.device(device))
    assert_equal_to(tower(*inputs), model.visual(*inputs))


@pytest.mark.parametrize("way", ["meta", "memory", "disk"])
def test_a_model_without_values_is_refused_before_any_work(load, device, tmp_path, way):
    model = load(device=device).requires_grad_(False)
    batch = model.processor(FRAMES.to(device), TEXTS)
    if way == "meta":
        model.to("meta")
    elif way == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device(device))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device(device))
    model.processor.request = None  # a call of it would be work
    for call in (
        lambda: model(FRAMES.to(device), TEXTS),
        lambda: model(**batch),
        lambda: model.generate(FRAMES.to(device), TEXTS),
        lambda: model.prefill(FRAMES.to(device), TEXTS),
        lambda: model.encode_images(FRAMES.to(device)),
    ):
        with pytest.raises(ValueError, match=r"no values.*meta device.*offload"):
            call()


def test_a_tower_and_a_decoder_without_values_are_refused(load):
    model = load()
    batch = model.processor(FRAMES, TEXTS)
    embeds = model.model.embed_tokens(batch["input_ids"])
    model.to("meta")
    with pytest.raises(ValueError, match="no values"):
        model.visual(batch["pixel_values"], batch["raster_order"])
    with pytest.raises(ValueError, match="no values"):
        model.model(embeds, batch["rope_positions"].transpose(0, 1), batch["attention_mask"])


def test_a_model_spread_over_devices_is_refused(load):
    model = load()
    model.hf_device_map = {"visual": 0, "model": 1, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"one device.*'0', '1'"):
        model(None, TEXTS)
    model.hf_device_map = {"visual": "disk", "model": "cpu", "lm_head": "cpu"}
    assert model(None, TEXTS).last_hidden_state.isfinite().all()


def test_a_hook_on_the_patch_embeddings_convolution_is_called(load):
    model, seen = load(), []
    expected = model.encode_images(FRAMES)
    model.visual.patch_embed.proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert_equal_to(model.encode_images(FRAMES), expected)
    assert len(seen) == 1

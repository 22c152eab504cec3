"""The network as a function of its modules and a typed batch, and what decides how it runs."""

import dataclasses
import logging

import pytest
import torch
from torch.utils import _pytree

from qwen_batched import calls
from qwen_batched.calls import Calls
from qwen_batched.inputs.batch import Batch
from qwen_batched.model import pipeline
from qwen_batched.model.pipeline import Network, Wanted
from tests.support import photos

TEXTS, TARGETS = ["Pick up the red block.", "a"], ["left", "up"]
MASK = torch.tensor([[True, False], [True, True]])
MIXED = [photos(2, 1, 56, 84)[:, 0], photos(2, 1, 84, 56)[:, 0]]


def request_of(model, images):
    mask = None if images is None else MASK
    return model.processor.request(images, TEXTS, mask, targets=TARGETS, device=model.device)


@pytest.mark.parametrize("images", [None, MIXED, photos(2, 2, 56, 84)], ids=["none", "mixed", "uniform"])
def test_the_network_runs_without_the_class_around_it(model, images):
    batch = model.processor.batch(request_of(model, images), torch.float32)
    network, wanted = Network(model.visual, model.model, model.lm_head), Wanted((0, 2), "post", "last")
    mask = None if images is None else MASK
    expected = model(images, TEXTS, mask, targets=TARGETS, layers=(0, 2), logits="last")
    found = pipeline.run(network, batch, wanted)
    for ours, theirs in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("images", [None, MIXED, photos(2, 2, 56, 84)], ids=["none", "mixed", "uniform"])
def test_a_batch_and_a_request_are_trees_of_their_tensors(model, images):
    request = request_of(model, images)
    batch = model.processor.batch(request, torch.float32)
    tensors, spec = _pytree.tree_flatten(batch)
    assert all(type(x) is torch.Tensor and len(x) == 2 for x in tensors), "every tensor has B first"
    again = _pytree.tree_unflatten(tensors, spec)
    for field in dataclasses.fields(Batch):
        ours, theirs = getattr(again, field.name), getattr(batch, field.name)
        assert ours is theirs or list(ours) == list(theirs) or all(map(torch.equal, ours, theirs))
    tensors, spec = _pytree.tree_flatten(request)
    assert all(type(x) is torch.Tensor for x in tensors)
    assert hash(spec.context) == hash(_pytree.tree_flatten(request_of(model, images))[1].context)
    rebuilt = model.processor.batch(_pytree.tree_unflatten(tensors, spec), torch.float32)
    assert all(map(torch.equal, _pytree.tree_leaves(rebuilt), _pytree.tree_leaves(batch)))


def test_processor_and_tower_build_a_sizes_geometry_once(load):
    model = load()
    assert model.processor.plans is model.visual.plans
    model.encode_images(photos(1, 1, 56, 84))
    assert len(model.visual.plans) == 1


def test_a_call_in_eval_mode_that_gradients_keep_from_a_graph_is_logged_once(load, monkeypatch, caplog):
    monkeypatch.setattr(Calls, "_may_use_graphs", lambda self, processor, device, wanted: wanted)
    calls._log_advice.cache_clear()
    model = load().eval()
    with caplog.at_level(logging.WARNING):
        model.train()(None, TEXTS)
        model.eval()(None, TEXTS, cuda_graph=False)
        model.requires_grad_(False)(None, TEXTS)
        assert caplog.records == []
        model.lm_head.requires_grad_(True)
        for _ in range(2):
            model(None, TEXTS)
    assert [record.name for record in caplog.records] == ["qwen_batched.calls"]
    assert "torch.no_grad() or inference_mode()" in caplog.text
    calls._log_advice.cache_clear()

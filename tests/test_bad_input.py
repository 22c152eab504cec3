"""Bad input raises a clear ValueError or TypeError before any work, and the next good call is as ever."""

import contextlib

import pytest
import torch

from qwen_batched.calls import check_no_gradient_in_a_capture
from tests.support import photos

FRAMES = photos(2, 2, 56, 84)
FLOATS = FRAMES.float() / 255
MIXED = [photos(2, 1, 56, 84)[:, 0], photos(2, 1, 84, 56)[:, 0]]
TEXTS = ["Pick up the red block.", "Go."]
MASK = torch.tensor([[True, False], [True, True]])


@contextlib.contextmanager
def no_work(model):
    """Fails where any module of the vision transformer or the decoder runs."""
    ran = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
        for module in (*model.visual.modules(), *model.model.modules())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not ran, f"{ran[0]} ran before the input was refused"


def results(model):
    with torch.no_grad():
        out = model(FRAMES, TEXTS, camera_mask=MASK, logits="all")
        return [out.last_hidden_state, out.logits, out.image_features]


@pytest.fixture(scope="module")
def good(model):
    return results(model)


@pytest.fixture
def refuses(model, good):
    """Calls and expects the error; in the end, that none of them changed anything."""

    def check(call, *messages, error=(ValueError, TypeError)):
        with no_work(model), pytest.raises(error) as raised:
            call(model)
        for message in messages:
            assert message in str(raised.value), f"{message!r} is not in {raised.value}"

    yield check
    assert all(map(torch.equal, results(model), good))


# name: (images, what the message must hold: expected and got)
BAD_IMAGES = {
    "2 dimensions": (FRAMES[0, 0, 0], "(B, n_cameras, 3, H, W)", "(56, 84)"),
    "3 dimensions": (FRAMES[0, 0], "(B, n_cameras, 3, H, W)", "(3, 56, 84)"),
    "4 dimensions": (FRAMES[:, 0], "(B, n_cameras, 3, H, W)", "(2, 3, 56, 84)"),
    "6 dimensions": (FRAMES[None], "(B, n_cameras, 3, H, W)", "(1, 2, 2, 3, 56, 84)"),
    "a scalar": (torch.tensor(1.0), "(B, n_cameras, 3, H, W)", "()"),
    "channels last (trap 13)": (FRAMES.movedim(2, -1), "3 channels", "(2, 2, 56, 84, 3)"),
    "channels last of height 3": (torch.zeros(2, 2, 3, 84, 3), "3 channels", "(2, 2, 3, 84, 3)"),
    "1 channel": (FRAMES[:, :, :1], "3 channels", "(2, 2, 1, 56, 84)"),
    "4 channels": (torch.zeros(2, 2, 4, 56, 84), "3 channels", "(2, 2, 4, 56, 84)"),
    "0 channels": (FRAMES[:, :, :0], "3 channels", "(2, 2, 0, 56, 84)"),
    "int8": (FRAMES.to(torch.int8), "uint8", "torch.int8"),
    "int32": (FRAMES.int(), "uint8", "torch.int32"),
    "int64": (FRAMES.long(), "uint8", "torch.int64"),
    "bool": (FRAMES.bool(), "uint8", "torch.bool"),
    "complex": (FLOATS.to(torch.complex64), "uint8", "torch.complex64"),
    "no sample": (FRAMES[:0], "at least one sample", "(0, 2, 3, 56, 84)"),
    "no camera": (FRAMES[:, :0], "one camera", "(2, 0, 3, 56, 84)"),
    "no rows": (FRAMES[..., :0, :], "28", "0 x 84"),
    "no columns": (FRAMES[..., :0], "28", "56 x 0"),
    "27 rows": (FRAMES[..., :27, :], "28", "27 x 84"),
    "1 pixel": (FRAMES[..., :1, :1], "28", "1 x 1"),
    "aspect ratio over 200": (torch.zeros(2, 1, 3, 28, 5601), "200", "28 x 5601"),
    "aspect ratio over 200, tall": (torch.zeros(2, 1, 3, 5601, 28), "200", "5601 x 28"),
    "empty list": ([], "at least one camera"),
    "list of 5 dimensions": ([FRAMES, FRAMES], "images[0]", "(B, 3, H, W)", "(2, 2, 3, 56, 84)"),
    "list of 3 dimensions": ([FRAMES[:, 0], FRAMES[0, 0]], "images[1]", "(3, 56, 84)"),
    "list of different B": ([FRAMES[:, 0], FRAMES[:1, 1]], "same batch size", "[2, 1]"),
    "list with an empty camera": ([FRAMES[:, 0], FRAMES[:0, 1]], "at least one sample"),
    "list with channels last": ([FRAMES[:, 0], FRAMES[:, 1].movedim(1, -1)], "3 channels", "(2, 1, 56, 84, 3)"),
    "list with int32": ([FRAMES[:, 0], FRAMES[:, 1].int()], "uint8", "torch.int32"),
    "list of None": ([None, FRAMES[:, 0]], "tensor"),
    "list of lists": ([[FRAMES[:, 0]]], "tensor"),
    "a numpy array": (FRAMES.numpy(), "tensor", "ndarray"),
    "a string": ("front.jpg", "tensor", "str"),
    "a number": (7, "tensor", "int"),
    "a dict": ({"front": FRAMES[:, 0]}, "tensor", "dict"),
    "a meta tensor": (FRAMES.to("meta"), "meta"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_before_any_work(refuses, name):
    images, *messages = BAD_IMAGES[name]
    refuses(lambda model: model(images, TEXTS), *messages)
    refuses(lambda model: model.encode_images(images), *messages)
    refuses(lambda model: model.generate(images, TEXTS, max_new_tokens=1), *messages)
    if name != "a meta tensor":  # alone, the processor works on the frames' device, whichever that is
        refuses(lambda model: model.processor(images, TEXTS), *messages)


BAD_TEXTS = {
    "None": (None, "list of str", "None"),
    "a string for two samples": ("Go.", "one text per sample", "1 texts for 2"),
    "bytes": ([b"Go.", b"Go."], "list of str", "bytes"),
    "a number among them": (["Go.", 7], "list of str", "int"),
    "None among them": (["Go.", None], "list of str", "NoneType"),
    "a list of lists": ([["Go."], ["Go."]], "list of str", "list"),
    "a set": ({"Go.", "Stop."}, "list of str", "set"),
    "a generator": ((text for text in TEXTS), "list of str", "generator"),
    "a tensor": (torch.zeros(2), "list of str", "Tensor"),
    "empty": ([], ""),
    "too few": (["Go."], "2", "1"),
    "too many": (["Go."] * 3, "2", "3"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
@pytest.mark.parametrize("images", [FRAMES, MIXED], ids=["uniform", "mixed"])
def test_bad_texts_are_refused_before_any_work(refuses, name, images):
    texts, *messages = BAD_TEXTS[name]
    refuses(lambda model: model(images, texts), *messages)
    refuses(lambda model: model.generate(images, texts), *messages)


@pytest.mark.parametrize("name", ["None", "bytes", "a number among them", "empty"])
def test_bad_texts_without_images_are_refused(refuses, name):
    texts, *messages = BAD_TEXTS[name]
    refuses(lambda model: model(None, texts), *messages)
    refuses(lambda model: model.generate(None, texts), *messages)


def test_neither_images_nor_texts_is_refused(refuses):
    refuses(lambda model: model(), "texts")
    refuses(lambda model: model.processor(None, None), "images or texts")
    refuses(lambda model: model.encode_images(None), "images")


def test_texts_that_cannot_be_encoded_are_refused(refuses):
    """A lone surrogate, as Python makes of undecodable file names, is a str without UTF-8 form."""
    refuses(lambda model: model(FRAMES, ["Go.", "\ud800"]))
    refuses(lambda model: model(FRAMES, TEXTS, template="\ud800{images}{text}"), "template", "surrogate")
    refuses(lambda model: model.generate(FRAMES, ["Go.", "\udcff x"]))


BAD_MASKS = {
    "shape (B,)": (MASK[:, 0], "(2, 2)", "(2,)"),
    "shape (V, B, 1)": (MASK[..., None], "(2, 2)", "(2, 2, 1)"),
    "a camera short": (MASK[:, :1], "(2, 2)", "(2, 1)"),
    "a sample short": (MASK[:1], "(2, 2)", "(1, 2)"),
    "a camera too many": (torch.ones(2, 3, dtype=torch.bool), "(2, 2)", "(2, 3)"),
    "empty": (MASK[:0], "(2, 2)", "(0, 2)"),
    "int64": (MASK.long(), "bool", "torch.int64"),
    "uint8": (MASK.to(torch.uint8), "bool", "torch.uint8"),
    "float32": (MASK.float(), "bool", "torch.float32"),
    "a list": (MASK.tolist(), "bool tensor", "list"),
    "a numpy array": (MASK.numpy(), "bool tensor", "ndarray"),
    "a bool": (True, "bool tensor", "bool"),
    "on the meta device": (MASK.to("meta"), "meta"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
@pytest.mark.parametrize("images", [FRAMES, MIXED], ids=["uniform", "mixed"])
def test_bad_camera_masks_are_refused_before_any_work(refuses, name, images):
    mask, *messages = BAD_MASKS[name]
    refuses(lambda model: model(images, TEXTS, camera_mask=mask), *messages)
    refuses(lambda model: model.encode_images(images, camera_mask=mask), *messages)
    refuses(lambda model: model.generate(images, TEXTS, camera_mask=mask), *messages)
    refuses(lambda model: model.processor(images, TEXTS, mask), *messages)


def test_a_camera_mask_without_images_is_refused(refuses):
    refuses(lambda model: model(None, TEXTS, camera_mask=MASK), "camera_mask")


BAD_RESIZES = {
    "not a multiple of 28": ((56, 57), "28", "(56, 57)"),
    "below 28": ((14, 56), "28", "(14, 56)"),
    "zero": ((0, 56), "28", "(0, 56)"),
    "negative": ((-28, 56), "28", "(-28, 56)"),
    "one number": (56, "resize", "56"),
    "one side": ((56,), "resize", "(56,)"),
    "three sides": ((56, 56, 3), "resize", "(56, 56, 3)"),
    "floats": ((56.0, 56.0), "resize", "56.0"),
    "bools": ((True, True), "resize", "True"),
    "text": ("56x56", "hf", "56x56"),
    "False": (False, "hf", "False"),
    "a tensor": (torch.tensor([56, 56]), "resize"),
}


@pytest.mark.parametrize("name", BAD_RESIZES)
def test_bad_resizes_are_refused_before_any_work(refuses, name):
    resize, *messages = BAD_RESIZES[name]
    refuses(lambda model: model(FRAMES, TEXTS, resize=resize), *messages)
    refuses(lambda model: model.encode_images(MIXED, resize=resize), *messages)
    refuses(lambda model: model.generate(FRAMES, TEXTS, resize=resize), *messages)


def test_resize_none_refuses_sizes_that_the_model_does_not_take(refuses):
    for images, size in ((photos(2, 2, 57, 84), "57 x 84"), ([MIXED[0], photos(2, 1, 56, 85)[:, 0]], "56 x 85")):
        refuses(lambda model, images=images: model(images, TEXTS, resize=None), "28", "resize", size)
        refuses(lambda model, images=images: model.encode_images(images, resize=None), "28", "resize", size)


@pytest.mark.parametrize("resize", ["hf", (56, 56), [28, 5600]])
def test_an_aspect_ratio_over_200_is_refused_whatever_the_resize(refuses, resize):
    images = torch.zeros(2, 1, 3, 28, 5601)
    refuses(lambda model: model(images, TEXTS, resize=resize), "200", "28 x 5601")
    refuses(lambda model: model.encode_images(list(images.unbind(1)), resize=resize), "200", "28 x 5601")


BAD_OUTPUTS = {
    "layer above the last": ({"layers": (0, 5)}, "-5 to 4", "5"),
    "layer below the first": ({"layers": (-6,)}, "-5 to 4", "-6"),
    "no layer": ({"layers": ()}, "layers", "()"),
    "one number": ({"layers": 2}, "layers", "2"),
    "a float layer": ({"layers": (1.0,)}, "layers", "1.0"),
    "a bool layer": ({"layers": (True,)}, "layers", "True"),
    "a text layer": ({"layers": ("-1",)}, "layers", "'-1'"),
    "layers as text": ({"layers": "all"}, "layers", "'all'"),
    "layers None": ({"layers": None}, "layers", "None"),
    "a None layer": ({"layers": (None,)}, "layers", "None"),
    "norm": ({"norm": "none"}, "'post'", "'none'"),
    "norm None": ({"norm": None}, "'post'", "None"),
    "logits": ({"logits": "first"}, "'last'", "'first'"),
    "logits True": ({"logits": True}, "'last'", "True"),
    "logits as a list": ({"logits": ["last"]}, "'last'"),
    "norm as a list": ({"norm": ["post"]}, "'post'"),
    "template without images": ({"template": "say {text}"}, "{images}", "say {text}"),
    "template without text": ({"template": "{images}"}, "{text}", "{images}"),
    "template with two texts": ({"template": "{images}{text}{text}"}, "{text}", "2 times"),
    "template with two image places": ({"template": "{images}{images}{text}"}, "{images}", "2 times"),
    "template empty": ({"template": ""}, "template"),
    "template of an unknown name": ({"template": "chats"}, "template", "chats"),
    "template with a capital": ({"template": "{Images}{text}"}, "{images}", "{Images}"),
    "template None": ({"template": None}, "template", "NoneType"),
    "template as bytes": ({"template": b"chat"}, "template", "bytes"),
    "template with a third image": ({"template": "<|image_pad|>{images}{text}"}, "2 images", "3"),
    "unknown argument": ({"max_length": 7}, "max_length"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_options_of_forward_are_refused_before_any_work(refuses, name):
    options, *messages = BAD_OUTPUTS[name]
    refuses(lambda model: model(FRAMES, TEXTS, **options), *messages)
    if "template" in options:
        refuses(lambda model: model.generate(FRAMES, TEXTS, **options), *messages)
        refuses(lambda model: model.processor(FRAMES, TEXTS, **options), *messages)


@pytest.mark.parametrize("layers", [(6,), (-7,), (), 3, (1.5,), (True,), "all", ([1],)])
def test_bad_vision_layers_are_refused_before_any_work(refuses, layers):
    refuses(lambda model: model.encode_images(FRAMES, layers=layers), "layers", str(layers))


BAD_SAMPLING = {
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens", "0"),
    "negative": ({"max_new_tokens": -1}, "max_new_tokens", "-1"),
    "a float": ({"max_new_tokens": 4.0}, "max_new_tokens", "4.0"),
    "a bool": ({"max_new_tokens": True}, "max_new_tokens", "True"),
    "beyond the model's maximum": ({"max_new_tokens": 4096}, "4096"),
    "temperature below 0": ({"temperature": -1.0}, "temperature", "-1.0"),
    "temperature nan": ({"temperature": float("nan")}, "temperature", "nan"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature", "inf"),
    "temperature as text": ({"temperature": "hot"}, "temperature", "hot"),
    "temperature beyond floats": ({"temperature": 10**400}, "temperature"),
    "stream as text": ({"stream": "print"}, "stream", "print"),
    "top_k below 0": ({"top_k": -1}, "top_k", "-1"),
    "top_k as a float": ({"top_k": 1.5}, "top_k", "1.5"),
    "top_p 0": ({"top_p": 0.0}, "top_p", "0.0"),
    "top_p above 1": ({"top_p": 1.5}, "top_p", "1.5"),
    "top_p nan": ({"top_p": float("nan")}, "top_p", "nan"),
    "seed as text": ({"seed": "7"}, "seed", "7"),
    "seed as a float": ({"seed": 7.5}, "seed", "7.5"),
    "seed as a bool": ({"seed": True}, "seed", "True"),
    "seed beyond 64 bits": ({"seed": 2**70, "temperature": 1.0}, "seed"),
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_bad_sampling_is_refused_before_any_work(refuses, name):
    options, *messages = BAD_SAMPLING[name]
    refuses(lambda model: model.generate(FRAMES, TEXTS, **options), *messages)


def test_a_prompt_longer_than_the_models_maximum_is_refused(refuses):
    long = ["Go.", "robot " * 5000]
    for images, options in ((None, {}), (FRAMES, {}), (MIXED, {"template": "plain"}), (FRAMES, {"camera_mask": MASK})):
        refuses(lambda model, images=images, options=options: model(images, long, **options), "4096", "tokens")
    refuses(lambda model: model.generate(FRAMES, long), "4096", "tokens")
    refuses(lambda model: model.processor(FRAMES, long), "4096", "tokens")


def test_images_that_take_more_tokens_than_the_models_maximum_are_refused(refuses):
    refuses(lambda model: model(FRAMES, TEXTS, resize=(28 * 64, 28 * 64)), "4096", "tokens")


BAD_TARGETS = {
    "a string for two texts": ("left", "targets", "one answer per text", "1 answers for 2"),
    "bytes": ([b"left", b"up"], "targets", "list of str", "bytes"),
    "None among them": (["left", None], "targets", "list of str", "NoneType"),
    "token ids": ([[1, 2], [3]], "targets", "list of str", "list"),
    "a tensor": (torch.zeros(2, 3), "targets", "list of str", "Tensor"),
    "empty": ([], "targets", "0 answers", "2 texts"),
    "too few": (["left"], "targets", "1 answers", "2 texts"),
    "too many": (["left"] * 3, "targets", "3 answers", "2 texts"),
    "half a surrogate pair": (["left", "\ud800"], "targets[1]", "surrogate"),
    "longer than the model's maximum": (["left", "robot " * 5000], "4096", "tokens"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
@pytest.mark.parametrize("images", [FRAMES, None], ids=["images", "text only"])
def test_bad_targets_are_refused_before_any_work(refuses, name, images):
    targets, *messages = BAD_TARGETS[name]
    refuses(lambda model: model(images, TEXTS, targets=targets), *messages)
    refuses(lambda model: model.processor(images, TEXTS, targets=targets), *messages)


def test_targets_without_texts_are_refused(refuses):
    refuses(lambda model: model(FRAMES, targets=["left", "up"]), "texts")
    refuses(lambda model: model.processor(FRAMES, targets=["left", "up"]), "texts")


def test_targets_need_a_token_before_them(refuses):
    refuses(lambda model: model(None, ["a", ""], targets=["left", "up"], template="plain"), "at least one token", "1")


def test_targets_without_an_output_projection_are_refused(load):
    model = load(lm_head=False)
    batch = model.processor(FRAMES, TEXTS, targets=["left", "up"])
    for call in (lambda: model(FRAMES, TEXTS, targets=["left", "up"]), lambda: model(**batch)):
        with no_work(model), pytest.raises(ValueError, match="lm_head=True"):
            call()


def test_a_batch_with_damaged_labels_is_refused(refuses, model):
    batch = model.processor(FRAMES, TEXTS, MASK, targets=["left", "up"])
    labels = batch["labels"]
    for damaged in (labels.float(), labels.tolist(), labels[:1], labels[:, 1:], torch.zeros_like(labels)):
        refuses(lambda model, damaged=damaged: model(**{**batch, "labels": damaged}), "labels")
    refuses(lambda model: model(**batch, targets=["left", "up"]), "targets")
    vocabulary = model.config.text.vocab_size
    for wrong in (-1, vocabulary, 2**62):
        outside = labels.where(labels < 0, wrong)
        if model.device.type == "cpu":
            refuses(lambda model, outside=outside: model(**{**batch, "labels": outside}), "labels", str(vocabulary - 1))


def test_gradients_in_a_cuda_graph_are_refused(load, monkeypatch):
    model = load()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for call in (lambda: model(FRAMES, TEXTS), lambda: model.encode_images(FRAMES)):
        with no_work(model), pytest.raises(ValueError, match="no_grad"):
            call()
    with torch.no_grad():
        check_no_gradient_in_a_capture(model, model.device)
    check_no_gradient_in_a_capture(model.requires_grad_(False), model.device)
    wanted = (FRAMES / 255).requires_grad_(True)
    batch = model.processor(FRAMES, TEXTS)
    batch["pixel_values"] = batch["pixel_values"].requires_grad_(True)
    by_camera = list(wanted.unbind(1))
    for call in (
        lambda: model(wanted, TEXTS),
        lambda: model(by_camera, TEXTS),
        lambda: model.encode_images(wanted),
        lambda: model(**batch),
    ):
        with no_work(model), pytest.raises(ValueError, match="no_grad"):
            call()


@pytest.mark.parametrize("field", ["input_ids", "attention_mask", "rope_positions", "camera_ids", "feature_index"])
def test_a_damaged_batch_is_refused(refuses, model, field):
    batch = model.processor(FRAMES, TEXTS, MASK)
    refuses(lambda model: model(**{name: value for name, value in batch.items() if name != field}), field)
    refuses(lambda model: model(**{**batch, field: batch[field][..., :-1]}), field)
    refuses(lambda model: model(**{**batch, field: batch[field].float()}), field)
    refuses(lambda model: model(**{**batch, field: None}), field)
    refuses(lambda model: model(**{**batch, field: batch[field].tolist()}), field)


BAD_BATCHES = {
    "no raster_order": lambda batch: batch.pop("raster_order"),
    "no pixel_values": lambda batch: batch.pop("pixel_values"),
    "pixel_values of 3 dimensions": lambda batch: batch.update(pixel_values=batch["pixel_values"][0]),
    "pixel_values of another grid": lambda batch: batch.update(pixel_values=batch["pixel_values"][:, :, 4:]),
    "pixel_values of another depth": lambda batch: batch.update(pixel_values=batch["pixel_values"][..., 1:]),
    "pixel_values of fewer samples": lambda batch: batch.update(pixel_values=batch["pixel_values"][:1]),
    "pixel_values of fewer cameras": lambda batch: batch.update(pixel_values=batch["pixel_values"][:, :1]),
    "pixel_values None": lambda batch: batch.update(pixel_values=None),
    "pixel_values uint8": lambda batch: batch.update(pixel_values=batch["pixel_values"].to(torch.uint8)),
    "pixel_values a list": lambda batch: batch.update(pixel_values=list(batch["pixel_values"].unbind(1))),
    "pixel_values for fewer grids": lambda batch: batch.update(raster_order=[batch["raster_order"]] * 3),
    "raster_order flat": lambda batch: batch.update(raster_order=batch["raster_order"].flatten()),
    "raster_order of another size": lambda batch: batch.update(raster_order=batch["raster_order"][:1]),
    "raster_order None": lambda batch: batch.update(raster_order=None),
    "camera_mask of another shape": lambda batch: batch.update(camera_present=batch["camera_present"][:1]),
    "camera_mask of another dtype": lambda batch: batch.update(camera_present=batch["camera_present"].float()),
    "no mark": lambda batch: batch.pop("prepared"),
    "another mark": lambda batch: batch.update(prepared={"tokens": 3}),
    "a field of earlier releases": lambda batch: batch.update(token_index=torch.arange(3)),
    "a field of transformers": lambda batch: batch.update(image_grid_thw=torch.ones(4, 3, dtype=torch.int64)),
    "a mask given later": lambda batch: batch.update(camera_mask=batch.pop("camera_present")),
    "a template given later": lambda batch: batch.update(template="plain"),
    "a size given later": lambda batch: batch.update(resize=(28, 28)),
    "images as well": lambda batch: batch.update(images=FRAMES),
    "texts as well": lambda batch: batch.update(texts=TEXTS),
    "unknown field": lambda batch: batch.update(labels=torch.zeros(2)),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_batch_that_does_not_fit_together_is_refused(refuses, model, name):
    batch = model.processor(FRAMES, TEXTS, MASK)
    BAD_BATCHES[name](batch)
    refuses(lambda model: model(**batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "both"}, "padding_side"),
        ({"padding_side": None}, "padding_side"),
        ({"min_pixels": -1}, "min_pixels"),
        ({"min_pixels": "784"}, "min_pixels"),
        ({"min_pixels": 784.5}, "min_pixels"),
        ({"min_pixels": True}, "min_pixels"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": float("nan")}, "max_pixels"),
        ({"max_pixels": float("inf")}, "max_pixels"),
        ({"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels"),
    ],
)
def test_bad_loading_options_are_refused(load, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(**options)


@pytest.mark.gpu
def test_frames_on_another_device_than_the_models_are_refused(load):
    model = load(device="cpu")
    before = results(model)
    calls = (
        lambda: model(FRAMES.cuda(), TEXTS),
        lambda: model([MIXED[0].cuda(), MIXED[1].cuda()], TEXTS),
        lambda: model([MIXED[0], MIXED[1].cuda()], TEXTS),
        lambda: model.encode_images(FRAMES.cuda()),
        lambda: model.generate(FRAMES.cuda(), TEXTS),
        lambda: model(FRAMES, TEXTS, camera_mask=MASK.cuda()),
    )
    for call in calls:
        with no_work(model), pytest.raises(ValueError, match="cuda"):
            call()
    assert all(map(torch.equal, results(model), before))


@pytest.mark.gpu
def test_host_frames_and_masks_are_copied_to_the_models_device(load):
    model = load(device="cuda")
    here = model(FRAMES, TEXTS, camera_mask=MASK)
    there = model(FRAMES.cuda(), TEXTS, camera_mask=MASK.cuda())
    own = there.attention_mask
    # A device mask may leave room for more cameras than there are: tokens are compared, not padding.
    assert torch.equal(here.last_hidden_state[here.attention_mask], there.last_hidden_state[own])


def test_hidden_states_of_another_width_are_refused(model):
    width = model.config.text.hidden_size
    mask, positions = (x.to(model.device) for x in (torch.ones(1, 1).bool(), torch.zeros(3, 1, 1).long()))
    for other in (width - 2, width + 2):
        with pytest.raises(ValueError, match=rf"{width}.*{other}"):
            model.logits(torch.zeros(1, other, device=model.device))
        with pytest.raises(ValueError, match=rf"{width}.*{other}"):
            model.model(torch.zeros(1, 1, other, device=model.device), positions, mask)

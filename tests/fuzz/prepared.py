"""Calls of the model with prepared batches, and of its two networks by themselves, right ones and odd ones."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from qwen_batched import QwenBatchedVL
from qwen_batched.inputs.prepared import HostFacts
from tests.fuzz import reading
from tests.fuzz.comparison import Wrong, compare_values
from tests.fuzz.mutation import mutate, odd_version
from tests.fuzz.public import Call, frames
from tests.fuzz.reading import Doubts, Refused
from tests.fuzz.rows import Row, compute_alone, read_pixels, read_rows

METHODS = ("forward", "forward", "forward", "visual", "decoder")
SIZES = ((28, 28), (56, 56), (56, 84), (28, 84))
TEXTS = ("Pick up the red block.", "Go.", "红色", "<|image_pad|>", " ")
Check = Callable[[QwenBatchedVL, object], None]


class PreparedCall(Call):
    """A call whose method may be one of the two networks."""

    def make(self, model: QwenBatchedVL) -> object:
        function = {"forward": model, "visual": model.visual, "decoder": model.model}[self.method]
        return function(**self.arguments)


def make_call(rng: Random, model: QwenBatchedVL, context: str) -> Call:
    """A right call with 0 to 3 changes."""
    method = rng.choice(METHODS)
    make, read = {
        "forward": (_batch, _read_forward),
        "visual": (_visual_arguments, _read_visual),
        "decoder": (_decoder_arguments, _read_decoder),
    }[method]
    with torch.no_grad():
        arguments = make(rng, model)
    notes = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if method == "forward" and rng.random() < 0.5:
            notes.append(_change_rows(arguments, rng, model))
        elif arguments:
            notes.append(mutate(arguments, rng))
    given = dict(arguments)
    return PreparedCall(method, arguments, notes, context, lambda doubts: read(given, model, doubts))


# --- right arguments ---


def _batch(rng: Random, model: QwenBatchedVL, like: dict[str, object] | None = None) -> dict[str, object]:
    """A prepared batch, and what is given beside it; of the same sizes as `like`."""
    batch, cameras = rng.choice((1, 2, 2, 3)), rng.choice((0, 1, 1, 2, 2, 3))
    images: object = None
    if cameras and rng.random() < 0.6:
        images = frames(rng, batch, cameras, 3, *rng.choice(SIZES), floating=False)
    elif cameras:
        images = [frames(rng, batch, 3, *rng.choice(SIZES), floating=False) for _ in range(cameras)]
    mask = targets = None
    if cameras and rng.random() < 0.4:
        mask = torch.tensor([[rng.random() < 0.7 for _ in range(cameras)] for _ in range(batch)])
    if rng.random() < 0.4:
        targets = [rng.choice(("left", "up and away", "")) for _ in range(batch)]
    texts = [rng.choice(TEXTS) for _ in range(batch)]
    template = rng.choice(("chat", "plain", "look {images} do {text} now"))
    prepared = dict(model.processor(images, texts, mask, targets=targets, template=template))
    prepared["layers"] = rng.choice(((-1,), (0, 2), [4, 1]))
    prepared["norm"] = rng.choice(("post", "pre"))
    prepared["logits"] = rng.choice((None, None, "last", "all"))
    return prepared


def _visual_arguments(rng: Random, model: QwenBatchedVL) -> dict[str, object]:
    batch = {}
    while "pixel_values" not in batch:
        batch = _batch(rng, model)
    names = ("pixel_values", "raster_order", "camera_present")
    layers = rng.choice((None, None, (0,), [1, -1]))
    chunk_size = rng.choice((None, 1, 3))
    return {name: batch[name] for name in names if name in batch} | {"layers": layers, "chunk_size": chunk_size}


def _decoder_arguments(rng: Random, model: QwenBatchedVL) -> dict[str, object]:
    batch = _batch(rng, model)
    mask = batch["attention_mask"]
    return {
        "inputs_embeds": model.model.embed_tokens(batch["input_ids"]),
        "position_ids": batch["rope_positions"].transpose(0, 1),
        "attention_mask": mask,
        "layers": batch["layers"],
        "norm": batch["norm"],
        "tokens": rng.choice((None, int(mask.sum()), mask.numel())),
    }


# --- what loaders do to batches, and what they must not ---


def _change_rows(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> str:
    what = rng.choice(tuple(CHANGES))
    try:
        CHANGES[what](arguments, rng, model)
    except (IndexError, RuntimeError, TypeError, AttributeError, KeyError, ValueError):
        return f"{what}, which is impossible"
    return what


def _fields(arguments: dict[str, object]) -> list[str]:
    """Names of what has B first."""
    return [name for name, value in arguments.items() if name not in ("layers", "norm", "logits", "prepared")]


def _each(value: object, change: Callable[[Tensor], Tensor]) -> object:
    return change(value) if isinstance(value, Tensor) else [change(part) for part in value]


def _take_rows(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    size = len(arguments["input_ids"])
    rows = torch.tensor([rng.randrange(size) for _ in range(rng.randint(1, 3))])
    changed = {name: _each(arguments[name], lambda x: x[rows]) for name in _fields(arguments)}
    arguments.update(changed, prepared=arguments["prepared"][rows])


def _join(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    """The batch twice, its rows behind each other."""
    changed = {name: _each(arguments[name], lambda x: torch.cat([x, x.flip(0)])) for name in _fields(arguments)}
    arguments.update(changed, prepared=HostFacts())


def _cut_columns(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    columns = slice(rng.randint(0, 2), None) if rng.random() < 0.7 else slice(None, -rng.randint(1, 2))
    names = ("input_ids", "attention_mask", "rope_positions", "camera_ids", "feature_index", "labels")
    changed = {name: arguments[name][..., columns] for name in names if name in arguments}
    arguments.update(changed)


def _pad(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    fill = {"camera_ids": -1, "feature_index": -1, "labels": -100}
    names = ("input_ids", "attention_mask", "rope_positions", "camera_ids", "feature_index", "labels")
    widths = rng.choice(((1, 0), (0, 2), (2, 1)))
    changed = {
        name: torch.nn.functional.pad(arguments[name], widths, value=fill.get(name, 0))
        for name in names
        if name in arguments
    }
    arguments.update(changed)


def _other_text(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    ids = arguments["input_ids"].clone()
    ids[rng.randrange(len(ids)), rng.randrange(ids.shape[1])] = rng.randrange(model.config.text.vocab_size)
    arguments["input_ids"] = ids


def _from_another(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    other = _batch(rng, model)
    name = rng.choice([name for name in _fields(other) if name in arguments])
    arguments[name] = other[name]


def _swap_fields(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    a, b = rng.sample(_fields(arguments), 2)
    arguments[a], arguments[b] = arguments[b], arguments[a]


def _rows_of_one(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    name = rng.choice(_fields(arguments))
    arguments[name] = _each(arguments[name], lambda x: x.flip(0))


def _drop_camera(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    pixels = arguments["pixel_values"]
    arguments["pixel_values"] = pixels[:, 1:] if isinstance(pixels, Tensor) else pixels[1:]
    if rng.random() < 0.5 and not isinstance(pixels, Tensor):
        arguments["raster_order"] = arguments["raster_order"][1:]


def _drop_fields(*names: str) -> Callable[[dict[str, object], Random, QwenBatchedVL], None]:
    def drop(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
        for name in names:
            del arguments[name]

    return drop


def _odd_facts(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    arguments["prepared"] = rng.choice(
        (
            *(HostFacts(tokens=1), HostFacts(tokens=10**9, answer_tokens=10**9), HostFacts(tokens=0, answer_tokens=0)),
            *(HostFacts(tokens=-1), HostFacts(), HostFacts(tokens="many"), {}, {"tokens": 3}, True, None),
            *("prepared", torch.ones(1)),
        )
    )


def _odd_field(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    name = rng.choice(_fields(arguments))
    _, arguments[name] = odd_version(name, arguments[name], rng)


def _images_too(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    name = rng.choice(("texts", "images", "camera_mask", "targets"))
    values = {"texts": ["Go."], "images": torch.zeros(1, 1, 3, 28, 28), "targets": ["left"]}
    arguments[name] = values.get(name, torch.ones(1, 1, dtype=torch.bool))


def _all_present(arguments: dict[str, object], rng: Random, model: QwenBatchedVL) -> None:
    pixels = arguments["pixel_values"]
    cameras = pixels.shape[1] if isinstance(pixels, Tensor) else len(pixels)
    arguments["camera_present"] = torch.ones(len(arguments["input_ids"]), cameras, dtype=torch.bool)


CHANGES: dict[str, Callable[[dict[str, object], Random, QwenBatchedVL], None]] = {
    "some rows": _take_rows,
    "joined": _join,
    "columns cut": _cut_columns,
    "padded": _pad,
    "another token": _other_text,
    "a field of another batch": _from_another,
    "two fields swapped": _swap_fields,
    "one field's rows turned": _rows_of_one,
    "a camera dropped": _drop_camera,
    "without pixels": _drop_fields("pixel_values", "raster_order"),
    "without grids": _drop_fields("raster_order"),
    "without marker": _drop_fields("prepared"),
    "without labels": _drop_fields("labels"),
    "without presence": _drop_fields("camera_present"),
    "all cameras present": _all_present,
    "odd facts": _odd_facts,
    "an odd field": _odd_field,
    "images or texts too": _images_too,
}


# --- what a call asks for ---


def _read_forward(arguments: dict[str, object], model: QwenBatchedVL, doubts: Doubts) -> Check:
    given = dict(arguments)
    layers = reading.read_layers(given.pop("layers", (-1,)), model.config.text.num_hidden_layers + 1, doubts)
    reading.read_choice(norm := given.pop("norm", "post"), ("post", "pre"))
    reading.read_choice(logits := given.pop("logits", None), (None, "last", "all"))
    rows = read_rows(given, model.config, doubts)

    def check(model: QwenBatchedVL, out: object) -> None:
        _check_output(out, rows, [compute_alone(model, row, layers, norm) for row in rows], logits)

    return check


def _check_output(out: object, rows: list[Row], alone: list[dict[str, object]], logits: str | None) -> None:
    for index, (row, one) in enumerate(zip(rows, alone, strict=True)):
        own = row.mask
        if not torch.equal(out.attention_mask[index], own) or not torch.equal(out.input_ids[index][own], row.ids):
            raise Wrong("another mask or other ids than given")
        if not torch.equal(out.position_ids[:, index][:, own], row.positions):
            raise Wrong("other positions than given")
        if not row.finite:
            continue
        for ours, theirs in zip(out.hidden_states, one["hidden_states"], strict=True):
            compare_values("hidden_states", ours[index][own], theirs)
        if logits is not None:
            ours = out.logits[index] if logits == "last" else out.logits[index][own]
            compare_values("logits", ours, one["logits"][-1] if logits == "last" else one["logits"])
    losses = [one["losses"] for one in alone]
    if any(loss is None for loss in losses):
        if out.loss is not None:
            raise Wrong("a loss without labels")
    elif all(row.finite and row.in_one_piece for row in rows):
        every = torch.cat(losses)
        compare_values("loss", out.loss, every.sum() / max(1, len(every)))


def _read_visual(arguments: dict[str, object], model: QwenBatchedVL, doubts: Doubts) -> Check:
    names = {"pixel_values", "raster_order", "camera_present", "layers", "chunk_size"}
    if set(arguments) - names or not {"pixel_values", "raster_order"} <= set(arguments):
        raise Refused("unknown arguments, or too few")
    if (layers := arguments.get("layers")) is not None:
        layers = reading.read_layers(layers, model.config.vision.depth, doubts)
    if arguments.get("chunk_size") is not None:
        reading.read_int(arguments["chunk_size"], doubts, least=1)
    images, grids = read_pixels(arguments["pixel_values"], arguments["raster_order"], model.config.vision, doubts)
    size = len(images[0])
    present = torch.ones(size, len(images), dtype=torch.bool)
    if arguments.get("camera_present") is not None:
        mask = reading.read_tensor(arguments["camera_present"], doubts)
        if mask.dtype != torch.bool or mask.shape != present.shape:
            raise Refused("camera_present that is not bool (B, V)")
        present = mask

    def check(model: QwenBatchedVL, out: object) -> None:
        for place in range(1 if layers is None else len(layers)):
            ours = out if layers is None else out[place]
            by_camera = list(ours.unbind(1)) if isinstance(ours, Tensor) else ours
            for camera, (pixels, (h, w)) in enumerate(zip(images, grids, strict=True)):
                for sample in range(size):
                    own = by_camera[camera][sample]
                    if not present[sample, camera]:
                        if bool((own != 0).any()):
                            raise Wrong("features of an absent camera are not zero")
                    elif bool(pixels[sample].isfinite().all()):
                        order = torch.zeros(1, h, w, dtype=torch.int64)
                        alone = model.visual(pixels[None, sample : sample + 1], order, layers=layers)
                        compare_values("features", own, (alone if layers is None else alone[place])[0, 0])

    return check


def _read_decoder(arguments: dict[str, object], model: QwenBatchedVL, doubts: Doubts) -> Check:
    needed = {"inputs_embeds", "position_ids", "attention_mask"}
    if set(arguments) - needed - {"layers", "norm", "tokens"} or not needed <= set(arguments):
        raise Refused("unknown arguments, or too few")
    layers = reading.read_layers(arguments.get("layers", (-1,)), model.config.text.num_hidden_layers + 1, doubts)
    reading.read_choice(norm := arguments.get("norm", "post"), ("post", "pre"))
    embeds, positions, mask = (
        reading.read_tensor(arguments[name], doubts) for name in ("inputs_embeds", "position_ids", "attention_mask")
    )
    if embeds.ndim != 3 or embeds.numel() == 0 or embeds.shape[2] != model.config.text.hidden_size:
        raise Refused("embeddings that are not (B, S, D)")
    if embeds.dtype != model.dtype or positions.dtype != torch.int64 or mask.dtype != torch.bool:
        raise Refused("another dtype")
    if positions.shape != (3, *embeds.shape[:2]) or mask.shape != embeds.shape[:2]:
        raise Refused("shapes that do not fit together")
    if arguments.get("tokens") is not None:
        reading.read_int(arguments["tokens"], doubts, least=max(1, int(mask.sum())), most=mask.numel())

    def check(model: QwenBatchedVL, out: object) -> None:
        for sample, own in enumerate(mask):
            if not bool(own.any()) or not bool(embeds[sample][own].isfinite().all()):
                continue
            alone = model.model(
                embeds[sample][own][None], positions[:, sample][:, own][:, None], own[own][None], layers, norm
            )
            for ours, theirs in zip(out, alone, strict=True):
                compare_values("hidden states", ours[sample][own], theirs[0])

    return check

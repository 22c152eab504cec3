"""Calls of the model and its processor as users make them, right ones and odd ones, and what they should give."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from qwen_batched import QwenBatchedVL
from tests.fuzz import reading
from tests.fuzz.comparison import Wrong, compare_features, compare_generated, compare_output, compare_values
from tests.fuzz.mutation import mutate
from tests.fuzz.reading import Doubts, Refused, Sample

SIZES = ((28, 28), (56, 56), (56, 84), (84, 56), (60, 75), (31, 90), (112, 40))
WHOLE_SIZES = SIZES[:4]
TEXTS = ("Pick up the red block.", "Go.", "Open the drawer, then close it.", "红色", "<|im_end|>", "🤖", "")
TEMPLATES = ("{images}{text}", "look {images} do {text} now", "{text} {images}")
METHODS = (
    "forward",
    "forward",
    "forward",
    "generate",
    "encode_images",
    "encode_images",
    "processor",
    "capture",
    "logits",
)


Arguments = dict[str, object]
Check = Callable[[QwenBatchedVL, object], None]  # raises `Wrong` where a result is not right


class Pieces(list):
    """What a stream gets."""

    def __call__(self, pieces: list[str]) -> None:
        self.append(pieces)

    def joined(self) -> list[str]:
        return ["".join(pieces) for pieces in zip(*self, strict=True)]


@dataclass
class Call:
    """A call to make.

    Attributes:
        method: Of the model; "processor" for its processor.
        arguments: By name.
        notes: How it differs from a right one.
        context: The name of what it is made under, see `calls.CONTEXTS`.
        check: Raises `Wrong` where the result is not right, `Refused` where there must be none. Takes the model, the
            result and doubts.
    """

    method: str
    arguments: dict[str, object]
    notes: list[str]
    context: str
    read: Callable[[Doubts], Check]
    draws: bool = field(default=False)

    def make(self, model: QwenBatchedVL) -> object:
        function = {"forward": model, "processor": model.processor}.get(self.method) or getattr(model, self.method)
        return function(**self.arguments)


def make_call(rng: Random, model: QwenBatchedVL, context: str) -> Call:
    """A right call with 0 to 3 changes."""
    method = rng.choice(METHODS)
    arguments = _logits_call(rng, model) if method == "logits" else _right_arguments(method, rng)
    notes = [mutate(arguments, rng) for _ in range(rng.choice((0, 1, 1, 1, 2, 3))) if arguments]
    readers = {
        "forward": _read_forward,
        "capture": _read_capture,
        "generate": _read_generate,
        "encode_images": _read_encode_images,
        "processor": _read_processor,
        "logits": _read_logits,
    }
    given = dict(arguments)
    call = Call(method, arguments, notes, context, lambda doubts: readers[method](given, model, doubts))
    temperature = arguments.get("temperature", 0)
    call.draws = method == "generate" and arguments.get("seed") is None and temperature is not None
    return call


def frames(rng: Random, *shape: int, floating: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    whole = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return (
        whole.to(rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))) / 255 if floating else whole
    )


def _right_arguments(method: str, rng: Random) -> dict[str, object]:
    batch, cameras = rng.choice((1, 1, 2, 2, 3)), rng.choice((0, 1, 1, 2, 2, 3))
    if method == "encode_images":
        cameras = max(cameras, 1)
    resize = rng.choice(("hf", "hf", "hf", None, (56, 84), [28, 28]))
    sizes = WHOLE_SIZES if resize is None else SIZES
    images: object = None
    if cameras and rng.random() < 0.6:
        images = frames(rng, batch, cameras, 3, *rng.choice(sizes), floating=rng.random() < 0.4)
    elif cameras:
        size = rng.choice(sizes)
        both = (size, size) if rng.random() < 0.3 else sizes
        images = [frames(rng, batch, 3, *rng.choice(both), floating=rng.random() < 0.3) for _ in range(cameras)]
    arguments: dict[str, object] = {"images": images}
    if method != "encode_images":
        arguments["texts"] = [rng.choice(TEXTS) for _ in range(batch)]
        arguments["template"] = rng.choice(("chat", "chat", "plain", *TEMPLATES, "{image} " * cameras + "{text}"))
        if arguments["template"] == "chat" and rng.random() < 0.2:
            arguments["system"] = rng.choice(("You are a robot.", "Answer.\nBe brief.", ""))
    if cameras and rng.random() < 0.4:
        arguments["camera_mask"] = torch.tensor([[rng.random() < 0.7 for _ in range(cameras)] for _ in range(batch)])
    arguments["resize"] = resize
    if method in ("forward", "capture"):
        arguments["layers"] = rng.choice(((-1,), (0, 2), [4, 1], (3,)))
        arguments["norm"] = rng.choice(("post", "pre"))
        arguments["logits"] = rng.choice((None, None, "last", "all"))
    if method in ("forward", "capture", "processor") and rng.random() < 0.3:
        arguments["targets"] = [rng.choice(("left", "up and away", "")) for _ in range(batch)]
    if method == "generate":
        arguments["max_new_tokens"] = rng.choice((1, 2, 3))
        if rng.random() < 0.4:
            arguments |= {"temperature": rng.choice((0.5, 1)), "seed": rng.choice((0, 7, None))}
            arguments |= {"top_k": rng.choice((0, 3)), "top_p": rng.choice((1.0, 0.8))}
        if rng.random() < 0.2:
            arguments["stream"] = Pieces()
    if method == "encode_images":
        arguments["layers"] = rng.choice((None, None, (0,), [1, -1]))
        arguments["chunk_size"] = rng.choice((None, 1, 2))
    if method == "processor":
        arguments["dtype"] = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        arguments["device"] = rng.choice((None, "cpu"))
        arguments["max_new_tokens"] = rng.choice((0, 5))
    return arguments


def _logits_call(rng: Random, model: QwenBatchedVL) -> dict[str, object]:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    shape = rng.choice(((1,), (3,), (2, 5), (0,), (2, 1, 2)))
    return {"hidden_states": torch.randn(*shape, model.config.text.hidden_size, generator=generator)}


# --- what a call asks for ---


def _check_names(arguments: dict[str, object], *names: str, needed: tuple[str, ...] = ()) -> None:
    if set(arguments) - set(names) or set(needed) - set(arguments):
        raise Refused("unknown arguments, or too few")


COMMON = ("images", "texts", "camera_mask", "template", "resize", "system")
OF_PROMPTS = ("template", "resize", "system")


def _samples(arguments: dict[str, object], doubts: Doubts, has_texts: bool = True) -> list[Sample]:
    samples = reading.read_samples(
        arguments.get("images"),
        arguments.get("texts"),
        arguments.get("camera_mask"),
        arguments.get("targets"),
        arguments.get("resize", "hf"),
        doubts,
        has_texts,
    )
    if has_texts or arguments.get("texts") is not None:
        template = arguments.get("template", "chat")
        reading.read_template(template, samples, doubts)
        reading.read_system(arguments.get("system"), template, doubts)
    elif arguments.get("system") is not None:
        raise Refused("a system text without texts")
    return samples


def _read_forward(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    _check_names(arguments, *COMMON, "layers", "norm", "logits", "targets")
    samples = _samples(arguments, doubts)
    layers = reading.read_layers(arguments.get("layers", (-1,)), model.config.text.num_hidden_layers + 1, doubts)
    reading.read_choice(norm := arguments.get("norm", "post"), ("post", "pre"))
    reading.read_choice(logits := arguments.get("logits"), (None, "last", "all"))
    options = {"layers": layers, "norm": norm, "logits": logits, **_kept(arguments, *OF_PROMPTS)}

    def check(model: QwenBatchedVL, out: object) -> None:
        alone = [model(**sample.arguments(options.get("template")), **options) for sample in samples]
        compare_output(
            out, samples, alone, _cameras(arguments), _labels(model, samples, options), options.get("template")
        )

    return check


def _read_capture(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    if "images" not in arguments:
        raise Refused("no images")
    _read_forward(arguments, model, doubts)

    def check(model: QwenBatchedVL, out: object) -> None:
        if out is not None:
            raise Wrong("capture returns something")

    return check


def _read_generate(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    sampling = ("temperature", "top_k", "top_p", "seed")
    _check_names(arguments, *COMMON, "max_new_tokens", "stream", *sampling, needed=("images", "texts"))
    samples = _samples(arguments, doubts)
    most = model.config.text.max_position_embeddings
    steps = reading.read_int(arguments.get("max_new_tokens", 128), doubts, least=1, most=most)
    if steps > most // 2:
        doubts.add("many new tokens")
    temperature = reading.read_number(arguments.get("temperature", 0.0), doubts)
    top_p = reading.read_number(arguments.get("top_p", 1.0), doubts)
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise Refused("sampling out of range")
    reading.read_int(arguments.get("top_k", 0), doubts, least=0)
    if arguments.get("seed") is not None:
        reading.read_int(arguments["seed"], doubts, least=0, most=2**63 - 1)
    kept = _kept(arguments, *OF_PROMPTS, "max_new_tokens")
    stream = arguments.get("stream")
    if stream is not None and not callable(stream):
        raise Refused("a stream that is no function")
    if stream is not None and not isinstance(stream, Pieces):
        doubts.add("another function as stream")

    def check(model: QwenBatchedVL, out: object) -> None:
        if isinstance(stream, Pieces) and stream.joined() != out.texts:
            raise Wrong("the pieces of a stream are not its texts")
        drawn = _kept(arguments, *sampling)
        if temperature == 0:
            layout = kept.get("template")
            alone = [model.generate(**sample.arguments(layout), **kept, **drawn) for sample in samples]
            compare_generated(model, out, samples, alone, kept)
            return
        if any(len(tokens) > steps for tokens in out.token_ids) or len(out.texts) != len(samples):
            raise Wrong("another number of tokens or texts")
        if arguments.get("seed") is not None and all(sample.finite for sample in samples):
            again = model.generate(**arguments | {"stream": None})
            if again.texts != out.texts or again.finish_reasons != out.finish_reasons:
                raise Wrong("a seed gives other tokens the second time")

    return check


def _read_encode_images(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    _check_names(arguments, "images", "layers", "camera_mask", "resize", "chunk_size", needed=("images",))
    samples = _samples(arguments, doubts, has_texts=False)
    layers = arguments.get("layers")
    if layers is not None:
        layers = reading.read_layers(layers, model.config.vision.depth, doubts)
    if arguments.get("chunk_size") is not None:
        reading.read_int(arguments["chunk_size"], doubts, least=1)
    kept = _kept(arguments, "resize")

    def check(model: QwenBatchedVL, out: object) -> None:
        alone = [model.encode_images(x.frames, layers=layers, **kept) if x.frames else None for x in samples]
        for index in range(1 if layers is None else len(layers)):
            ours = out if layers is None else out[index]
            each = [x if layers is None or x is None else x[index] for x in alone]
            compare_features(ours, samples, each, _cameras(arguments))

    return check


def _read_processor(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    _check_names(arguments, *COMMON, "targets", "dtype", "device", "max_new_tokens", needed=("images",))
    samples = _samples(arguments, doubts, has_texts=False)
    dtype = arguments.get("dtype", torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        if not isinstance(dtype, str):
            raise Refused("a dtype that is not floating")
        doubts.add("a dtype by name")
    device = arguments.get("device")
    if device is not None and (isinstance(device, int) or str(device) != "cpu"):
        raise Refused("a device without memory, or none of this machine")
    limit = model.config.text.max_position_embeddings // 2
    if reading.read_int(arguments.get("max_new_tokens", 0), doubts, least=0) > limit:
        if arguments.get("texts") is not None:
            raise Refused("more tokens than the model takes")
        doubts.add("room for tokens behind no prompt")
    options = _kept(arguments, *OF_PROMPTS, "dtype")

    def check(model: QwenBatchedVL, out: object) -> None:
        def alone(sample: Sample) -> dict[str, object]:
            return model.processor(**sample.arguments(options.get("template")), **options)

        if samples[0].text is None:
            features = [
                model.visual(*_pixels(model.processor(sample.frames, **options))) if sample.frames else None
                for sample in samples
            ]
            compare_features(model.visual(*_pixels(out)), samples, features, _cameras(arguments))
            return
        outputs = [model(**alone(sample)) for sample in samples]
        labels = _labels(model, samples, options)
        compare_output(model(**out), samples, outputs, _cameras(arguments), labels, options.get("template"))

    return check


def _read_logits(arguments: Arguments, model: QwenBatchedVL, doubts: Doubts) -> Check:
    _check_names(arguments, "hidden_states", needed=("hidden_states",))
    hidden = reading.read_tensor(arguments["hidden_states"], doubts)
    if hidden.ndim == 0 or hidden.shape[-1] != model.config.text.hidden_size or hidden.dtype != model.dtype:
        raise Refused("hidden states of another width or dtype")
    head = model.lm_head or model.model.embed_tokens

    def check(model: QwenBatchedVL, out: object) -> None:
        finite = hidden.isfinite().all(dim=-1)
        compare_values("logits", out[finite], (hidden.double() @ head.weight.double().T)[finite])

    return check


def _kept(arguments: dict[str, object], *names: str) -> dict[str, object]:
    return {name: arguments[name] for name in names if name in arguments}


def _cameras(arguments: dict[str, object]) -> int:
    images = arguments.get("images")
    return 0 if images is None else images.shape[1] if isinstance(images, Tensor) else len(images)


def _labels(model: QwenBatchedVL, samples: list[Sample], options: dict[str, object]) -> list[int] | None:
    """How many labels each sample has."""
    if any(sample.target is None for sample in samples):
        return None
    layout = _kept(options, *OF_PROMPTS)
    batches = [model.processor(**sample.arguments(layout.get("template")), **layout) for sample in samples]
    return [int((batch["labels"] >= 0).sum()) for batch in batches]


def _pixels(batch: dict[str, object]) -> tuple[object, ...]:
    return batch["pixel_values"], batch["raster_order"], batch.get("camera_present")

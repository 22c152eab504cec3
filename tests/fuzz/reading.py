"""What a call asks for, read from its arguments by the words of the contract and by none of the package's code.

A call is read into samples, each of which can be computed alone; or it is found to be one that must be refused.
"""

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

CELL = 28
LONGEST_SURE = 300  # characters of a text that surely fits


class Refused(Exception):
    """The call must raise `ValueError` or `TypeError`."""


@dataclass
class Doubts:
    """Why the contract leaves open whether a call is refused. Whatever runs must be right all the same."""

    reasons: list[str] = field(default_factory=list)

    def add(self, reason: str) -> None:
        self.reasons.append(reason)


@dataclass
class Sample:
    """One sample alone.

    Attributes:
        frames: Of each present camera (1, 3, H, W), contiguous and plain.
        cameras: Their indices in the call.
        text: None for images alone.
        target: None for no loss.
        all_frames: Of each camera, present or not.
    """

    frames: list[Tensor]
    cameras: list[int]
    text: str | None
    target: str | None
    all_frames: list[Tensor]

    @property
    def finite(self) -> bool:
        return all(bool(frame.isfinite().all()) for frame in self.frames)

    def arguments(self, template: object = "chat") -> dict[str, object]:
        """Those of a call with this sample alone: of its present cameras, but where a template has a place for each."""
        given: dict[str, object] = {"images": self.frames or None}
        if self.all_frames and isinstance(template, str) and has_places(template):
            mask = torch.zeros(1, len(self.all_frames), dtype=torch.bool)
            mask[0, self.cameras] = True
            given = {"images": self.all_frames, "camera_mask": mask}
        if self.text is not None:
            given["texts"] = [self.text]
        return given if self.target is None else given | {"targets": [self.target]}


def has_places(template: str) -> bool:
    """Whether a template has a place for each camera, not one for all."""
    return template not in ("chat", "plain") and "{images}" not in template


def read_tensor(value: object, doubts: Doubts) -> Tensor:
    """A plain, contiguous copy. Raises `Refused` for what is no dense tensor with values on the host."""
    if not isinstance(value, Tensor):
        raise Refused(f"{type(value).__name__} for a tensor")
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        raise Refused("a layout that is not dense")
    if value.device.type != "cpu" or isinstance(value, FakeTensor):
        raise Refused("a tensor without values")
    if type(value) not in (Tensor, nn.Parameter):
        doubts.add("a tensor of another class")
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        plain = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return plain.copy_(value.detach().resolve_conj().resolve_neg())


def read_samples(
    images: object,
    texts: object,
    camera_mask: object,
    targets: object,
    resize: object,
    doubts: Doubts,
    has_texts: bool = True,
) -> list[Sample]:
    """The samples of a call, whose `texts` may be left out where `has_texts` is False."""
    cameras = None if images is None else read_frames(images, doubts)
    size = None if cameras is None else cameras[0].shape[0]
    words = read_strings(texts, size, doubts) if has_texts or texts is not None else None
    if words is None and cameras is None:
        raise Refused("neither images nor texts")
    size = len(words) if size is None else size
    answers = [None] * size
    if targets is not None:
        if words is None:
            raise Refused("targets without texts")
        answers = read_strings(targets, size, doubts)
    present = torch.ones(size, len(cameras or ()), dtype=torch.bool)
    if camera_mask is not None:
        mask = read_tensor(camera_mask, doubts)
        if cameras is None or mask.dtype != torch.bool or mask.shape != present.shape:
            raise Refused("a camera mask that is not bool (B, V)")
        present = mask
    read_resize(resize, [tuple(camera.shape[-2:]) for camera in cameras or ()], doubts)
    samples = []
    for index in range(size):
        here = [camera for camera in range(present.shape[1]) if present[index, camera]]
        frames = [cameras[camera][index : index + 1].clone() for camera in here]
        every = [camera[index : index + 1].clone() for camera in cameras or ()]
        samples.append(Sample(frames, here, words[index] if words else None, answers[index], every))
    _check_range(samples)
    return samples


def read_frames(images: object, doubts: Doubts) -> list[Tensor]:
    """(B, 3, H, W) of each camera."""
    if isinstance(images, Tensor):
        plain = read_tensor(images, doubts)
        if plain.ndim != 5 or plain.shape[1] == 0:
            raise Refused("images that are not (B, V, 3, H, W)")
        cameras = list(plain.unbind(1))
    elif isinstance(images, (list, tuple)) and images:
        cameras = [read_tensor(camera, doubts) for camera in images]
    else:
        raise Refused("images that are neither a tensor nor a list of tensors")
    for camera in cameras:
        if camera.ndim != 4 or camera.shape[1] != 3 or camera.shape[0] == 0:
            raise Refused("a camera that is not (B, 3, H, W)")
        if camera.shape[0] != cameras[0].shape[0]:
            raise Refused("cameras of different B")
        height, width = camera.shape[-2:]
        if min(height, width) < CELL or max(height, width) > 200 * min(height, width):
            raise Refused("a size that the model does not take")
        if camera.dtype != torch.uint8 and not camera.dtype.is_floating_point:
            raise Refused(f"frames of {camera.dtype}")
        if camera.dtype.itemsize == 1 and camera.dtype != torch.uint8:
            doubts.add("frames in 8 floating bits")
    return cameras


def _check_range(samples: list[Sample]) -> None:
    for frame in (frame for sample in samples for frame in sample.frames):
        if frame.dtype.is_floating_point:
            values = frame.double()
            values = values[values.isfinite()]
            if values.numel() and (values.min() < -0.5 or values.max() > 1.5):
                raise Refused("floating frames beyond 0..1")


def read_strings(strings: object, size: int | None, doubts: Doubts) -> list[str]:
    if isinstance(strings, str) and size in (None, 1):
        doubts.add("a string for B = 1")
        strings = [strings]
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) for string in strings):
        raise Refused("texts that are no list of str")
    if not strings or (size is not None and len(strings) != size):
        raise Refused("another number of texts than of samples")
    if any("\ud800" <= character <= "\udfff" for string in strings for character in string):
        raise Refused("half of a surrogate pair")
    if any(len(string) > LONGEST_SURE for string in strings):
        doubts.add("a text that may be too long")
    return [str(string) for string in strings]


def read_resize(resize: object, sizes: list[tuple[int, int]], doubts: Doubts) -> None:
    if resize is None:
        if any(side % CELL for size in sizes for side in size):
            raise Refused("resize=None for sizes that the model does not take")
        return
    if isinstance(resize, str):
        if resize != "hf":
            raise Refused("an unknown resize")
        return
    if not isinstance(resize, (list, tuple)) or len(resize) != 2:
        raise Refused("resize that is no size")
    height, width = (read_int(side, doubts) for side in resize)
    if min(height, width) < CELL or height % CELL or width % CELL or height * width > 2**31:
        raise Refused("resize to a size that the model does not take")
    if height * width > 10**6:
        doubts.add("a large size")


def read_int(value: object, doubts: Doubts, least: int | None = None, most: int | None = None) -> int:
    """NumPy's integers are ints, bools are not."""
    if isinstance(value, Tensor):
        if value.ndim or value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise Refused("a tensor for an int")
        doubts.add("a tensor for an int")
        value = value.item()
    try:
        number = operator.index(value)
    except TypeError as error:
        raise Refused(f"{type(value).__name__} for an int") from error
    if isinstance(value, bool):
        raise Refused("a bool for an int")
    if (least is not None and number < least) or (most is not None and number > most):
        raise Refused("an int out of range")
    return number


def read_layers(layers: object, size: int, doubts: Doubts) -> list[int]:
    if not isinstance(layers, (list, tuple)) or not layers:
        raise Refused("layers that are no list of ints")
    return [read_int(layer, doubts, -size, size - 1) % size for layer in layers]


def read_choice(value: object, choices: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise Refused("an unknown choice")


def read_template(template: object, samples: list[Sample], doubts: Doubts) -> None:
    if not isinstance(template, str):
        raise Refused("a template that is no str")
    if template in ("chat", "plain"):
        if template == "plain" and any(not sample.text and not sample.frames for sample in samples):
            doubts.add("an empty prompt")
        return
    if template.count("{text}") != 1 or template.count("{images}") > 1:
        raise Refused("a template without one place for texts, or with two for images")
    places = template.count("{image}") + template.count("<|image_pad|>")
    if has_places(template) and places != len(samples[0].all_frames):
        raise Refused("a template without a place for each camera")
    rest = template.replace("{text}", "").replace("{images}", "")
    if any(sign in rest for sign in "{}<>") or not rest.isascii():
        doubts.add("a template with more in it")
    if any(not sample.text and not sample.frames for sample in samples):
        doubts.add("a prompt that may be empty")


def read_system(system: object, template: object, doubts: Doubts) -> None:
    if system is None:
        return
    if not isinstance(system, str):
        raise Refused("a system text that is no str")
    if any("\ud800" <= character <= "\udfff" for character in system):
        raise Refused("half of a surrogate pair")
    if template != "chat":
        raise Refused("a system text for a template that has none")
    if len(system) > LONGEST_SURE or "<|" in system:
        doubts.add("a system text that may be too long, or holds control tokens")


def read_number(value: object, doubts: Doubts) -> float:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
        raise Refused(f"{type(value).__name__} for a number")
    if not isinstance(value, (int, float)):
        doubts.add("another kind of number")
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise Refused("not a number") from error

"""Whether results of a batch are those of its samples alone."""

from typing import Any

import torch
from torch import Tensor

from qwen_batched import QwenBatchedVL
from tests.fuzz.reading import Sample, has_places
from tests.support import FLOAT32_TOLERANCE

# Two tokens as likely as this apart, in units of the logits' spread, may change places in a batch.
TIE = 1e-4


class Wrong(Exception):
    """A result is not right."""


def compare_values(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises `Wrong` where the relative L2 distance is above the tolerance."""
    if ours.shape != theirs.shape:
        raise Wrong(f"{name} is {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if not bool(ours.isfinite().all()):
        raise Wrong(f"{name} is not finite")
    distance = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    if distance > FLOAT32_TOLERANCE:
        raise Wrong(f"{name} is off by {distance:.1e}")


def compare_exactly(name: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise Wrong(f"{name} is not that of the sample alone")


def compare_output(
    out: Any, samples: list[Sample], alone: list[Any], cameras: int, labels: list[int] | None, template: object
) -> None:
    """`out` of a batch against those of its samples alone, `labels` of which each has.

    Alone they had their present cameras, or all of them, see `Sample.arguments`.
    """
    whole = isinstance(template, str) and has_places(template)
    for index, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        own = out.attention_mask[index]
        if int(own.sum()) != one.input_ids.shape[1]:
            raise Wrong(f"sample {index} has {int(own.sum())} tokens, alone {one.input_ids.shape[1]}")
        compare_exactly("input_ids", out.input_ids[index][own], one.input_ids[0])
        compare_exactly("position_ids", out.position_ids[:, index][:, own], one.position_ids[:, 0])
        compare_exactly("image_mask", out.image_mask[index][own], one.image_mask[0])
        table = torch.tensor([*(range(cameras) if whole else sample.cameras), -1])
        compare_exactly("camera_ids", out.camera_ids[index][own], table[one.camera_ids[0]])
        if not sample.finite:
            continue
        for ours, theirs in zip(out.hidden_states, one.hidden_states, strict=True):
            compare_values("hidden_states", ours[index][own], theirs[0])
            if not bool(ours[index][~own].isfinite().all()):
                raise Wrong("hidden states on padding are not finite")
        if one.logits is not None:
            ours = out.logits[index] if out.logits.ndim == 2 else out.logits[index][own]
            compare_values("logits", ours, one.logits[0])
    if cameras:
        compare_features(out.image_features, samples, [one.image_features for one in alone], cameras, whole)
    elif out.image_features is not None:
        raise Wrong("image features without images")
    if labels is not None and all(sample.finite for sample in samples):
        total = sum(one.loss * count for one, count in zip(alone, labels, strict=True))
        compare_values("loss", out.loss, total / max(1, sum(labels)))


def compare_features(
    ours: object, samples: list[Sample], alone: list[object], cameras: int, whole: bool = False
) -> None:
    """Features of a batch against those of each sample's present cameras, or of all; None where it has none."""
    by_camera = list(ours.unbind(1)) if isinstance(ours, Tensor) else ours
    if len(by_camera) != cameras or any(len(features) != len(samples) for features in by_camera):
        raise Wrong("features of another number of cameras or samples")
    for index, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        own = list(one.unbind(1)) if isinstance(one, Tensor) else one or []
        for place, camera in enumerate(sample.cameras):
            if bool(sample.frames[place].isfinite().all()):
                compare_values("image_features", by_camera[camera][index], own[camera if whole else place][0])
        for camera in set(range(cameras)) - set(sample.cameras):
            if bool((by_camera[camera][index] != 0).any()):
                raise Wrong("features of an absent camera are not zero")


def compare_generated(
    model: QwenBatchedVL, out: Any, samples: list[Sample], alone: list[Any], options: dict[str, object]
) -> None:
    """Greedy tokens of a batch against those of its samples alone; ties excepted."""
    for index, (sample, one) in enumerate(zip(samples, alone, strict=True)):
        ours, theirs = out.token_ids[index].tolist(), one.token_ids[0].tolist()
        if not sample.finite:
            if out.finish_reasons[index] != "invalid" or one.finish_reasons[0] != "invalid":
                raise Wrong(f"a sample that is not finite ends with {out.finish_reasons[index]!r}")
            continue
        if ours == theirs:
            if (out.texts[index], out.finish_reasons[index]) != (one.texts[0], one.finish_reasons[0]):
                raise Wrong("the same tokens give another text or finish reason")
            continue
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if place is None or place > 0 or not _is_tie(model, sample, options, ours[0], theirs[0]):
            raise Wrong(f"generated {ours}, alone {theirs}")


def _is_tie(model: QwenBatchedVL, sample: Sample, options: dict[str, object], a: int, b: int) -> bool:
    layout = {name: value for name, value in options.items() if name != "max_new_tokens"}
    logits = model(**sample.arguments(layout.get("template")), logits="last", **layout).logits[0]
    return float((logits[a] - logits[b]).abs()) < TIE * float(logits.std())

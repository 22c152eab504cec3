"""A batch as LeRobot's data loader gives it, or its robot's observation -> the arguments of `QwenBatchedVL`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASKS = {"_is_pad": False, "_padding_mask": True}  # what follows a camera's key, and what its mask says of frames


def from_lerobot(
    batch: Mapping[str, Any], cameras: Sequence[str], image_masks: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The model's arguments for a batch in LeRobot's form: `model(**from_lerobot(batch, ["front", "wrist"]))`.

    The form is that of LeRobot's `utils/constants.py`, `datasets/dataset_reader.py` and, for cameras that are missing,
    of `prepare_images` in `policies/smolvla/modeling_smolvla.py`:

        observation.images.<camera>               (B, 3, H, W), RGB, floating in 0..1 or, with `return_uint8`, uint8 in
                                                  0..255; or (B, 1, 3, H, W), from `delta_timestamps` of one step.
                                                  A data set of one camera may call it `observation.image`.
        observation.images.<camera>_is_pad        Optional bool (B,) or (B, 1), True where the frame is padding.
        observation.images.<camera>_padding_mask  Optional bool (B,) or (B, 1), True where the camera is present:
                                                  despite its name, the opposite of `_is_pad`.
        task                                      A list of B strings.

    One observation of a robot, with or without the batch dimension that `predict_action` in `common/control_utils.py`
    and `AddBatchDimensionProcessorStep` in `processor/batch_processor.py` add, is a batch of one: its frames are all
    (3, H, W) or all (1, 3, H, W), its task is a string or a list of one, its masks are (), (1,) or (1, 1).

    Other keys (`observation.state`, `action`, ...) are left alone. Frames come as they are, before any normalisation.

    Args:
        batch: As above.
        cameras: The model's cameras in their order. "front" stands for "observation.images.front"; a name that begins
            with "observation." is a key as it is. A camera that the batch lacks is absent from all samples, with black
            frames of the size of the first one that is there.
        image_masks: As openpi's `image_masks`, for some or all of `cameras`: bool (B,) or (B, 1), True where the camera
            is present. A camera is absent where any of its masks says so.

    Returns:
        images: (B, V, 3, H, W) when the cameras' frames have one size and dtype, else a list of V tensors
            (B, 3, H_i, W_i).
        texts: The B tasks, a list.
        camera_mask: Bool (B, V), False where a camera is absent, on the device of the masks that it is made of, or on
            the host. None where no camera is lacking and there are no masks.

    Raises:
        TypeError: `cameras`, a frame, a mask or `task` is of another type than described.
        ValueError: A name comes twice or fits nothing, a shape or dtype is not as described, or no camera is there.
            Frames with a batch dimension are mixed with some without, or several samples share one string.
    """
    keys = camera_keys(cameras)
    present = _with_batch_dimension({key: one_step(key, batch[key]) for key in keys if key in batch})
    if not present:
        raise ValueError(f"the batch must hold at least one of {keys}, got {sorted(batch)}")
    sizes = {key: len(frames) for key, frames in present.items()}
    texts = _texts(batch)
    samples = len(texts)
    if set(sizes.values()) != {samples}:
        hint = ": several samples need a list of as many tasks" if isinstance(batch["task"], str) else ""
        raise ValueError(f"every camera must have a frame for each of {samples} tasks, got {sizes}{hint}")

    black = torch.zeros_like(next(iter(present.values())))
    frames = [present.get(key, black) for key in keys]
    alike = len({(each.shape, each.dtype, each.device) for each in frames}) == 1
    images = torch.stack(frames, dim=1) if alike else frames
    return {"images": images, "texts": texts, "camera_mask": camera_mask(batch, keys, present, samples, image_masks)}


def camera_mask(
    batch: Mapping[str, Any],
    keys: Sequence[str],
    present: Collection[str],
    samples: int,
    image_masks: Mapping[str, Tensor] | None = None,
) -> Tensor | None:
    """Which cameras the samples of a batch have: the mask that `from_lerobot` gives.

    Args:
        batch: See there; its masks are looked at.
        keys: The cameras' keys in the batch.
        present: Those that are there; the others are absent from all samples.
        samples: B.
        image_masks: See there.

    Raises:
        TypeError, ValueError: A mask is not as described there, or of a camera that is not among `keys`.
    """
    masks: dict[str, list[Tensor]] = {key: [] for key in keys}
    for key, (suffix, is_present) in itertools.product(keys, MASKS.items()):
        if (name := key + suffix) in batch:
            masks[key].append(_checked_mask(name, batch[name], samples) == is_present)
    for name, mask in (image_masks or {}).items():
        if _key(name) not in masks:
            raise ValueError(f"image_masks must be of the cameras {list(keys)}, got one of {name!r}")
        masks[_key(name)].append(_checked_mask(f"image_masks[{name!r}]", mask, samples))
    return _joined(masks, present, samples)


def camera_keys(cameras: Sequence[str]) -> list[str]:
    """Keys in a batch of the cameras that `from_lerobot` takes by these names. Raises `TypeError` or `ValueError`."""
    if isinstance(cameras, str) or not all(isinstance(camera, str) for camera in cameras):
        raise TypeError(f"cameras must be a list of str, got {cameras!r}")
    keys = [_key(camera) for camera in cameras]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"cameras must be one or more different names, got {list(cameras)}")
    return keys


def _key(camera: str) -> str:
    return camera if camera.startswith("observation.") else f"observation.images.{camera}"


def one_step(key: str, frames: object) -> Tensor:
    """A camera's frames without a dimension of one step. Raises as `from_lerobot` does for other frames."""
    if not isinstance(frames, Tensor):
        raise TypeError(f"{key} must be a tensor, got {type(frames).__name__}")
    if frames.ndim == 5 and frames.shape[1] == 1:
        return frames[:, 0]
    if frames.ndim == 5:
        raise ValueError(
            f"{key} must hold one step, (B, 1, 3, H, W), got {frames.shape[1]} steps {tuple(frames.shape)}: "
            f"choose one, such as the last, frames[:, -1]"
        )
    if frames.ndim not in (3, 4) or frames.shape[-3] != 3:
        expected = "(B, 3, H, W), (B, 1, 3, H, W) or, for one observation, (3, H, W)"
        raise ValueError(f"{key} must be {expected}, got {tuple(frames.shape)}")
    return frames


def _with_batch_dimension(frames: dict[str, Tensor]) -> dict[str, Tensor]:
    if len({each.ndim for each in frames.values()}) > 1:
        shapes = {key: tuple(each.shape) for key, each in frames.items()}
        raise ValueError(f"all cameras must have a batch dimension, or none, got {shapes}")
    return {key: each[None] if each.ndim == 3 else each for key, each in frames.items()}


def _texts(batch: Mapping[str, Any]) -> list[str]:
    if "task" not in batch:
        raise ValueError(f"the batch must hold 'task', got {sorted(batch)}")
    tasks = batch["task"]
    if isinstance(tasks, str):
        return [tasks]
    if not isinstance(tasks, (list, tuple)) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"task must be a list of str, or the str of one observation, got {tasks!r}")
    return list(tasks)


def _checked_mask(name: str, mask: object, samples: int) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool tensor, got {type(mask).__name__}")
    shapes = [(samples,), (samples, 1), *([()] if samples == 1 else [])]
    if mask.dtype != torch.bool or mask.shape not in shapes:
        expected = f"bool {' or '.join(map(str, shapes))}, one step"
        raise ValueError(f"{name} must be {expected}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.reshape(samples)


def _joined(masks: Mapping[str, list[Tensor]], present: Collection[str], samples: int) -> Tensor | None:
    given = [mask for masks_of_camera in masks.values() for mask in masks_of_camera]
    if not given and set(present) == set(masks):
        return None
    devices = {mask.device for mask in given} or {torch.device("cpu")}
    if len(devices) > 1:
        raise ValueError(f"all masks must be on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    joined = torch.stack([torch.full((samples,), key in present, device=device) for key in masks], dim=1)
    for camera, masks_of_camera in enumerate(masks.values()):
        for mask in masks_of_camera:
            joined[:, camera] &= mask
    return joined

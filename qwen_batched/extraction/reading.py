"""What an extraction wrote, for training: a row at random, or a LeRobot batch joined with its features."""

from __future__ import annotations

import json
import mmap
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qwen_batched.arguments import shown
from qwen_batched.extraction.manifest import read_manifest
from qwen_batched.extraction.parquet import ParquetReader
from qwen_batched.extraction.request import IMAGE_FEATURES, PARQUET
from qwen_batched.extraction.shards import FEATURES, INDEX, ROWS
from qwen_batched.extraction.streams import DEEPSTACK, MASK, streams_in
from qwen_batched.inputs.batch import FeatureMaps, Features
from qwen_batched.integrations.lerobot import MASKS, camera_keys, camera_mask, one_step

OPEN = 256  # shards that are mapped at once
FRAMES = 2**32  # of an episode, more than any has
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}


class ShardReader:
    """A shard that is mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError`, naming the file, where it is missing or damaged."""
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self.map[:8], "little")
            said = json.loads(self.map[8 : 8 + length])
            names = [name for name in (ROWS, MASK) if name in said]
            if ROWS not in names:
                raise ValueError(f"has no {ROWS}")
            self.tensors = []
            for name in names:
                start, stop = said[name]["data_offsets"]
                rows, *shape = said[name]["shape"]
                if 8 + length + stop > len(self.map):
                    raise ValueError("is cut short")
                self.tensors.append((DTYPES[said[name]["dtype"]], tuple(shape), 8 + length + start, rows, stop - start))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a shard that can be read: {error}") from error

    def row(self, place: int) -> list[Tensor]:
        """A copy of a row of each tensor: the features, and the mask where there is one."""
        return [self._copy(index, place) for index in range(len(self.tensors))]

    def _copy(self, index: int, place: int) -> Tensor:
        dtype, shape, start, rows, size = self.tensors[index]
        row = size // rows
        data = bytearray(self.map[start + place * row : start + (place + 1) * row])
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.map.close()


def open_shard(path: Path) -> ShardReader | ParquetReader:
    """Raises `ValueError`, naming the file, where it is missing or damaged."""
    return ParquetReader(path) if path.suffix == f".{PARQUET}" else ShardReader(path)


class FeatureDataset(Dataset):
    """The frames of an extraction, with their features.

    Attributes:
        manifest: What manifest.json says.
        cameras: Names, in the order of the features.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the index.

        Args:
            folder: OUT of `python -m qwen_batched.extract`.

        Raises:
            ValueError: It is none, or has no frame yet.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.cameras = tuple(self.manifest["data"]["cameras"])
        self._cameras_of_keys = dict(zip(camera_keys(self.cameras), self.cameras, strict=True))
        self._cameras_of_keys |= {f"observation.{camera}": camera for camera in self.cameras}
        self._streams = [stream.folder for stream in streams_in(self.manifest)]
        names: dict[int | str, int] = {}
        columns: dict[str, list[np.ndarray]] = {"episode": [], "frame": [], "timestamp": [], "row": [], "part": []}
        self._parts: list[str] = []
        for path in sorted((self.folder / INDEX).glob("part-*.parquet")):
            table = pq.read_table(path, columns=["episode", "frame", "timestamp", "row"])
            table = table.take(np.arange(0, len(table), len(self.cameras)))  # a frame has a row for each camera
            coded = [names.setdefault(name, len(names)) for name in table["episode"].to_pylist()]
            columns["episode"].append(np.array(coded, np.int64))
            for name in ("frame", "timestamp", "row"):
                columns[name].append(table[name].to_numpy())
            columns["part"].append(np.full(len(table), len(self._parts), np.int32))
            self._parts.append(f"{path.stem}.{self.manifest['file_format']}")
        if not any(map(len, columns["frame"])):
            raise ValueError(f"{self.folder} must have at least one frame that was extracted, got none")
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        self._episodes, self._codes = list(names), names
        self._episode, self._frame, self._row = joined["episode"], joined["frame"], joined["row"]
        self._time, self._part = joined["timestamp"], joined["part"]
        keys = _key(self._episode, self._frame)
        self._sorted = np.argsort(keys, kind="stable")
        self._keys = keys[self._sorted]
        self._open: OrderedDict[tuple[str, int], ShardReader | ParquetReader] = OrderedDict()

    def __len__(self) -> int:
        """Frames."""
        return len(self._frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A frame.

        Returns:
            `episode` (int or str), `frame` (int), `timestamp` (float seconds, NaN where the data set has none). With
            image features `image_features`: (V, h, w, D), or pooled (V, D), or a list of one (h, w, D) for each camera
            where grids differ; and the deep ones of families that have some, `deepstack-0` and so on, alike. Of each
            layer `hidden-18` or `last`: (S, D), with `hidden-18.mask`, bool (S,); or pooled (D,). In the dtype of the
            manifest; pooled ones from parquet are float32.
        """
        size, index = len(self), operator.index(index)
        if not -size <= index < size:
            raise IndexError(f"index must be below {size}, got {index}")
        index %= size
        found: dict[str, Any] = {
            "episode": self._episodes[self._episode[index]],
            "frame": int(self._frame[index]),
            "timestamp": float(self._time[index]),
        }
        maps: dict[str, list[Tensor]] = {}
        for stream in self._streams:
            values = self._shard(stream, int(self._part[index])).row(int(self._row[index]))
            name, _, camera = stream.partition("/")
            if camera:
                maps.setdefault(name, []).append(values[0])
                continue
            found[name] = values[0]
            if len(values) > 1:
                found[f"{name}.{MASK}"] = values[1]
        for name, cameras in maps.items():
            alike = len({x.shape for x in cameras}) == 1
            found[name] = torch.stack(cameras) if alike else cameras
        return found

    @property
    def episodes(self) -> list[int | str]:
        """The episodes that have frames, in their order."""
        return list(self._episodes)

    def frames_of(self, episode: int | str) -> np.ndarray:
        """The indices of an episode's frames, in their order. Raises `ValueError` where it is not there."""
        if episode not in self._codes:
            some = ", ".join(map(str, self._episodes[:10]))
            raise ValueError(f"episode must be one that is there ({some}, ...), got {episode}")
        found = np.flatnonzero(self._episode == self._codes[episode])
        return found[np.argsort(self._frame[found], kind="stable")]

    def position(self, episode: int | str, frame: int) -> int:
        """The index of a frame. Raises `KeyError` where it is not there."""
        key = _key(self._codes[episode], frame) if episode in self._codes and 0 <= frame < FRAMES else -1
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise KeyError(f"frame {frame} of episode {episode} is not in {self.folder}")
        return int(self._sorted[place])

    def features_for(
        self,
        batch: Mapping[str, Any],
        cameras: Sequence[str] | None = None,
        image_masks: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """The model's arguments for a LeRobot batch, with features in place of frames: `model(**features_for(batch))`.

        They mean what those of `from_lerobot` do for the same batch with its frames: what is padding there is masked
        here.

        Args:
            batch: What LeRobot's data loader gives: `episode_index` and `frame_index`, integer (B,) or (B, 1), and
                `task`, B strings. The features are those of `frame_index`. Masks, `<key>_is_pad` and
                `<key>_padding_mask`, bool (B,) or (B, 1) as `from_lerobot` takes them, are heeded. Frames,
                of one step, need not be there: but where those of some of the cameras are, another is absent.
            cameras: The model's cameras in their order, named as for `from_lerobot`; all of the extraction by default.
                One that the extraction lacks is absent from all samples, with features of zeros.
            image_masks: As for `from_lerobot`.

        Returns:
            `images`: None. `texts`: The B tasks. `image_features`: (B, V, h, w, D), on the host, in the order of
            `cameras`; or V tensors (B, h, w, D) where their grids differ; `Features` of a family with deep features.
            `camera_mask`: Bool (B, V), False where a camera is absent, on the device of the batch's masks or on the
            host. None where no camera is absent from all and there are no masks.

        Raises:
            KeyError: A frame is not there.
            TypeError, ValueError: The batch is not as described, no camera is there, or the extraction has no maps: it
                pooled them, or was of hidden states alone.
        """
        if f"{IMAGE_FEATURES}/{self.cameras[0]}" not in self._streams or self.manifest["pool"] != "none":
            got = f"{', '.join(self.manifest['what'])}, pool {self.manifest['pool']}"
            raise ValueError(f"{self.folder} must have image_features that are not pooled, got {got}")
        for name in ("episode_index", "frame_index", "task"):
            if name not in batch:
                raise ValueError(f"the batch must hold {name!r}, got {sorted(map(str, batch))}")
        texts = batch["task"]
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"task must be a list of at least one str, got {shown(texts)}")
        texts = list(texts)
        episodes, frames = (_integers(name, batch[name]) for name in ("episode_index", "frame_index"))
        if not len(texts) == len(episodes) == len(frames):
            counts = f"{len(texts)} tasks, {len(episodes)} episode_index, {len(frames)} frame_index"
            raise ValueError(f"the batch must have one of each for every sample, got {counts}")
        keys = camera_keys(self.cameras if cameras is None else cameras)
        keys = camera_keys([_key_in(batch, key) for key in keys])
        wanted = [self._cameras_of_keys.get(key) for key in keys]  # None is one that the extraction lacks
        has_frames = any(key in batch for key in keys)
        present = [key for key, camera in zip(keys, wanted, strict=True) if camera and (key in batch or not has_frames)]
        for key in keys:
            if key in batch:
                one_step(key, batch[key])
        if not present:
            raise ValueError(f"cameras must be some of {', '.join(self.cameras)} that the batch has, got {keys}")
        masks = {_key_in(batch, *camera_keys([name])): mask for name, mask in (image_masks or {}).items()}
        mask = camera_mask(batch, keys, present, len(texts), masks)
        items = [self[self.position(*place)] for place in zip(episodes, frames, strict=True)]
        levels = [name for name in (DEEPSTACK.format(level=i) for i in range(len(self._streams))) if name in items[0]]
        collated = [_collate([item[name] for item in items]) for name in (IMAGE_FEATURES, *levels)]
        main, *deep = (self._chosen(maps, wanted) for maps in collated)
        features = Features(main, deep) if deep else main
        return {"images": None, "texts": texts, "image_features": features, "camera_mask": mask}

    def _chosen(self, maps: FeatureMaps, cameras: Sequence[str | None]) -> FeatureMaps:
        """Maps of these cameras out of those of all; zeros for None."""
        if tuple(cameras) == self.cameras:
            return maps
        found = dict(zip(self.cameras, maps.unbind(1) if isinstance(maps, Tensor) else maps, strict=True))
        zeros = torch.zeros_like(next(found[camera] for camera in cameras if camera in found))
        chosen = [found.get(camera, zeros) for camera in cameras]
        return torch.stack(chosen, 1) if len({x.shape for x in chosen}) == 1 else chosen

    def _shard(self, stream: str, part: int) -> ShardReader | ParquetReader:
        key = stream, part
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        while len(self._open) >= OPEN:
            self._open.popitem(last=False)
        shard = self._open[key] = open_shard(self.folder / FEATURES / stream / self._parts[part])
        return shard

    def __getstate__(self) -> dict[str, Any]:
        """For the processes of a `DataLoader`, each of which maps shards itself."""
        return vars(self) | {"_open": OrderedDict()}


def _key_in(batch: Mapping[str, Any], key: str) -> str:
    """As a batch calls a camera: a data set of one may say "observation.image" for "observation.images.image"."""
    short = key.replace("observation.images.", "observation.", 1)
    return short if any(short + suffix in batch for suffix in ("", *MASKS)) else key


def _key(episode: Any, frame: Any) -> Any:
    return episode * FRAMES + frame


def _collate(maps: Sequence[Tensor | list[Tensor]]) -> FeatureMaps:
    if isinstance(maps[0], Tensor):
        return torch.stack(list(maps))
    return [torch.stack(list(camera)) for camera in zip(*maps, strict=True)]


def _integers(name: str, values: Any) -> list[int]:
    if not isinstance(values, Tensor) or values.dtype not in (torch.int64, torch.int32) or values.ndim > 2:
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be an integer tensor (B,), got {got}")
    if values.ndim == 2 and values.shape[1] != 1:
        raise ValueError(f"{name} must be (B,) or (B, 1), got {tuple(values.shape)}")
    return values.reshape(-1).tolist()

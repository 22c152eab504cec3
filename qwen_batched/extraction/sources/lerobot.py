"""A LeRobot data set, v3 or v2, by the files of its folder: meta/, data/, videos/.

The layout is that of LeRobot's `datasets/utils.py` and `datasets/dataset_metadata.py`; v2's is described at the head of
its `scripts/convert_dataset_v21_to_v30.py`. LeRobot itself is not needed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_batched.arguments import as_int, shown
from qwen_batched.extraction.sources import tables
from qwen_batched.extraction.sources.source import (
    Damage,
    Episode,
    Frame,
    Run,
    choose_cameras,
    sizes_of,
    without_empty,
)
from qwen_batched.extraction.sources.video import TOLERANCE, frames_at

INFO = "meta/info.json"
COLUMNS = ("episode_index", "frame_index", "timestamp", "task_index")
VIDEO_V3 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
VIDEO_V2 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def camera_name(key: str) -> str:
    """A feature's name as cameras are called on the command line and in OUT, as `from_lerobot` shortens it."""
    return key.removeprefix("observation.images.").removeprefix("observation.")


@dataclass(frozen=True)
class _Rows:
    """Where an episode is in data/."""

    file: Path
    start: int  # its first row there
    times: np.ndarray  # float64 (frames,), of float32 values
    tasks: np.ndarray  # int64 (frames,)


class LeRobotSource:
    """See `Source`."""

    def __init__(
        self, folder: Path, cameras: Sequence[str] | None = None, skip: bool = False, tolerance: float = TOLERANCE
    ) -> None:
        """Reads meta/ and the small columns of data/.

        Args:
            folder: The one that has meta/info.json.
            cameras: As `camera_name` or the feature's own name, which those have that would else be called alike; None
                for all that are not depth maps.
            skip: Leave out episodes without frames, where they are an error otherwise.
            tolerance: Seconds between a timestamp and its frame at most.

        Raises:
            ValueError: A file is missing or damaged, is of another version, or contradicts another.
        """
        self.folder, self.tolerance = folder, tolerance
        self.info = _read_json(folder / INFO)
        version = str(self.info.get("codebase_version", ""))
        if not version.startswith(("v2.", "v3.")):
            raise ValueError(f"{folder / INFO}: codebase_version must be v2.x or v3.x, got {shown(version)}")
        self.form, self._is_v3 = f"lerobot {version}", version.startswith("v3.")
        self._chunks_size = 1000 if self._is_v3 else as_int("chunks_size", self.info.get("chunks_size", 1000), 1)
        features = self.info.get("features")
        if not isinstance(features, dict) or not all(isinstance(x, dict) for x in features.values()):
            raise ValueError(f"{folder / INFO}: features must be an object of objects, got {shown(features)}")
        kinds = {key: feature["dtype"] for key, feature in features.items() if _is_camera(feature)}
        short = Counter(map(camera_name, kinds))
        self._keys = {camera_name(key) if short[camera_name(key)] == 1 else key: key for key in kinds}
        names = {key: name for name, key in self._keys.items()}
        asked = None if cameras is None else [names.get(camera, camera) for camera in cameras]
        self.cameras = choose_cameras(asked, list(self._keys))
        self._is_video = {camera: kinds[self._keys[camera]] == "video" for camera in self.cameras}

        tasks = self._read_tasks()
        described = self._read_episodes()
        rows = self._read_rows()
        every = [Episode(index, int(described[index]["length"])) for index in sorted(described)]
        kept = without_empty(every, skip)
        self.episodes = tuple(every[place] for place in kept)
        self.left_out = tuple(
            Damage(f"episode {episode.name}", "has no frames") for episode in every if not episode.frames
        )
        self._rows, self._described = [], [described[episode.name] for episode in self.episodes]
        for episode in self.episodes:
            found = rows.get(episode.name)
            if found is None or len(found.times) != episode.frames:
                got = 0 if found is None else len(found.times)
                raise ValueError(f"episode {episode.name} has {episode.frames} frames in meta/ and {got} in data/")
            if found.tasks.size and not set(np.unique(found.tasks).tolist()) <= tasks.keys():
                raise ValueError(f"episode {episode.name} has a task_index that meta/ does not have")
            self._rows.append(found)
        self._tasks = tasks
        if not skip:
            self._check_videos()

    def timestamps(self, episode: int) -> np.ndarray:
        """See `Source`."""
        return self._rows[episode].times

    def texts(self, episode: int) -> Sequence[str] | None:
        """See `Source`."""
        return [self._tasks[task] for task in self._rows[episode].tasks.tolist()]

    def frames(self, camera: str, runs: Sequence[Run]) -> Iterator[Frame]:
        """See `Source`."""
        if not self._is_video[camera]:
            for run in runs:
                rows = self._rows[run.episode]
                yield from tables.read_rows(
                    rows.file, self._keys[camera], rows.start + run.start, rows.start + run.stop
                )
            return
        path, times = None, []
        for run in runs:
            file, offset = self._video(camera, run.episode)
            more = (offset + self._rows[run.episode].times[run.start : run.stop]).tolist()
            if times and (file != path or more[0] < times[-1]):
                yield from frames_at(path, times, self.tolerance)
                times = []
            path = file
            times += more
        if times:
            yield from frames_at(path, times, self.tolerance)

    def files(self) -> Iterable[tuple[str, int]]:
        """See `Source`."""
        used = {rows.file for rows in self._rows} | {file for _, _, file in self._videos()}
        return sizes_of(sorted(used), self.folder)

    def _videos(self) -> Iterator[tuple[str, int, Path]]:
        for camera in self.cameras:
            if self._is_video[camera]:
                for episode in range(len(self.episodes)):
                    yield camera, episode, self._video(camera, episode)[0]

    def _video(self, camera: str, episode: int) -> tuple[Path, float]:
        """The file of an episode, and when in it the episode begins."""
        key, described = self._keys[camera], self._described[episode]
        pattern = self.info.get("video_path") or (VIDEO_V3 if self._is_v3 else VIDEO_V2)
        index = int(self.episodes[episode].name)
        if self._is_v3:
            names = [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
            if any(described.get(name) is None for name in names):
                raise ValueError(f"meta/episodes must have {', '.join(names)} of episode {index}")
            chunk, file, offset = (described[name] for name in names)
            places = {"chunk_index": chunk, "file_index": file}
        else:
            places = {"episode_chunk": index // self._chunks_size, "episode_index": index}
            offset = 0.0
        try:
            return self.folder / pattern.format(video_key=key, **places), float(offset)
        except (KeyError, IndexError) as error:
            names = ", ".join(["video_key", *places])
            raise ValueError(f"{INFO}: video_path must be made of {names}, got {pattern}") from error

    def _check_videos(self) -> None:
        missing = sorted({file for _, _, file in self._videos() if not file.is_file()})
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the data set must have every video that meta/ names, got no {missing[0]}{more}")

    def _read_tasks(self) -> dict[int, str]:
        if not self._is_v3:
            lines = _read_lines(self.folder / "meta/tasks.jsonl")
            if not all(isinstance(line, dict) and {"task_index", "task"} <= line.keys() for line in lines):
                raise ValueError(f"{self.folder}: every line of meta/tasks.jsonl must have a task_index and a task")
            return {int(line["task_index"]): str(line["task"]) for line in lines}
        table = _read_table(self.folder / "meta/tasks.parquet")
        names = [name for name in table.column_names if name != "task_index"]  # the index of a pandas table
        if "task_index" not in table.column_names or len(names) != 1:
            raise ValueError(f"meta/tasks.parquet must have task_index and the task, got {table.column_names}")
        indices, tasks = table["task_index"].to_pylist(), table[names[0]].to_pylist()
        return {int(index): str(task) for index, task in zip(indices, tasks, strict=True)}

    def _read_episodes(self) -> dict[int, dict[str, Any]]:
        if self._is_v3:
            files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
            if not files:
                raise ValueError(f"{self.folder}: meta/episodes must have at least one parquet file, got none")
            rows = []
            for file in files:
                names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
                rows += _read_table(file, names).to_pylist()
        else:
            rows = _read_lines(self.folder / "meta/episodes.jsonl")
        if not all("episode_index" in row and "length" in row for row in rows):
            raise ValueError(f"{self.folder}: every episode in meta/ must have an episode_index and a length")
        described = {int(row["episode_index"]): row for row in rows}
        if len(described) < len(rows):
            raise ValueError(f"{self.folder}: meta/ must have each episode once, got {len(rows)} of {len(described)}")
        return described

    def _read_rows(self) -> dict[int, _Rows]:
        """By episode, which must be in one place with its frames in order."""
        found: dict[int, _Rows] = {}
        for file in sorted((self.folder / "data").glob("*/*.parquet")):
            table = _read_table(file, COLUMNS)
            episodes, frames, times, tasks = (table[name].to_numpy() for name in COLUMNS)
            bounds = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
            for start, stop in itertools.pairwise(bounds):
                if start == stop:
                    continue
                episode = int(episodes[start])
                if episode in found or not np.array_equal(frames[start:stop], np.arange(stop - start)):
                    raise ValueError(f"{file}: episode {episode} must be in one place, with its frames in order")
                if not np.isfinite(times[start:stop]).all():
                    raise ValueError(f"{file}: every frame must have a timestamp, got one without in episode {episode}")
                found[episode] = _Rows(file, start, times[start:stop].astype(np.float64), tasks[start:stop])
        return found


def _is_camera(feature: dict[str, Any]) -> bool:
    notes = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    is_depth = notes.get("is_depth_map") or notes.get("video.is_depth_map")
    return feature.get("dtype") in ("video", "image") and not is_depth


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {shown(found)}")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} must have the columns {', '.join(columns)}, got no {', '.join(missing)}")
    return table

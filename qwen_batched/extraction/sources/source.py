"""What a data set is here, whatever its form: episodes of frames, each with an image of every camera."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Run(NamedTuple):
    """Consecutive frames of an episode."""

    episode: int  # its place in `Source.episodes`
    start: int
    stop: int


@dataclass(frozen=True)
class Episode:
    """An episode of a data set."""

    name: int | str  # LeRobot's index, or a file's or folder's name
    frames: int


@dataclass(frozen=True)
class Damage:
    """In place of a frame that cannot be had."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


Frame = np.ndarray | Damage  # (H, W, 3), RGB, uint8


class Source(Protocol):
    """A data set that is open. Its methods may be called by several threads at once."""

    form: str  # "lerobot v3.0", "images", ...
    cameras: tuple[str, ...]  # those that are read, in the order asked for
    episodes: tuple[Episode, ...]  # each with at least one frame
    left_out: tuple[Damage, ...]  # files and episodes that cannot be counted, and are not in `episodes`

    def timestamps(self, episode: int) -> np.ndarray:
        """Seconds since the episode's start, float64 (frames,); NaN where the form has none."""

    def texts(self, episode: int) -> Sequence[str] | None:
        """The text of each frame; None where the form has none."""

    def frames(self, camera: str, runs: Sequence[Run]) -> Iterator[Frame]:
        """The frames of these runs, one after another, exactly as many as they have."""

    def files(self) -> Iterable[tuple[str, int]]:
        """Name and bytes of each file that frames come from, by which a changed data set is recognised."""


def choose_cameras(asked: Sequence[str] | None, there: Sequence[str]) -> tuple[str, ...]:
    """The cameras to read; all of `there` where none are asked for. Raises `ValueError` with those that are there."""
    if not there:
        raise ValueError("the data set must have at least one camera, got none")
    chosen = tuple(there if asked is None else asked)
    unknown = [camera for camera in chosen if camera not in there]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        got = f"no {', '.join(unknown)}" if unknown else list(chosen)
        raise ValueError(f"cameras must be different ones of {', '.join(there)}, got {got}")
    for camera in chosen:
        if not camera or camera in (".", "..") or any(c in camera for c in '/\\\0:*?"<>|'):
            raise ValueError(f"a camera's name becomes a folder's, which {camera!r} cannot be")
    return chosen


def without_empty(episodes: Sequence[Episode], skip: bool) -> list[int]:
    """Places of the episodes that have frames. Raises `ValueError` for those without, unless they are to be skipped."""
    empty = [str(episode.name) for episode in episodes if not episode.frames]
    if empty and not skip:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ValueError(f"every episode must have frames, got none in {len(empty)} of {len(episodes)}: {shown}")
    kept = [place for place, episode in enumerate(episodes) if episode.frames]
    if not kept:
        raise ValueError("the data set must have at least one frame, got none")
    return kept


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and those below, in the order of their names.

    Links to folders are followed, but not round and round. Names that begin with a dot are left out: other programs'
    notes, such as macOS's `._a.jpg`. Raises `OSError` for a folder that cannot be read.
    """
    return sorted(_walk(folder, ()))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to where it stands
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*above, real))
            elif entry.is_file():
                yield folder / entry.name


def sizes_of(files: Iterable[Path], folder: Path) -> Iterator[tuple[str, int]]:
    """Name below `folder` and bytes of each file, -1 where it is not there."""
    for file in files:
        name = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
        yield name, file.stat().st_size if file.exists() else -1

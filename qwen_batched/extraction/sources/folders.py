"""A folder of images or of videos.

Images: every folder that has some is an episode, its images in the order of their names are the frames. Videos: every
file is an episode. There is one camera, "image" or "video"; or, where `cameras` names folders directly below, each of
these is a camera, and an episode has the same name in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from qwen_batched.extraction.sources import pixels, video
from qwen_batched.extraction.sources.pixels import read_image
from qwen_batched.extraction.sources.source import (
    Damage,
    Episode,
    Frame,
    Run,
    choose_cameras,
    files_below,
    sizes_of,
    without_empty,
)


class FolderSource:
    """See `Source`."""

    def __init__(
        self,
        folder: Path,
        cameras: Sequence[str] | None = None,
        skip: bool = False,
        tolerance: float = video.TOLERANCE,
    ) -> None:
        """Looks at names, and at the packets of videos. Raises `ValueError` for a folder that is of no such form."""
        self.folder, self.tolerance = folder, tolerance
        found = files_below(folder)
        images = [file for file in found if file.suffix.lower() in pixels.SUFFIXES]
        videos = [file for file in found if file.suffix.lower() in video.SUFFIXES]
        if images and videos:
            counts = f"{len(images)} images and {len(videos)} videos"
            raise ValueError(f"{folder} must have images or videos, got {counts}")
        self.form = "videos" if videos else "images"
        below = sorted({file.relative_to(folder).parts[0] for file in images or videos if file.parent != folder})
        if cameras is not None and set(cameras) <= set(below):
            self.cameras = choose_cameras(cameras, below)
            roots = {camera: folder / camera for camera in self.cameras}
        else:
            self.cameras = choose_cameras(cameras, [self.form.removesuffix("s"), *(below if cameras else ())])
            roots = {self.cameras[0]: folder}
            if len(self.cameras) > 1:
                raise ValueError(f"cameras must be folders in {folder}, {', '.join(below)}, got {', '.join(cameras)}")
        listed = {camera: _episodes(root, images or videos, bool(videos)) for camera, root in roots.items()}
        names = sorted(set().union(*listed.values()))
        for camera, episodes in listed.items():
            if missing := [name for name in names if name not in episodes]:
                raise ValueError(f"every camera must have every episode, got none of {missing[0]} in {camera}")
        self._times: dict[str, np.ndarray] = {}
        left_out: list[Damage] = []
        if videos:
            names = [name for name in names if self._count(name, listed, left_out, skip)]
        every = [Episode(name, self._length(name, listed)) for name in names]
        self.episodes = tuple(every[place] for place in without_empty(every, skip))
        self.left_out = tuple(left_out)
        self._files = {
            camera: [episodes[episode.name] for episode in self.episodes] for camera, episodes in listed.items()
        }

    def timestamps(self, episode: int) -> np.ndarray:
        """See `Source`."""
        found = self.episodes[episode]
        return self._times[found.name] if self._times else np.full(found.frames, np.nan)

    def texts(self, episode: int) -> Sequence[str] | None:
        """See `Source`."""
        return None

    def frames(self, camera: str, runs: Sequence[Run]) -> Iterator[Frame]:
        """See `Source`."""
        for run in runs:
            files = self._files[camera][run.episode]
            if self._times:
                times = self._times[self.episodes[run.episode].name][run.start : run.stop].tolist()
                yield from video.frames_at(files[0], times, self.tolerance, upright=True)
            else:
                for file in files[run.start : run.stop]:
                    yield read_image(file, str(file))

    def files(self) -> Iterable[tuple[str, int]]:
        """See `Source`."""
        return sizes_of(
            (file for episodes in self._files.values() for files in episodes for file in files), self.folder
        )

    def _count(self, name: str, listed: dict[str, dict[str, list[Path]]], left_out: list[Damage], skip: bool) -> bool:
        """Notes the timestamps of a video. False where it cannot be read and is to be skipped."""
        file = next(iter(listed.values()))[name][0]
        try:
            self._times[name] = video.frame_times(file)
        except (OSError, ValueError, av.FFmpegError) as error:
            damage = Damage(str(file), " ".join(str(error).split()).removesuffix(f": '{file}'"))
            if not skip:
                raise ValueError(str(damage)) from error
            left_out.append(damage)
            return False
        return True

    def _length(self, name: str, listed: dict[str, dict[str, list[Path]]]) -> int:
        if self._times:
            return len(self._times[name])
        counts = {camera: len(episodes[name]) for camera, episodes in listed.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"every camera must have the same number of images in {name!r}, got {counts}")
        return next(iter(counts.values()))


def _episodes(root: Path, files: Sequence[Path], is_video: bool) -> dict[str, list[Path]]:
    """The files of each episode in their order, by its name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(file for file in files if file.is_relative_to(root)):
        place = file.relative_to(root)
        name = place.with_suffix("").as_posix() if is_video else place.parent.as_posix()
        if is_video and name in found:
            raise ValueError(f"videos must differ in more than their suffix, got {found[name][0]} and {file}")
        found.setdefault(name, []).append(file)
    return found

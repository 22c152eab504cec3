"""Tar files in webdataset's form: a file is an episode, a sample a frame.

The members of a sample stand together and share their name up to the first dot of its last part; what follows names
the member. `a.jpg` is an image of the camera "image", `a.front.jpg` one of "front", `a.txt` is the sample's text.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from qwen_batched.extraction.sources import pixels
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


@dataclass
class _Sample:
    key: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # camera -> where its bytes begin, how many
    text: str | None = None


class WebDatasetSource:
    """See `Source`."""

    form = "webdataset"

    def __init__(self, place: Path, cameras: Sequence[str] | None = None, skip: bool = False) -> None:
        """Reads the tar files' headers and texts.

        Args:
            place: A tar file, or a folder of them.
            cameras: As above; None for all.
            skip: Leave out files that are damaged or have no samples, where they are an error otherwise.

        Raises:
            ValueError: A file is damaged.
        """
        self.folder = place.parent if place.is_file() else place
        every, samples, left_out = [], [], []
        for file in [place] if place.is_file() else _tars(place):
            try:
                found = _samples(file)
            except (OSError, tarfile.TarError, EOFError, ValueError) as error:
                damage = Damage(str(file), " ".join(str(error).split()))
                if not skip:
                    raise ValueError(str(damage)) from error
                left_out.append(damage)
                continue
            every.append((Episode(file.relative_to(self.folder).with_suffix("").as_posix(), len(found)), file))
            samples.append(found)
        kept = without_empty([episode for episode, _ in every], skip)
        self.episodes, self._files = tuple(every[i][0] for i in kept), [every[i][1] for i in kept]
        self._samples, self.left_out = [samples[i] for i in kept], tuple(left_out)
        there = sorted({camera for found in self._samples for sample in found for camera in sample.images})
        self.cameras = choose_cameras(cameras, there)

    def timestamps(self, episode: int) -> np.ndarray:
        """See `Source`."""
        return np.full(self.episodes[episode].frames, np.nan)

    def texts(self, episode: int) -> Sequence[str] | None:
        """See `Source`."""
        texts = [sample.text for sample in self._samples[episode]]
        return None if None in texts else texts

    def frames(self, camera: str, runs: Sequence[Run]) -> Iterator[Frame]:
        """See `Source`."""
        for run in runs:
            path = self._files[run.episode]
            with path.open("rb") as file:
                for sample in self._samples[run.episode][run.start : run.stop]:
                    start, size = sample.images.get(camera, (0, 0))
                    file.seek(start)
                    yield read_image(file.read(size) if size else None, f"{path}, {sample.key}, camera {camera}")

    def files(self) -> Iterable[tuple[str, int]]:
        """See `Source`."""
        return sizes_of(self._files, self.folder)


def _tars(folder: Path) -> list[Path]:
    return [file for file in files_below(folder) if file.suffix.lower() == ".tar"]


def _samples(path: Path) -> list[_Sample]:
    found: list[_Sample] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            stem, _, kind = name.name.partition(".")
            if not member.isfile() or not kind:
                continue
            key = (name.parent / stem).as_posix()
            if not found or found[-1].key != key:
                found.append(_Sample(key))
            camera, _, suffix = kind.rpartition(".")
            if f".{suffix.lower()}" in pixels.SUFFIXES:
                if (camera or "image") in found[-1].images:
                    raise ValueError(f"sample {key} must have one image of camera {camera or 'image'}, got another")
                found[-1].images[camera or "image"] = (member.offset_data, member.size)
            elif kind == "txt":
                found[-1].text = tar.extractfile(member).read().decode("utf-8").strip()
        end = tar.offset  # of the last member
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"is cut short: the mark of the archive's end must follow {end} bytes")
    return [sample for sample in found if sample.images]

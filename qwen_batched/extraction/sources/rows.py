"""Parquet files, or what `datasets` saves to disk, with columns of images: a file is an episode, a row a frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qwen_batched.arguments import shown
from qwen_batched.extraction.sources import tables
from qwen_batched.extraction.sources.source import (
    Episode,
    Frame,
    Run,
    choose_cameras,
    files_below,
    sizes_of,
    without_empty,
)


class TableSource:
    """See `Source`."""

    left_out = ()

    def __init__(
        self, place: Path, cameras: Sequence[str] | None = None, skip: bool = False, text_column: str | None = None
    ) -> None:
        """Counts rows.

        Args:
            place: A parquet file, or a folder with parquet or arrow files.
            cameras: Columns; None for all that hold images.
            skip: Leave out files without rows, where they are an error otherwise.
            text_column: The column with each frame's text; None for none.

        Raises:
            ValueError: A file is damaged or has other columns than the first, or a frame has no text.
        """
        self.folder = place.parent if place.is_file() else place
        below = [place] if place.is_file() else files_below(place)
        kinds = (".parquet", ".arrow")
        files = next(found for kind in kinds if (found := [file for file in below if file.suffix.lower() == kind]))
        self.form = files[0].suffix.lower().removeprefix(".")
        schema = tables.schema_of(files[0])
        self.cameras = choose_cameras(cameras, tables.image_columns(schema))
        wanted = [*self.cameras, *([text_column] if text_column else [])]
        for file in files:
            schema = tables.schema_of(file)
            there = {*tables.image_columns(schema), *(set(schema.names) - set(self.cameras))}
            if missing := [name for name in wanted if name not in there]:
                raise ValueError(f"{file} must have the columns {', '.join(wanted)}, got no {missing[0]}")
        names = [file.relative_to(self.folder).with_suffix("").as_posix() for file in files]
        every = [Episode(name, tables.count_rows(file)) for name, file in zip(names, files, strict=True)]
        kept = without_empty(every, skip)
        self.episodes, self._files = tuple(every[i] for i in kept), [files[i] for i in kept]
        self._texts = None
        if text_column is not None:
            self._texts = [tables.column_values(file, [text_column])[text_column] for file in self._files]
            for file, texts in zip(self._files, self._texts, strict=True):
                for row, text in enumerate(texts):
                    if not isinstance(text, str):
                        raise ValueError(f"{file}, row {row}: {text_column} must be a text, got {shown(text)}")

    def timestamps(self, episode: int) -> np.ndarray:
        """See `Source`."""
        return np.full(self.episodes[episode].frames, np.nan)

    def texts(self, episode: int) -> Sequence[str] | None:
        """See `Source`."""
        return None if self._texts is None else self._texts[episode]

    def frames(self, camera: str, runs: Sequence[Run]) -> Iterator[Frame]:
        """See `Source`."""
        for run in runs:
            yield from tables.read_rows(self._files[run.episode], camera, run.start, run.stop)

    def files(self) -> Iterable[tuple[str, int]]:
        """See `Source`."""
        return sizes_of(self._files, self.folder)

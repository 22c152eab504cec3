"""What the command line names as a data set -> the source that reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from qwen_batched.extraction.sources import pixels, video
from qwen_batched.extraction.sources.folders import FolderSource
from qwen_batched.extraction.sources.lerobot import INFO, LeRobotSource
from qwen_batched.extraction.sources.rows import TableSource
from qwen_batched.extraction.sources.source import Source, files_below
from qwen_batched.extraction.sources.webdataset import WebDatasetSource

FORMS = (
    "a LeRobot folder (meta/info.json), a folder of images or of videos, parquet or arrow files with image columns, or "
    "webdataset tars"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["meta/**", "data/**", "videos/**", "**/*.parquet", "*.parquet", "**/*.tar", "*.tar", "**/*.arrow"]


def open_source(
    name: str,
    cameras: Sequence[str] | None = None,
    skip: bool = False,
    tolerance: float = video.TOLERANCE,
    text_column: str | None = None,
    revision: str | None = None,
) -> Source:
    """Opens a data set.

    Args:
        name: A folder or file, or a hub id, which is downloaded or taken from the hub's cache.
        cameras: Which to read, in this order; None for all.
        skip: Leave out what has no frames or cannot be counted, where that is an error otherwise.
        tolerance: Seconds between a timestamp and its video frame at most.
        text_column: Of tables, the column with each frame's text.
        revision: Of a hub id.

    Raises:
        ValueError: It is of no known form, damaged, or lacks a camera; the message has those that are there.
    """
    place = Path(name)
    if not place.exists():
        place = _download(name, revision)
    if (place / INFO).is_file():
        return LeRobotSource(place, cameras, skip, tolerance)
    kinds = {file.suffix.lower() for file in ([place] if place.is_file() else files_below(place))}
    if ".parquet" in kinds or ".arrow" in kinds:
        return TableSource(place, cameras, skip, text_column)
    if ".tar" in kinds:
        return WebDatasetSource(place, cameras, skip)
    if place.is_dir() and kinds & (pixels.SUFFIXES | video.SUFFIXES):
        return FolderSource(place, cameras, skip, tolerance)
    raise ValueError(f"the data set must be {FORMS}, got {name}, which is none of these")


def _download(name: str, revision: str | None) -> Path:
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"the data set must be a folder, a file or a hub id, got {name}, which is not there")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=HUB_FILES)
        )
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"there is no folder {name}, and the hub's data set cannot be had: {reason}") from error

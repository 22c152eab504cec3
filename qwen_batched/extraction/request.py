"""What a user asks for, checked before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_batched.arguments import as_int, shown
from qwen_batched.extraction.sources.video import TOLERANCE

IMAGE_FEATURES, LAST = "image_features", "last"
HIDDEN = re.compile(r"hidden:(0|[1-9][0-9]*)")
POOLS, ON_ERROR = ("none", "mean"), ("stop", "skip")
SAFETENSORS, PARQUET = "safetensors", "parquet"
DTYPES = ("auto", "bfloat16", "float16", "float32")
Resize = str | tuple[int, int] | None


@dataclass(frozen=True)
class Request:
    """What is extracted from what, and how. Raises `ValueError` or `TypeError` where that cannot be."""

    dataset: str  # a folder, a file or a hub id
    out: Path
    model: str  # a folder or a hub id
    cameras: tuple[str, ...] | None = None  # None for all
    resize: Resize = "hf"  # "hf", (height, width) or None, as for `encode_images`
    what: tuple[str, ...] = (IMAGE_FEATURES,)  # image_features, hidden:N, last
    pool: str = "none"  # or "mean": over cells, or over tokens
    format: str = SAFETENSORS  # of the shards; or "parquet" of pooled features, in float32
    dtype: str = "auto"  # of the model, and of what is written as safetensors
    device: str | None = None  # "cpu", "cuda", "cuda:1"; None for CUDA where there is any
    text: str | None = None  # of all frames, in place of the data set's
    text_column: str | None = None  # of tables
    template: str = "chat"
    batch_size: int = 32
    shard_mb: int | None = None  # most megabytes of a file; None: see `work.frames_of_a_shard`
    shard_frames: int | None = None  # most frames of a file, likewise
    limit: int | None = None  # most frames; None for all
    on_error: str = "stop"  # or "skip"
    decoders: int = 8  # threads that decode, for each process
    threads: int | None = None  # of PyTorch on a CPU, for each process; None for PyTorch's own number
    tolerance: float = TOLERANCE
    revision: str | None = None  # of a data set on the hub
    claim_expiry: float = 120.0  # seconds until another may take a claim that nobody has renewed

    def __post_init__(self) -> None:
        """Checks each field alone."""
        if not self.dataset or not self.model:
            raise ValueError("a data set and a model must be named, got ''")
        if "://" in str(self.out) or re.match(r"\w+:/\w", str(self.out)):
            raise ValueError(
                f"OUT must be a folder where files can be renamed and synced, got {self.out}: extract to a local "
                "folder and copy it there"
            )
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError(f"what must be one or more different things, got {list(self.what)}")
        for what in self.what:
            if what not in (IMAGE_FEATURES, LAST) and not HIDDEN.fullmatch(what):
                raise ValueError(f"what must be {IMAGE_FEATURES}, hidden:N or {LAST}, got {shown(what)}")
        formats = SAFETENSORS, PARQUET
        choices = {"pool": POOLS, "on_error": ON_ERROR, "dtype": DTYPES, "format": formats}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {shown(getattr(self, name))}")
        if self.format == PARQUET and self.pool == "none":
            raise ValueError(f"format {PARQUET} is for pooled features alone: pool must be mean, got {self.pool}")
        as_int("batch_size", self.batch_size, 1, 4096)
        as_int("decoders", self.decoders, 1, 256)
        for name in ("shard_mb", "shard_frames", "limit", "threads"):
            if getattr(self, name) is not None:
                as_int(name, getattr(self, name), 1)
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be seconds from 0 up, got {self.tolerance}")
        if not 1 <= self.claim_expiry < float("inf"):
            raise ValueError(f"claim_expiry must be at least 1 second, got {self.claim_expiry}")

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Of `what`, as `layers` of `forward` takes them."""
        found = (HIDDEN.fullmatch(what) for what in self.what)
        return tuple(
            -1 if what == LAST else int(match[1])
            for what, match in zip(self.what, found, strict=True)
            if match or what == LAST
        )

    @property
    def skips(self) -> bool:
        """Whether what cannot be read is left out."""
        return self.on_error == "skip"


def read_resize(text: str) -> Resize:
    """ "224x224" (height x width), "hf" or "none". Raises `ValueError` for others."""
    if text in ("hf", "none"):
        return "hf" if text == "hf" else None
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
        raise ValueError(f"resize must be hf, none or HEIGHTxWIDTH, got {shown(text)}")
    return int(match[1]), int(match[2])


def folder_of(what: str) -> str:
    """ "hidden:18" as a folder's name."""
    return what.replace(":", "-")


def as_tuple(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """A list of the command line."""
    return None if values is None else tuple(values)

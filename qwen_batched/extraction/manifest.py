"""What an extraction is, in words and numbers: OUT/manifest.json, which all who work on a folder share."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qwen_batched.arguments import dtype_name, shown
from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.checkpoint.folder import Checkpoint
from qwen_batched.checkpoint.weights import find_tensors
from qwen_batched.export.engine import device_kind
from qwen_batched.extraction.request import IMAGE_FEATURES, SAFETENSORS, Request
from qwen_batched.extraction.sources.source import Damage, Run, Source
from qwen_batched.extraction.streams import grids_of, stored_dtype, streams_of
from qwen_batched.extraction.syncing import RENAMED, remove_left, sync_folder, write_synced
from qwen_batched.extraction.work import frames_of_a_shard
from qwen_batched.families import family_of
from qwen_batched.model.tensor_processor import TensorProcessor

FILE, FORMAT = "manifest.json", 1
VERSIONS = ("qwen_batched", "torch", "transformers", "av", "pillow", "pyarrow")
NOTES = ("names", "on_error")  # what may differ between runs that share a folder
PIECE = 2**24  # bytes of a file that are hashed at once


def make_manifest(request: Request, source: Source) -> dict[str, Any]:
    """The manifest of a request.

    Raises `ValueError` where the checkpoint cannot be read, the model does not take the frames, no frame of a camera
    can be read, or hidden states are asked for and there is no text.
    """
    device = resolve_device(request.device)
    if device.type == "meta":
        raise ValueError(f"device must be one with memory, got {device}")
    checkpoint = Checkpoint.open(request.model)
    processor = TensorProcessor.from_checkpoint(checkpoint)
    find_tensors(checkpoint.folder, family_of(processor.config.model_type).keys)  # refuses what a worker cannot read
    sizes = {camera: size_of(source, camera) for camera in source.cameras}
    grids = grids_of(processor, request, list(sizes.values()))
    texts = _texts(request, source)
    streams = streams_of(processor, request, source.cameras, grids, texts)
    dtype = processor.config.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    lengths, left = [], request.limit
    for episode in source.episodes:
        frames = episode.frames if left is None else min(left, episode.frames)
        lengths.append([episode.name, frames])
        if left is not None and not (left := left - frames):
            break
    total, stored = sum(frames for _, frames in lengths), stored_dtype(request.format, dtype)
    row_bytes = max(stream.row_bytes(stored) for stream in streams)
    return {
        "format": FORMAT,
        "limit": request.limit,
        "what": list(request.what),
        "pool": request.pool,
        "file_format": request.format,
        "dtype": dtype_name(dtype),
        "model_type": processor.config.model_type,
        "weights_sha256": _hash_files(checkpoint.folder, "*.safetensors"),
        "settings_sha256": _hash_files(checkpoint.folder, "*.json", "*.jinja", "merges.txt"),
        "resize": list(request.resize) if isinstance(request.resize, tuple) else request.resize,
        "resample": processor.resample_backend if device.type == "cpu" else "pytorch",
        "template": request.template,
        "text": request.text,
        "text_column": request.text_column,
        "batch_size": request.batch_size,
        "on_error": request.on_error,
        "data": {
            "form": source.form,
            "cameras": {camera: list(size) for camera, size in sizes.items()},  # height, width
            "left_out": [vars(damage) for damage in source.left_out],
            "tolerance": request.tolerance,
            "episodes": lengths,
            "sha256": _fingerprint(source, texts, request),
        },
        "frames_of_a_shard": frames_of_a_shard(total, row_bytes, request.shard_mb, request.shard_frames),
        "device": device_kind(device),
        "threads": (request.threads or torch.get_num_threads()) if device.type == "cpu" else None,
        "versions": {name: _version(name) for name in VERSIONS},
        "streams": [stream.as_json() for stream in streams],
        "names": {"dataset": request.dataset, "model": request.model},
    }


def agree(folder: Path, made: dict[str, Any], request: Request) -> dict[str, Any]:
    """Writes a new folder's manifest, or compares with the one that is there, and returns that.

    Raises `ValueError` where the folder is another extraction's, with what differs, or holds other things.
    """
    path = folder / FILE
    if not path.exists():
        beginning = ("claims", f".{FILE}.", RENAMED)  # of others that begin too, or were killed as they began
        others = [name for name in os.listdir(folder) if not name.startswith(beginning)] if folder.is_dir() else []
        if others:
            raise ValueError(f"OUT must be new, empty or an extraction's folder, got {folder} with {sorted(others)[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{FILE}.{uuid.uuid4().hex}"
        write_synced(draft, (json.dumps(made, indent=1) + "\n").encode())
        try:
            with suppress(FileExistsError):  # of two that begin at once the first decides
                os.link(draft, path)
        except OSError:  # a file system without hard links
            os.replace(draft, path)
        draft.unlink(missing_ok=True)
        sync_folder(folder)
    remove_left(folder, f".{FILE}.*")
    there = read_manifest(folder)
    if request.threads is None and there.get("device", "").startswith("CPU"):
        made = made | {"threads": there.get("threads")}
    differing = [name for name in made if name not in NOTES and there.get(name) != made[name]]
    if differing:
        name = differing[0]
        which = _first_difference(there.get(name), made[name], name)
        others = f" (and {', '.join(differing[1:])})" if len(differing) > 1 else ""
        raise ValueError(f"{folder} is another extraction's, choose another folder: {which}{others}")
    return there | {"on_error": request.on_error}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises `ValueError` where there is none, or one of another format."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} must be an extraction's folder, its {FILE} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{folder / FILE} must be of format {FORMAT}, got {shown(found)}")
    return {"file_format": SAFETENSORS} | found  # older folders do not say it


def size_of(source: Source, camera: str) -> tuple[int, int]:
    """Height and width of a camera's first frame that can be read. Raises `ValueError` where none can."""
    damage = None
    for episode in range(len(source.episodes)):
        frame = next(iter(source.frames(camera, [Run(episode, 0, 1)])))
        if not isinstance(frame, Damage):
            return frame.shape[0], frame.shape[1]
        damage = damage or frame
    raise ValueError(f"camera {camera} must have a frame that can be read, got none: {damage}")


def _texts(request: Request, source: Source) -> list[str]:
    """Every different text that hidden states need."""
    if not request.hidden_layers:
        return []
    if request.text is not None:
        return [request.text]
    found: set[str] = set()
    for episode in range(len(source.episodes)):
        texts = source.texts(episode)
        if texts is None:
            asked = ", ".join(what for what in request.what if what != IMAGE_FEATURES)
            raise ValueError(f"{asked} must have a text, and a data set of {source.form} has none: say --text")
        found.update(texts)
    return sorted(found)


def _fingerprint(source: Source, texts: list[str], request: Request) -> str:
    digest = hashlib.sha256()
    for name, size in source.files():
        digest.update(f"{name} {size}\n".encode())
    for episode in range(len(source.episodes)):
        digest.update(source.timestamps(episode).tobytes())
        if texts and request.text is None:
            digest.update("\n".join(source.texts(episode) or ()).encode())
    return digest.hexdigest()


def _hash_files(folder: Path, *patterns: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()


def _first_difference(there: Any, made: Any, name: str) -> str:
    if isinstance(there, dict) and isinstance(made, dict):
        for key in (*made, *there):
            if there.get(key) != made.get(key):
                return _first_difference(there.get(key), made.get(key), f"{name}.{key}")
    return f"its {name} is {shown(there)}, this one's {shown(made)}"


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None

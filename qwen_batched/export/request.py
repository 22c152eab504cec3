"""What an export was asked for, checked before any work."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn

from qwen_batched import ops
from qwen_batched.arguments import as_int, dtype_name, shown
from qwen_batched.checkpoint.config import MAX_FRAME_PIXELS
from qwen_batched.export.disk import check_free, temporary
from qwen_batched.export.preprocessing import Size
from qwen_batched.families import FAMILIES
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL
from qwen_batched.runtime.fast_path import plain_linear

GENAI = "genai"
ENGINE_PYTORCH = "2.8"  # whose loader of packages takes what later ones take
PARTS = {
    "engine": ("vision", "decoder", "cached_decoder", "call"),
    "onnx": ("vision", "decoder", "cached_decoder"),
    GENAI: ("vision", "embedding", "text"),
}
ONNX_DTYPES, ONNX_PACKAGES = (torch.float32, torch.float16), ("onnx", "onnxscript", "onnxruntime")
DTYPES = {"engine": (torch.float32, torch.float16, torch.bfloat16), "onnx": ONNX_DTYPES, GENAI: ONNX_DTYPES}
PACKAGES = {"engine": (), "onnx": ONNX_PACKAGES, GENAI: (*ONNX_PACKAGES, "onnxruntime_genai")}
FRAMES = {"uint8": torch.uint8, "float32": torch.float32, "float16": torch.float16}
LEAST_OPSET, MOST_OPSET, OPSET = 18, 23, 18
FLOAT16_OPSETS = range(18, 23)  # float16 graphs of opset 23 fail in ONNX Runtime
CALL = "call"  # frames and token ids to results, through all parts
TEXT_TOKENS = 9  # of example sequences, beside images, where the sequence is of any length
FREE_SHARE = 1.2  # of the weights' bytes that must be free on the disk, for each copy of them
COMPILED_COPIES = 2  # of a part's weights while it is compiled: an object file, and the library that it is linked to


@dataclass(frozen=True)
class ExportRequest:
    """A checked export."""

    target: str  # "engine", "onnx" or "genai"
    parts: tuple[str, ...]
    source: Size  # of the frames, height and width
    size: Size  # to which they are resized
    grid: tuple[int, int]  # the same in merged cells
    frames_dtype: torch.dtype
    cameras: int
    batch: tuple[int, int]  # least and most samples
    sequence: int | None  # tokens of a sequence, None for any number
    opset: int

    @classmethod
    def of(
        cls,
        model: QwenBatchedVL,
        target: str,
        frames: str | Size | tuple[Size, Size],
        cameras: int,
        batch: int | str | tuple[int, int],
        sequence: int | str | None,
        frames_dtype: torch.dtype | str,
        opset: int,
        parts: list[str] | tuple[str, ...] | None,
    ) -> ExportRequest:
        """Reads the arguments of `export`. Raises `TypeError` or `ValueError` where one is not as described."""
        if target not in PARTS:
            raise ValueError(f"target must be one of {tuple(PARTS)}, got {shown(target)}")
        chosen = PARTS[target] if parts is None else tuple(parts)
        if not chosen or not set(chosen) <= set(PARTS[target]) or len(set(chosen)) < len(chosen):
            raise ValueError(f"parts must be some of {PARTS[target]}, each once, got {shown(parts)}")
        source, size = read_frames(frames)
        config = model.processor.config
        name = dtype_name(frames_dtype)
        factor = config.vision.cell_size
        if any(side % factor for side in size):
            raise ValueError(f"frames must be resized to multiples of {factor} pixels, got {size[0]}x{size[1]}")
        if min(source) < factor:
            raise ValueError(f"frames must be at least {factor} x {factor} pixels, got {source[0]}x{source[1]}")
        if max(source[0] * source[1], size[0] * size[1]) > MAX_FRAME_PIXELS:
            raise ValueError(f"frames must have at most {MAX_FRAME_PIXELS} pixels, got {source} and {size}")
        if name not in FRAMES:
            raise ValueError(f"frames_dtype must be one of {tuple(FRAMES)}, got {shown(frames_dtype)}")
        cameras = as_int("cameras", cameras, 1)
        least, most = read_range(batch)
        grid = (size[0] // factor, size[1] // factor)
        image_tokens = cameras * grid[0] * grid[1]
        limit = config.text.max_position_embeddings
        if sequence is not None and sequence != "dynamic":
            number = int(sequence) if isinstance(sequence, str) and sequence.isdecimal() else sequence
            sequence = as_int("sequence", number, 2)
            if not image_tokens < sequence <= limit:
                expected = f"more than the {image_tokens} tokens of {cameras} images and at most {limit}"
                raise ValueError(f"sequence must be {expected}, got {sequence}")
        else:
            sequence = None
        needed = image_tokens + cameras + TEXT_TOKENS
        if sequence is None and has_decoder(chosen) and needed > limit:
            raise ValueError(
                f"a sequence has at most {limit} tokens, and {cameras} images with a short text have {needed}"
            )
        opset = as_int("opset", opset, LEAST_OPSET, MOST_OPSET)
        if target == GENAI:
            _check_genai(model, chosen, name, sequence)
        check_model(model, target, chosen, opset)
        return cls(target, chosen, source, size, grid, FRAMES[name], cameras, (least, most), sequence, opset)

    @property
    def has_prompt(self) -> bool:
        """Whether texts are laid out by what the folder says."""
        return self.target == "onnx" and {"vision", "cached_decoder"} <= set(self.parts)

    @property
    def copies(self) -> int:
        """Times that the weights are written, at most."""
        return 2 if self.target == GENAI else len(self.parts)  # an embedding is written apart from a head tied to it

    @property
    def dtype_name(self) -> str:
        """Of the frames."""
        return dtype_name(self.frames_dtype)


def has_decoder(parts: Sequence[str]) -> bool:
    """Whether any of the parts holds the decoder."""
    return set(parts) != {"vision"}


def check_model(model: QwenBatchedVL, target: str, parts: tuple[str, ...], opset: int) -> None:
    """Raises `ValueError` where the target cannot hold the model, or what writes it is missing."""
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"an export needs PyTorch 2.7 or newer, got {torch.__version__}")
    for package in PACKAGES[target]:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"target {target!r} needs the package {package}: pip install 'qwen_batched[{target}]'")
    if target == "engine" and Version(torch.__version__) < Version(ENGINE_PYTORCH):
        raise ValueError(f"target 'engine' needs PyTorch {ENGINE_PYTORCH} or newer, got {torch.__version__}")
    if target == "engine" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError("target 'engine' needs a C++ compiler, and neither g++ nor clang++ is there")
    parameter = model.visual.patch_embed.proj.weight
    if parameter.dtype not in DTYPES[target]:
        names = ", ".join(dtype_name(dtype) for dtype in DTYPES[target])
        raise ValueError(f"target {target!r} must have a model in one of {names}, got {parameter.dtype}")
    if target != "engine" and parameter.dtype == torch.float16 and opset not in FLOAT16_OPSETS:
        raise ValueError(f"float16 must go with an opset from 18 to 22, with which it runs, got {opset}")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1 or parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(f"the model must be on one CPU or GPU, got {sorted(map(str, devices))}")
    if model.lm_head is None and set(parts) & {"decoder", "cached_decoder", "text"}:
        raise ValueError("the decoder is exported with its logits, and the model was loaded with lm_head=False")
    of_images = model.processor.resample_backend
    if parameter.device.type == "cpu" and of_images != ops.PILLOW:
        raise ValueError(
            f"an export for CPUs resizes as Pillow: load with resample_backend='pillow', got {of_images!r}"
        )
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"adapters must be merged, by merge_and_unload, before an export, got one at {name}")
        if isinstance(module, nn.Linear) and plain_linear(module) is None:
            raise ValueError(f"every linear layer must be unmodified, got {type(module).__name__} at {name}")


def _check_genai(model: QwenBatchedVL, parts: tuple[str, ...], frames_dtype: str, sequence: int | None) -> None:
    """Raises `ValueError` where onnxruntime-genai does not know the family, or leaves no choice."""
    if model.family.genai_type is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.genai_type is not None)
        raise ValueError(f"target 'genai' must have a model_type of {known}, got {model.family.model_type}")
    device = model.visual.patch_embed.proj.weight.device.type
    for name, expected, found, is_right in (
        ("parts", "all three", parts, sorted(parts) == sorted(PARTS[GENAI])),
        ("frames_dtype", "uint8", frames_dtype, frames_dtype == "uint8"),
        ("sequence", "dynamic", sequence, sequence is None),
        ("the model", "on the CPU", device, device == "cpu"),
    ):
        if not is_right:
            raise ValueError(f"{name} must be {expected} with target 'genai', got {found}")


def check_folder(out: Path, model: QwenBatchedVL, request: ExportRequest) -> None:
    """Raises `ValueError` where a folder cannot be written: it holds something, or a disk is too full."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}")
    if out.exists() and os.path.ismount(out):
        raise ValueError(f"out must be a new or an empty folder that can be replaced, got the mount point {out}")
    if out.exists() and out == Path.cwd():
        raise ValueError(f"out must be a new or an empty folder that can be replaced, got the current one, {out}")
    parent = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"out must be in a folder, got {out}, and {parent} is none")
    held = model if has_decoder(request.parts) else model.visual
    copy = int(FREE_SHARE * sum(p.numel() * p.element_size() for p in held.parameters()))
    needed = [(parent, request.copies * copy)]
    if request.target == "engine":
        needed.append((temporary(), COMPILED_COPIES * copy))
    check_free(needed)


def read_frames(frames: str | Size | tuple[Size, Size]) -> tuple[Size, Size]:
    """Source and resized size of "480x640:224x224", "224x224", (224, 224) or ((480, 640), (224, 224))."""
    if isinstance(frames, str):
        sizes = [re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", part) for part in frames.split(":")]
        if len(sizes) > 2 or None in sizes:
            raise ValueError(f"frames must be as 480x640:224x224 or 224x224 (height x width), got {shown(frames)}")
        found = [(int(size[1]), int(size[2])) for size in sizes]
    else:
        pair = frames if isinstance(frames, (tuple, list)) and len(frames) == 2 else None
        if pair is None:
            raise ValueError(f"frames must be a size or two, (height, width) each, got {shown(frames)}")
        sizes = pair if all(isinstance(size, (tuple, list)) and len(size) == 2 for size in pair) else [pair]
        found = [(as_int("height", height, 1), as_int("width", width, 1)) for height, width in sizes]
    return found[0], found[-1]


def read_range(batch: int | str | tuple[int, int]) -> tuple[int, int]:
    """Least and most of "1-8", 8 or (1, 8)."""
    if isinstance(batch, str):
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", batch)
        if found is None:
            raise ValueError(f"batch must be as 1-8 or 8, got {shown(batch)}")
        batch = (int(found[1]), int(found[2] or found[1]))
    least, most = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, batch)
    least, most = as_int("batch", least, 1), as_int("batch", most, 1)
    if least > most:
        raise ValueError(f"batch must be a range from the least to the most, got {least}-{most}")
    return least, most

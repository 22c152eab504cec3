"""Exported programs -> AOTInductor packages, compiled code with its weights, and back to something that can be called.

A package runs without Python, in whatever links libtorch (examples/cpp). It is tied to the version of PyTorch and the
kind of device that compiled it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qwen_batched.export.tracing import Part, trace

SUFFIX = ".pt2"


def write(part: Part, path: Path) -> None:
    """Compiles a part to a package."""
    from torch import _inductor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _inductor.aoti_compile_and_package(trace(part), package_path=str(path))


def open_package(path: Path) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The package as a function of its arguments in their order."""
    from torch import _inductor

    package = _inductor.aoti_load_package(str(path))

    def run(arguments: Mapping[str, Tensor]) -> list[Tensor]:
        results = package(*arguments.values())
        return [results] if isinstance(results, Tensor) else list(results)

    return run


def load_engine(folder: str | Path, part: str) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """A part of an exported engine, as a function of its arguments by name, to be given in their order.

    Raises `ValueError` where the folder holds no such part, or one for another PyTorch or another kind of device.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if manifest.get("target") != "engine" or part not in manifest.get("parts", ()):
        raise ValueError(f"{folder} must hold the part {part!r} of an export with --target engine, and does not")
    for what, made, here in (
        ("PyTorch", manifest["versions"]["torch"], torch.__version__),
        ("device", manifest["device"], device_kind(torch.device(manifest["device_type"]))),
    ):
        if made != here:
            raise ValueError(f"the package {part!r} was made for {what} {made}, got {here}: export it again here")
    return open_package(folder / f"{part}{SUFFIX}")


def device_kind(device: torch.device) -> str:
    """What packages are tied to: the kind of GPU, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"

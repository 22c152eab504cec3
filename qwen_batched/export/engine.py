"""Exported programs -> AOTInductor packages, compiled code with its weights, and back to something that can be called.

A package runs without Python, in whatever links libtorch (examples/cpp). It is tied to the version of PyTorch and the
kind of device that compiled it.
"""

from __future__ import annotations

import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_batched.export.disk import DeferredErrors, check_free, temporary
from qwen_batched.export.manifest_reading import Kinds, check_keys, read_manifest
from qwen_batched.export.packing import packed
from qwen_batched.export.tracing import Part, trace
from qwen_batched.runtime.backend import has_kernels

SUFFIX = ".pt2"
MODEL_NAME, RUNNERS, ANY_DEVICE = "model", 1, -1  # as PyTorch's own functions write and load packages
# A compiler without the link `libstdc++.so` takes the static library. With a C++ library of its own beside that of
# PyTorch a package crashes when it is loaded, in `std::regex`, which finds the facets of the other one.
SETTINGS: dict[str, object] = {"aot_inductor.custom_op_libs": [":libstdc++.so.6"]} if sys.platform == "linux" else {}
# Precompiled headers take 12 to 20 s, and save 2 s a part.
SETTINGS["aot_inductor.precompile_headers"] = False
# As many threads as where it runs. Else those of the exporter are compiled in, whatever `torch.set_num_threads` says,
# and a process that was forked, as workers of data loaders are, waits for them forever.
SETTINGS["cpp.dynamic_threads"] = True
NEEDED: Kinds = {
    **{"arguments": dict, "batch": list, "cameras": int, "grid": list, "image_token_id": int, "vocabulary_size": int},
    **{"device": str, "device_type": str, "versions.torch": str},
}


def write(part: Part, path: Path) -> None:
    """Compiles a part to a package."""
    from torch import _inductor
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.utils import fresh_inductor_cache

    options = _inductor.list_options()
    settings = {name: value for name, value in SETTINGS.items() if name in options}
    device = next(iter(part.examples.values())).device
    if device.type == "cuda":  # asked here, since tracing is under the reference
        part = replace(part, program=packed(part.program, has_kernels(device)))
    # It tries what the CPU can do by programs, which need not be compiled again each time.
    pick_vec_isa()
    # What else is in the compiler's folder is a copy of the weights, and read by processes that compile the same.
    failure: BaseException | None = None
    with fresh_inductor_cache(), warnings.catch_warnings(), DeferredErrors(path.open("wb")) as file:
        warnings.simplefilter("ignore")
        try:
            _inductor.aoti_compile_and_package(trace(part), package_path=file, inductor_configs=settings)
        except BaseException as error:
            failure = error  # raised outside, or the folder would stay
    failure = failure or file.error
    if failure is not None:
        path.unlink()
        raise failure


def open_package(path: Path, for_graphs: bool = False) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The package as a function of its arguments in their order; see `load_engine`."""
    check_free([(temporary(), _unpacked_size(path))])
    # `aoti_load_package` first compiles programs that try what the CPU can do, 16 s and more, and who runs packages
    # may have no compiler. What it would warn of, `load_engine` refuses.
    package = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL_NAME, for_graphs, RUNNERS, ANY_DEVICE)

    def run(arguments: Mapping[str, Tensor]) -> list[Tensor]:
        return package.boxed_run([*arguments.values()])

    return run


def _unpacked_size(path: Path) -> int:
    """In bytes. Raises `ValueError` where a file is cut off or no package: PyTorch's loader may end the process."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {each.filename: each.file_size for each in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be a package that was written whole, got {error}") from None
    if not any(f"/{MODEL_NAME}/" in name and name.endswith(".so") for name in sizes):
        found = ", ".join([*sizes][:3]) or "nothing"
        raise ValueError(f"{path} must be a package of compiled code, got a zip file with {found}")
    return sum(sizes.values())


def load_engine(
    folder: str | Path, part: str, *, for_graphs: bool = False
) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """A part of an exported engine, as a function of its arguments by name.

    With `for_graphs` a call can be captured in a CUDA graph, and only one thread at a time may call it. On a GPU it
    then does not look at token ids, which would wait for the device: the caller sees to it that each is below the
    manifest's `vocabulary_size`, or the process ends, and that those of a `call` have features for all image tokens.

    Any other argument that the part does not take is a `ValueError` of the function: a package itself checks neither
    shape nor dtype, and reads past the end of what is too small. Raises `ValueError` where the folder holds no such
    part, one that is cut off, one for another PyTorch or another kind of device, or a manifest of another format, and
    where `TMPDIR`, to which packages are unpacked, is too full.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "engine", NEEDED)
    if part not in manifest["arguments"]:
        raise ValueError(f"{folder} must hold the part {part!r}, got {', '.join(manifest['arguments'])}")
    check_keys(folder / "manifest.json", manifest, {f"arguments.{part}": dict})
    keys = (("dtype", str), ("shape", list))
    named = {f"arguments.{part}.{name}.{key}": kind for name in manifest["arguments"][part] for key, kind in keys}
    check_keys(folder / "manifest.json", manifest, named)
    for what, made, here in (
        ("PyTorch", manifest["versions"]["torch"], torch.__version__),
        ("device", manifest["device"], device_kind(torch.device(manifest["device_type"]))),
    ):
        if made != here:
            raise ValueError(f"the package {part!r} was made for {what} {made}, got {here}: export it again here")
    run = open_package(folder / f"{part}{SUFFIX}", for_graphs)
    expected, batch = manifest["arguments"][part], manifest["batch"]
    has_ids = "input_ids" in expected

    def checked(arguments: Mapping[str, Tensor]) -> list[Tensor]:
        check_arguments(arguments, expected, batch, manifest["device_type"])
        if has_ids and (manifest["device_type"] == "cpu" or not for_graphs):  # which waits for a GPU
            _check_ids(arguments, manifest)
        return run({name: arguments[name].contiguous().resolve_neg() for name in expected})

    return checked


def check_arguments(
    arguments: Mapping[str, Tensor], expected: Mapping[str, Mapping[str, Any]], batch: Sequence[int], device_type: str
) -> None:
    """Raises `ValueError` where arguments are not as a manifest describes those of a part."""
    if arguments.keys() != expected.keys():
        raise ValueError(f"arguments must be {', '.join(expected)}, got {', '.join(map(str, arguments)) or 'none'}")
    sizes: dict[str, int] = {}
    for name, like in expected.items():
        x, shape = arguments[name], like["shape"]
        if not isinstance(x, Tensor) or str(x.dtype) != f"torch.{like['dtype']}" or x.device.type != device_type:
            found = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of {like['dtype']} on {device_type}, got {found}")
        if x.layout != torch.strided or x.untyped_storage().device.type != device_type:
            raise ValueError(f"{name} must be a dense tensor with values, got {type(x).__name__} of {x.layout}")
        if x.ndim == len(shape):
            for size, found in zip(shape, x.shape, strict=True):
                if isinstance(size, str) and "+" not in size:
                    sizes.setdefault(size, found)
    for name, like in expected.items():
        wanted = tuple(_resolved(size, sizes) for size in like["shape"])
        if tuple(arguments[name].shape) != wanted:
            named = ", ".join(map(str, like["shape"]))
            raise ValueError(f"{name} must be ({named}), here {wanted}, got {tuple(arguments[name].shape)}")
    if not batch[0] <= (found := sizes.get("batch", batch[0])) <= batch[1]:
        raise ValueError(f"the batch must be of {batch[0]} to {batch[1]} samples, got {found}")
    if empty := [name for name, size in sizes.items() if size == 0 and name != "past"]:
        raise ValueError(f"sizes must be at least 1, got 0 for {', '.join(empty)}")


def _check_ids(arguments: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError` for ids that there are no embeddings of, or image tokens that there are no features of."""
    ids, vocabulary = arguments["input_ids"], manifest["vocabulary_size"]
    least, most = torch.stack(torch.aminmax(ids)).tolist()  # waits for a GPU once
    if least < 0 or most >= vocabulary:
        raise ValueError(f"input_ids must be from 0 to {vocabulary - 1}, got {least} to {most}")
    if "frames" not in arguments:
        return
    cells = manifest["grid"][0] * manifest["grid"][1]
    counts = ((ids == manifest["image_token_id"]) & (arguments["attention_mask"] != 0)).sum(1)
    if ((counts % cells != 0) | (counts > manifest["cameras"] * cells)).any():
        expected = f"{cells} image tokens for each of at most {manifest['cameras']} images"
        raise ValueError(f"input_ids must have {expected}, got {counts.tolist()}")


def _resolved(size: int | str, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sum(sizes.get(name, 0) for name in size.split(" + "))


def device_kind(device: torch.device) -> str:
    """What packages are tied to: the kind of GPU, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"

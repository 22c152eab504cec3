"""`export`: a model -> a folder that was checked against it."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen_batched.export import engine, manifest, onnx_files
from qwen_batched.export.genai.config_files import write_config_files
from qwen_batched.export.genai.parts import GenaiParts
from qwen_batched.export.genai.running import Run, open_folder
from qwen_batched.export.live import LiveModel
from qwen_batched.export.parts import Parts
from qwen_batched.export.preprocessing import Size
from qwen_batched.export.request import CALL, GENAI, OPSET, ExportRequest, check_folder
from qwen_batched.export.verification import Deviation, exact_results, live_cases, measure
from qwen_batched.qwen_batched_VL_model import QwenBatchedVL

TEMPLATE = "chat"
_ONE_AT_A_TIME = threading.Lock()  # tracers and compilers set what is of the whole process


class ExportError(RuntimeError):
    """What was written is too far from the live model, or could not be written; nothing of it was left."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def export(
    model: QwenBatchedVL,
    out: str | Path,
    target: str,
    frames: str | Size | tuple[Size, Size],
    *,
    cameras: int = 1,
    batch: int | str | tuple[int, int] = (1, 8),
    sequence: int | str | None = None,
    frames_dtype: torch.dtype | str = "uint8",
    opset: int = OPSET,
    parts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes a folder of compiled packages, of ONNX graphs, or of what onnxruntime-genai runs, and a manifest.

    The parts: `vision`, frames to features; `decoder`, ids and features to logits; `cached_decoder`, the same behind a
    key-value cache; `call` (engine only), frames and ids to hidden states. Those of "genai" are `vision`, `embedding`
    and `text`. See docs/export.md for their arguments.

    Args:
        model: In the dtype and on the device that are exported for. It stays as it is.
        out: A folder that does not exist or is empty. It appears when all is written and checked.
        target: "engine" for AOTInductor packages (.pt2), "onnx" for ONNX graphs, "genai" for the graphs and configs of
            onnxruntime-genai, which runs the whole folder before it appears.
        frames: Height and width of the frames and of what they are resized to, "480x640:224x224" or pairs of ints; one
            size where they are not resized.
        cameras: Frames of a sample. With "genai" a prompt may have any number, and this many are checked.
        batch: Least and most samples, "1-8" or a pair, or a single number.
        sequence: Tokens of a sequence in `decoder` and `call`; None or "dynamic" for any number.
        frames_dtype: uint8 in 0..255, or float32 or float16 in 0..1, but with "genai".
        opset: Of ONNX graphs.
        parts: Which are written; None for all, as "genai" must have. Each part that holds the decoder holds its weights
            again.

    Returns:
        What manifest.json says, the measured deviation of each part included.

    Raises:
        TypeError, ValueError: An argument is not as described, or the target cannot hold the model. Raised before any
            work.
        ExportError: A part is further from the live model than its bound, or its exporter failed.
    """
    if not isinstance(model, QwenBatchedVL):
        raise TypeError(f"model must be a QwenBatchedVL, got {type(model).__name__}")
    options = (target, frames, cameras, batch, sequence, frames_dtype, opset, parts)
    return export_live(LiveModel(lambda: model, is_kept=True), out, *options)


def export_live(live: LiveModel, out: str | Path, *options: Any) -> dict[str, Any]:
    """`export` of a model that need not stay in memory; takes the other arguments as `ExportRequest.of` does."""
    out = Path(os.path.realpath(out))  # of a link, what it leads to
    chosen = ExportRequest.of(live.model, *options)
    check_folder(out, live.model, chosen)
    device = live.model.visual.patch_embed.proj.weight.device.type
    # Graphs would keep autocast; tensors made in inference mode cannot be traced.
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.autocast(device, enabled=False):
        return _export(live, out, chosen)


def _export(live: LiveModel, out: Path, chosen: ExportRequest) -> dict[str, Any]:
    prompts, parts = live.model.processor.prompts, live.parts(chosen)
    prompt = prompts.pieces(TEMPLATE, chosen.cameras) if chosen.has_prompt and prompts.chat else None
    arguments = {name: parts.part(name).arguments() for name in chosen.parts}
    content = manifest.manifest(live.model, chosen, arguments, prompt)
    del parts
    missing = [parent for parent in out.parents if not parent.exists()]
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        manifest.write_companions(folder, content, live.model)
        deviations = {}
        steps = (*chosen.parts, CALL) if chosen.target == GENAI else chosen.parts  # the last runs what the others wrote
        for name in tqdm(steps, desc="export", leave=False, disable=None):
            deviations[name] = _write_part(live, chosen, name, folder)
            if not deviations[name].is_within:
                found = f"{deviations[name].measured:.2e}, more than {deviations[name].bound:.2e}"
                raise ExportError(f"{name} deviates from the live model by a relative L2 of {found}: nothing is left")
        content["deviation"] = {name: vars(each) for name, each in deviations.items()}
        manifest.write(folder, content)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not out.exists():
            for parent in missing:  # the innermost first
                with contextlib.suppress(OSError):
                    parent.rmdir()
    return content


def _write_part(live: LiveModel, chosen: ExportRequest, name: str, folder: Path) -> Deviation:
    """Writes a part and runs what was written, after the live model, whose weights need not stay meanwhile."""
    parts = live.parts(chosen)
    with _failures_named(f"{name} could not be written as {chosen.target}"):
        open_written = _write(parts, name, folder)
    cases, dtype = live_cases(name, parts, sorted({*chosen.batch})), parts.dtype
    del parts
    live.release()
    with _failures_named(f"{name} could not be run"):
        run = open_written()
        written = [run(case.arguments) for case in cases]
        del run
    return measure(cases, written, dtype, lambda: exact_results(name, live.parts(chosen), [x.arguments for x in cases]))


def _write(parts: Parts | GenaiParts, name: str, folder: Path) -> Callable[[], Run]:
    """Writes a part; what is returned opens it."""
    request = parts.request
    if request.target == GENAI and name == CALL:
        write_config_files(folder, parts.model, request)
        return functools.partial(open_folder, folder, parts.prompts)
    if request.target == "engine":
        path = folder / f"{name}{engine.SUFFIX}"
        engine.write(parts.part(name), path)
        return functools.partial(engine.open_package, path)
    path = folder / f"{name}{onnx_files.SUFFIX}"
    onnx_files.write(parts.part(name), path, request.opset)
    return functools.partial(onnx_files.open_graph, path)


@contextlib.contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """`ExportError` in place of what is raised, but for files that cannot be written, and too little memory."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ExportError(f"{what}: {error}") from error

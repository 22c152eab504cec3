"""What the command line does with a request: extracts and sums up, estimates, verifies."""

from __future__ import annotations

import sys
import time

import pyarrow as pa
import torch
from tqdm import tqdm

from qwen_batched.checkpoint.device import resolve_device
from qwen_batched.extraction.decoding import DamagedData
from qwen_batched.extraction.encoding import Encoder
from qwen_batched.extraction.engine_ray import run_ray
from qwen_batched.extraction.engines import WorkersFailed, run_local, run_torchrun, torchrun_place
from qwen_batched.extraction.job import Job, Outcome, make_worker, open_job, open_request_source, outcome
from qwen_batched.extraction.manifest import agree, make_manifest, read_manifest
from qwen_batched.extraction.request import Request
from qwen_batched.extraction.streams import dtype_in, streams_in
from qwen_batched.extraction.verification import check_rows
from qwen_batched.extraction.work import work_list
from qwen_batched.runtime.arena import synchronize

REFUSALS = (OSError, TypeError, ValueError, ImportError, pa.ArrowException, torch.OutOfMemoryError)
FAILURES = (DamagedData, OSError, WorkersFailed, torch.OutOfMemoryError)
SHOWN = 10  # frames that were skipped
TIMED = 4  # batches, for a dry run

__all__ = ["FAILURES", "REFUSALS", "describe", "extract", "open_job", "processes", "verify"]


def processes(request: Request, gpus: int | None, engine: str) -> int:
    """How many processes or actors. Raises `ValueError` where there are not as many GPUs, or torchrun decides."""
    on_gpu = resolve_device(request.device).type == "cuda"
    there = torch.cuda.device_count() if on_gpu else 0
    if gpus is not None and gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if engine == "torchrun":
        _, ranks, _ = torchrun_place()
        if gpus not in (None, ranks):
            raise ValueError(f"gpus must be left to torchrun, which has started {ranks} processes, got {gpus}")
        return ranks
    if engine == "local" and on_gpu and gpus is not None and gpus > there:
        raise ValueError(f"gpus must be at most {there}, as many as there are, got {gpus}")
    return gpus or max(1, there)


def extract(job: Job, engine: str, count: int) -> bool:
    """Extracts with a progress bar, and prints a summary. False where frames are missing in the end."""
    is_first = engine != "torchrun" or torchrun_place()[0] == 0
    before = outcome(job.request.out, job.manifest)
    total = sum(frames for _, frames in job.manifest["data"]["episodes"])
    started = time.perf_counter()
    done = before.frames + len({(episode, frame) for _, episode, frame, _ in before.skipped})
    with tqdm(total=total, initial=done, unit="frame", smoothing=0.05, disable=not is_first, mininterval=0.5) as bar:
        written = 0

        def report(frames: int) -> None:
            nonlocal written
            written += frames
            bar.update(frames)

        if engine == "torchrun":
            run_torchrun(job, report)
        elif engine == "ray":
            run_ray(job, count, report)
        else:
            run_local(job, count, report, lambda text: print(f"extract: {text}", file=sys.stderr))
    after = outcome(job.request.out, job.manifest)
    if is_first:
        _sum_up(job, after, written, time.perf_counter() - started)
    return after.is_complete


def _sum_up(job: Job, after: Outcome, written: int, seconds: float) -> None:
    cameras = len(job.source.cameras)
    images = written * cameras
    print(
        f"{job.request.out}: {after.frames} frames of {cameras} cameras, {after.bytes / 1e6:.1f} MB in "
        f"{after.parts} parts; in this run {images} images in {seconds:.1f} s, {images / seconds:.1f} a second"
    )
    for damage in job.manifest["data"]["left_out"]:
        print(f"left out: {damage['path']}: {damage['reason']}", file=sys.stderr)
    for camera, episode, frame, reason in after.skipped[:SHOWN]:
        print(f"skipped: camera {camera}, episode {episode}, frame {frame}: {reason}", file=sys.stderr)
    if count := len(after.skipped) + after.left_out:
        more = f", {len(after.skipped) - SHOWN} more than are named here" if len(after.skipped) > SHOWN else ""
        print(f"extract: {count} skipped{more}: repaired data need a new folder", file=sys.stderr)
    if after.missing:
        print(f"extract: {after.missing} parts are missing", file=sys.stderr)


def describe(request: Request, rate: float | None) -> str:
    """Frames, bytes and hours of a request; nothing is written.

    `rate`: images a second of a device; None to measure it on this machine's, with black frames.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"images_per_second must be more than 0, got {rate}")
    manifest = make_manifest(request, open_request_source(request))
    frames, episodes = sum(frames for _, frames in manifest["data"]["episodes"]), len(manifest["data"]["episodes"])
    row = sum(stream.row_bytes(dtype_in(manifest)) for stream in streams_in(manifest))
    cameras = manifest["data"]["cameras"]
    source = "as given" if rate else "as measured here"
    rate = rate or _measure(request, manifest)
    images = frames * len(cameras)
    kind = "CPU" if manifest["device"].startswith("CPU") else "GPU"
    lines = [
        f"{frames} frames in {episodes} episodes, cameras {', '.join(cameras)}: {images} images",
        f"{frames * row} bytes of features ({frames * row / 1e9:.3f} GB) in {len(work_list(manifest))} parts",
        f"{images / rate / 3600:.3f} {kind} hours at {rate:.1f} images a second, {source}",
    ]
    return "\n".join([*lines, *(f"{stream.folder}: {stream.shape} of a frame" for stream in streams_in(manifest))])


def _measure(request: Request, manifest: dict[str, object]) -> float:
    encoder = Encoder.load(request.model, manifest, resolve_device(request.device))
    sizes = manifest["data"]["cameras"].values()
    count = manifest["batch_size"]
    images = [torch.zeros(count, 3, *size, dtype=torch.uint8) for size in sizes]
    texts = [request.text or ""] * count
    for timed in range(-2, TIMED):  # the first ones make kernels and graphs
        if timed == 0:
            synchronize(encoder.model.device)
            started = time.perf_counter()
        encoder(images, texts)
    synchronize(encoder.model.device)
    return TIMED * count * len(images) / (time.perf_counter() - started)


def verify(request: Request, rows: int) -> bool:
    """Computes a sample of rows again and says what differs. False where any does, or parts are missing."""
    if rows < 1:
        raise ValueError(f"verify must be at least 1 row, got {rows}")
    read_manifest(request.out)  # there must be one
    source = open_request_source(request)
    manifest = agree(request.out, make_manifest(request, source), request)
    found = outcome(request.out, manifest)
    if not found.parts:
        raise ValueError(f"{request.out} must have at least one part to verify, got none")
    worker = make_worker(request, manifest | {"on_error": "skip"}, source)  # what was skipped is no error here
    differing, compared = check_rows(worker, work_list(manifest), rows)
    for text in differing:
        print(f"extract: {text}", file=sys.stderr)
    print(f"{compared} rows computed again, {len(differing)} differ; {found.missing} parts are missing")
    return not differing and not found.missing

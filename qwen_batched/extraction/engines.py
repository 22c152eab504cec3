"""Processes that work on a job: of this machine, or as torchrun started them."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from qwen_batched.extraction.job import Job, make_worker, open_request_source, order
from qwen_batched.extraction.request import Request
from qwen_batched.extraction.work import work_list
from qwen_batched.extraction.worker import Report

FRAMES, ERROR = "frames", "error"


class WorkersFailed(RuntimeError):
    """Processes have failed, and work is missing."""


def run_local(job: Job, processes: int, report: Report, note: Any) -> None:
    """Works in this process, or in several: on a GPU each, or on the CPU.

    Args:
        job: See there.
        processes: How many.
        report: Called with the number of frames that were written.
        note: Called with a sentence where a process has died and the others go on.

    Raises:
        ValueError: There are fewer GPUs.
        WorkersFailed: A process has failed, with what it said; or all have died.
    """
    on_gpu = (job.request.device or "").startswith("cuda") or (job.request.device is None and torch.cuda.is_available())
    if on_gpu and processes > torch.cuda.device_count():
        raise ValueError(f"gpus must be at most {torch.cuda.device_count()}, as many as there are, got {processes}")
    if processes == 1:
        job.work(report)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, Any] = {}
    for index in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        device = f"cuda:{index}" if on_gpu else "cpu"
        arguments = (job.request, job.manifest, index, processes, device, os.getpid(), theirs)
        process = context.Process(target=_work, args=arguments, name=f"worker {index} ({device})")
        process.start()
        theirs.close()
        running[ours] = process
    try:
        _follow(running, report, note)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _follow(running: dict[Connection, Any], report: Report, note: Any) -> None:
    """Reads what processes say until all have ended."""
    has_succeeded, died = False, []
    while running:
        for connection in wait(list(running)):
            try:
                kind, value = connection.recv()
            except EOFError:
                process = running.pop(connection)
                process.join()
                has_succeeded |= process.exitcode == 0
                if process.exitcode:
                    died.append(f"{process.name} died with exit code {process.exitcode}")
                    if running:
                        note(f"{died[-1]}; the others take its part")
                continue
            if kind == ERROR:
                raise WorkersFailed(f"{running[connection].name}: {value}")
            report(value)
    if not has_succeeded:
        raise WorkersFailed("; ".join(died))


def _work(
    request: Request,
    manifest: dict[str, Any],
    index: int,
    count: int,
    device: str,
    parent: int,
    connection: Connection,
) -> None:
    """A process of `run_local`."""
    try:
        worker = make_worker(request, manifest, open_request_source(request), device, parent)
        worker.run(order(work_list(manifest), index, count), lambda frames: connection.send((FRAMES, frames)))
    except Exception as error:  # the parent says it, and ends all
        connection.send((ERROR, " ".join(str(error).split()) or type(error).__name__))
        raise SystemExit(1) from None


def torchrun_place() -> tuple[int, int, int]:
    """Rank, number of ranks and local rank of this process. Raises `ValueError` outside of torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"engine torchrun must be started by torchrun, which sets {missing[0]}, got none")
    rank, ranks, local = (int(os.environ[name]) for name in names)
    return rank, ranks, local


def run_torchrun(job: Job, report: Report) -> None:
    """Works as one of torchrun's processes: its part of the work first, then what others have not claimed."""
    rank, ranks, local = torchrun_place()
    device = job.request.device
    if device is None and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun must start at most one process for each of {torch.cuda.device_count()} GPUs")
        device = f"cuda:{local}"
    job.work(report, rank, ranks, device)

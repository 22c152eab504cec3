"""Ray's actors on a job, by Ray Data: descriptors of parts go in and out, features go to the folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_batched.extraction.engines import WorkersFailed
from qwen_batched.extraction.job import Job, make_worker, open_request_source
from qwen_batched.extraction.request import Request
from qwen_batched.extraction.work import work_list
from qwen_batched.extraction.worker import Report

PARTS_OF_A_CALL = 8  # at most, so that an actor decodes the next part while it encodes one
READER_CPUS = 0.1  # of the tasks that hand out descriptors: a whole one each would leave none for actors


def run_ray(job: Job, actors: int, report: Report) -> None:
    """Works in `actors` actors, on a GPU each where the job is on GPUs.

    Connects to the cluster that `ray.init()` finds, or starts one here.

    Raises:
        ValueError: Ray is not installed.
        WorkersFailed: An actor has failed, with what it said.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('engine ray must have Ray, which is not installed: pip install "qwen_batched[ray]"') from error
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        _run(ray, job, actors, report)
    except ray.exceptions.RayError as error:  # an actor could not begin, or died
        raise WorkersFailed(f"ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if is_ours:
            ray.shutdown()


def _run(ray: Any, job: Job, actors: int, report: Report) -> None:
    on_gpu = not job.manifest["device"].startswith("CPU")
    ray.data.DataContext.get_current().enable_progress_bars = False
    at_once = max(1, min(PARTS_OF_A_CALL, len(job.parts) // (2 * actors)))
    blocks = max(actors, -(-len(job.parts) // at_once))
    items = [{"part": part.number} for part in job.parts]
    rows = ray.data.from_items(items, override_num_blocks=min(blocks, len(items))).map_batches(
        _Actor,
        fn_constructor_args=(job.request, job.manifest),
        batch_size=at_once,
        batch_format="numpy",
        concurrency=actors,
        num_gpus=1 if on_gpu else 0,
        num_cpus=READER_CPUS if on_gpu else 0.5,
    )
    for row in rows.iter_rows():
        report(int(row["frames"]))
        if row["error"]:
            raise WorkersFailed(f"an actor of ray: {row['error']}")


class _Actor:
    """Holds the model; a call works on some parts."""

    def __init__(self, request: Request, manifest: dict[str, Any]) -> None:
        self.worker = make_worker(request, manifest, open_request_source(request))
        self.parts = work_list(manifest)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`part` numbers -> the same, with the frames that were written for them and an error, all on the first."""
        written, reason = [], ""
        try:
            self.worker.run([self.parts[number] for number in batch["part"].tolist()], written.append)
        except Exception as error:  # Ray would tell it in a traceback of its own
            reason = " ".join(str(error).split()) or type(error).__name__
        others = len(batch["part"]) - 1
        frames = np.array([sum(written), *([0] * others)], np.int64)
        return {"part": batch["part"], "frames": frames, "error": np.array([reason, *([""] * others)])}

"""What the host waits for: calls whose waits raise, and a trace of calls with their waits by name."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
from torch.profiler import ProfilerActivity, record_function

COUNTED = "calls whose waits are counted"


@contextmanager
def waits_raise(device: torch.device) -> Iterator[None]:
    """A wait of the host for the GPU raises. So does a shape that gets no graph, in whose making it would be caught."""
    with warnings.catch_warnings():
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        warnings.filterwarnings("error", "no CUDA graph")
        try:
            yield
        except RuntimeWarning as error:
            raise RuntimeError(str(error)) from error
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def traced_waits(call: Callable[[], object], device: torch.device, calls: int = 2) -> dict[str, int]:
    """Synchronisations and copies to the host in so many calls, by name."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        with record_function(COUNTED):
            for _ in range(calls):
                call()
        measure.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return waits_in(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def waits_in(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Of the events of torch.profiler's trace: waits while the calls ran on the host, and all copies to the host."""
    events = [event for event in events if "cat" in event]
    ((start, stop),) = (
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["cat"] == "user_annotation" and event["name"] == COUNTED
    )
    waits = (
        event["name"]
        for event in events
        if event["cat"] in ("cuda_runtime", "cuda_driver")
        and "Synchronize" in event["name"]
        and start <= event["ts"] <= stop
    )
    copies = (event["name"] for event in events if event["cat"] == "gpu_memcpy" and "DtoH" in event["name"])
    return dict(Counter([*waits, *copies]))

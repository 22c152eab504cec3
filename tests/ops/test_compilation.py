"""Every Triton kernel compiles for GPUs that are not there: the interpreter accepts what the compiler refuses."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# "Maximum amount of shared memory per thread block" among the technical specifications of each compute capability in
# NVIDIA's CUDA programming guide. "Late": without programmatic dependent launch, as where Triton does not have it.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_90, late": 227 * 1024}

targets = pytest.mark.parametrize("target", SHARED_MEMORY)


@pytest.fixture(scope="module")
def report(request, tmp_path_factory, made_once):
    """What `compilation` prints, from a process without the interpreter.

    Triton keeps what it compiled under a hash of all that goes into it, with pytest's own cache: what has not changed
    since the last run is not compiled again.
    """
    cache = getattr(request.config, "cache", None)
    kept = cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(kept)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.compilation"]

    def compile_all(_):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(done.stdout)

    _, report = made_once("triton", compile_all)
    assert {launch["target"] for launch in report["launches"]} == set(SHARED_MEMORY)
    return report


def launches_on(report, target):
    return [launch for launch in report["launches"] if launch["target"] == target]


@targets
def test_every_launch_compiles(report, target):
    failed = [launch for launch in launches_on(report, target) if launch["error"]]
    assert not failed, "\n\n".join(f"{one['kernel']}({one['arguments']})\n{one['error']}" for one in failed)


@targets
def test_every_launch_fits_into_shared_memory(report, target):
    compiled = [launch for launch in launches_on(report, target) if not launch["error"]]
    assert [launch for launch in compiled if launch["shared"] > SHARED_MEMORY[target]] == []


@targets
def test_every_kernel_of_the_package_is_compiled(report, target):
    assert report["kernels"]
    assert {launch["kernel"] for launch in launches_on(report, target)} == set(report["kernels"])


def test_every_flag_of_a_kernel_is_compiled_both_ways(report):
    values = defaultdict(set)
    for launch in report["launches"]:
        for name, value in launch["flags"].items():
            values[launch["kernel"], name].add(value)
    chosen_by_targets = ("EARLY", "launch_pdl")
    one_way = [key for key, seen in values.items() if len(seen) == 1 and key[1] not in chosen_by_targets]
    assert one_way == []

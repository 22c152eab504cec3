"""The benchmark runs from end to end on few frames, and finds nothing wrong."""

import pytest

from tests.test_benchmarks import run_smoke


@pytest.mark.slow
def test_a_smoke_run_extracts_every_frame_and_reads_them():
    report = run_smoke("extraction", "frames")
    assert report["benchmark"] == "extraction" and report["wrong"] == report["goals"] == []
    assert report["frames"]["frames"] == 400 and report["frames"]["memory_mib"]

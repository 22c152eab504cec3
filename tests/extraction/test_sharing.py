"""Several commands on one folder: they begin at once, fail apart, and do not take each other's work."""

import errno
import os
import threading
import time

from qwen_batched.extract import main
from qwen_batched.extraction import shards
from qwen_batched.extraction.claims import Claims
from tests.extraction import written
from tests.extraction.written import arguments


def test_a_write_that_fails_ends_the_command_while_it_waits_for_anothers_part(checkpoint, tmp_path, monkeypatch):
    """Else two commands on a full disk, which each hold a part that they could not write, wait for each other."""
    out = tmp_path / "out"
    (out / "claims").mkdir(parents=True)
    other = Claims(out, 600)
    assert other.take(["part-00001"], lambda _: False)

    def fail_later(*_):
        time.sleep(0.5)  # until the command waits for the other
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_write_at", fail_later)
    codes = []
    command = arguments(written.write_images(tmp_path / "data", (2, 2)), out, checkpoint, "--shard-frames", 2)
    thread = threading.Thread(target=lambda: codes.append(main(command)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert codes == [1]

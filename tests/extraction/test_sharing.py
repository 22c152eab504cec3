"""Several commands on one folder: they begin at once, fail apart, and do not take each other's work."""

import errno
import os
import threading
import time
from pathlib import Path

from qwen_batched.extract import main
from qwen_batched.extraction import claims, shards
from qwen_batched.extraction.claims import Claims
from qwen_batched.extraction.syncing import check_renames
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


def test_a_command_begins_in_a_folder_where_another_is_just_beginning_or_was_killed_as_it_began(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".rename-0", ".manifest.json.0", "claims"):
        (out / name).write_text("") if name != "claims" else (out / name).mkdir()
    command = arguments(written.write_images(tmp_path / "data", (2,)), out, checkpoint)
    assert main(command) == 0
    assert (out / ".rename-0").exists()  # another's, who is perhaps alive
    for name in (".rename-0", ".manifest.json.0"):
        os.utime(out / name, (1, 1))
    assert main(command) == 0
    assert sorted(os.listdir(out)) == ["claims", "features", "index", "manifest.json"]


def test_a_draft_that_another_command_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / ".rename-0").write_text("")
    stat = Path.stat

    def vanishing(path, **options):
        if path.name == ".rename-0":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    check_renames(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_claim_expires_as_its_holder_renews_it_and_not_earlier(tmp_path):
    """A command with a short expiry else takes the parts of one with a long one as they are worked on."""
    patient, hasty = Claims(tmp_path, 120), Claims(tmp_path, 1)
    assert patient.take(["a"], lambda _: False) and hasty.take(["b"], lambda _: False)
    for name, age in (("a", 60), ("b", 60)):
        with patient.locked() as now:
            os.utime(tmp_path / "claims" / name, (now - age, now - age))
    assert hasty.take(["a"], lambda _: False) is None
    assert Claims(tmp_path, 1).take(["b"], lambda _: False) == "b"


def test_processes_of_machines_with_one_name_are_told_apart(tmp_path, monkeypatch):
    first = Claims(tmp_path, 60)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **o: "other" if path.name == "boot_id" else read(path, **o))
    assert claims._host() != first.owner["host"]


def test_a_claim_that_was_never_written_is_soon_free(tmp_path):
    """Its process was killed in between, or the disk was full."""
    first = Claims(tmp_path, 600)
    (tmp_path / "claims/a").write_text("")
    assert first.take(["a"], lambda _: False) is None  # it may be being written
    with first.locked() as now:
        os.utime(tmp_path / "claims/a", (now - 6, now - 6))
    assert first.take(["a"], lambda _: False) == "a"

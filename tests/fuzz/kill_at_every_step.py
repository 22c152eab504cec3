"""Kills the renaming mechanism at each of its steps, and each recovery at each of its own; or finds the disk full.

    python -m tests.fuzz.kill_at_every_step [every]

The files are a few bytes, so that every step is tried, with and without hard links: a save is killed before step i, the
recovery before step j, and the next recovery must find all files old or all new. Of all pairs of i and j, one in
`every` is tried, and each i and each j. `kill_while_saving` does this to a model.
"""

import functools
import importlib.util
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.interrupted import files, in_a_child, save_failing

# By itself, without the package and torch: a process is forked for each of thousands of kills.
SOURCE = Path(__file__).resolve().parents[2] / "qwen_batched" / "checkpoint" / "atomic_save.py"
SPEC = importlib.util.spec_from_file_location("atomic_save", SOURCE)
atomic_save = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(atomic_save)

OLD = ("a.safetensors", "config.json", "stale.json", "linked.json", "note.txt")
NEW = ("b.safetensors", "config.json", "linked.json", "new.json")


def prepare(folder: Path) -> None:
    """Old files, of which one is a link and one a folder where a file will be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in OLD:
        (folder / name).write_bytes(b"old")
    (folder / "linked.json").unlink()
    (folder / "linked.json").symlink_to("../target")
    (folder / "new.json").mkdir()
    (folder / "new.json" / "inside").write_bytes(b"old")


def save(folder: Path) -> None:
    """Replaces every file but the note."""
    with atomic_save.replacing(folder, lambda name: name != "note.txt", "config.json") as new:
        for name in NEW:
            atomic_save.write_file(new / name, b"new")


def main(every: int = 1) -> None:
    """Prints how often which files were found; an exception says what went wrong."""
    found: Counter = Counter()
    with tempfile.TemporaryDirectory() as root:
        folder, target = Path(root).resolve() / "folder", Path(root) / "target"
        target.write_bytes(b"elsewhere")
        for links in (True, False):

            def failing(work, step: int | None = None, action: str = "kill", links: bool = links) -> tuple:
                return in_a_child(functools.partial(save_failing, work, folder, links, step, action))

            saving, recovering = functools.partial(save, folder), functools.partial(atomic_save.recover, folder)
            prepare(folder)
            old = files(folder)
            _, (_, steps) = failing(saving)
            new = files(folder)

            def state(what: str, old: dict = old, new: dict = new) -> str:
                now = files(folder)
                assert now in (old, new), f"{what}: {sorted(now)}"
                assert target.read_bytes() == b"elsewhere", f"{what}: wrote through a link"
                return "old" if now == old else "new"

            for step in range(1, steps + 1):
                recovery, ended = step % every + 1 - every, signal.SIGKILL
                while ended == signal.SIGKILL:  # until the recovery has no step of that number
                    recovery += every
                    prepare(folder)
                    assert failing(saving, step)[0] == signal.SIGKILL
                    ended, _ = failing(recovering, recovery)
                    atomic_save.recover(folder)
                    found["killed", state(f"killed before step {step}, then before {recovery}")] += 1
                prepare(folder)
                _, (done, value) = failing(saving, step, "full")
                assert done or (OSError in value[0] and str(folder) in str(value[1])), value[-1]
                which = state(f"full from step {step}")
                assert which == "new" if done else which == "old", f"full from step {step}: {which}"
                found["full", which] += 1
    for (what, which), count in sorted(found.items()):
        print(f"{what}, found {which}: {count}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Processes that are killed, or find the disk full, before a step on the file system. They fork: nothing heavy here."""

import contextlib
import errno
import functools
import hashlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

CREATING = {"os.mkdir", "os.link", "open"}  # steps that a full disk refuses from the first one on
STEPS = {*CREATING, "os.rename", "os.remove", "os.rmdir", "os.chmod"}


def files(folder: Path) -> dict[str, object]:
    """Everything in a folder: contents, where links lead, and modes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name, mode = str(path.relative_to(folder)), path.lstat().st_mode
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = (mode, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
    return found


def in_a_child(work: functools.partial, kill_after: float | None = None) -> tuple[int, object]:
    """Runs `work` in a forked process: its signal, 0 for none, and its result or the exception's traceback."""
    with tempfile.TemporaryFile() as channel:
        child = os.fork()
        if child == 0:
            try:
                result = (True, work())
            except BaseException as error:
                result = (False, (type(error).__mro__, getattr(error, "filename", None), traceback.format_exc()))
            pickle.dump(result, channel)
            channel.flush()
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        channel.seek(0)
        return os.WTERMSIG(status), pickle.load(channel) if not os.WTERMSIG(status) else (False, None)


def save_failing(save: functools.partial, folder: Path, links: bool, step: int | None, action: str) -> int:
    """Saves; before the step of that number it kills this process, or the disk is full. Returns the steps seen.

    Only for a child: the hook cannot be removed. Nothing is synced, since a kill is no loss of power.
    """
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event not in STEPS or not on:
            return
        if event == "open" and not is_written(folder, *arguments):
            return
        seen += 1
        if step is None or seen < step:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        # Renames are refused once: taking them back needs no space. Removing never does.
        if event in CREATING or (event == "os.rename" and seen == step):
            raise OSError(errno.ENOSPC, "No space left on device", *arguments[:1])

    on = True
    sys.addaudithook(hook)
    refuse = mock.Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
    with mock.patch("os.link", refuse) if not links else contextlib.nullcontext(), mock.patch("os.fsync"):
        save()
    on = False
    return seen


def is_written(folder: Path, path: object, mode: object, flags: object) -> bool:
    """Whether an audited `open` is one of the folder's files for writing."""
    return isinstance(path, str | bytes | os.PathLike) and str(folder) in os.fsdecode(path) and bool(flags & 3)


def result(work: functools.partial) -> object:
    """What `work` returns in a process of its own."""
    _, (done, value) = in_a_child(work)
    assert done, value[-1]
    return value

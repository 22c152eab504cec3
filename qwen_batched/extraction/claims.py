"""Who works on which part: a file for each claim, so that commands on one folder share it, on one machine or many.

A claim is made by creating its file, renewed by touching it, and free again when it was not renewed for the expiry, or
at once when its process is known to be dead. All of that happens under a lock of the folder, whose own times of
modification are the clock: they are the file server's, whatever the machines' clocks say.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen_batched.checkpoint.atomic_save import UNSUPPORTED

FOLDER, LOCK = "claims", "lock"
WRITTEN = 5.0  # seconds after which an empty claim is one whose writer was killed, or had no room on the disk


class Claims:
    """The claims of one process on a folder's parts."""

    def __init__(self, folder: Path, expiry: float) -> None:
        """`expiry` in seconds."""
        self.folder, self.expiry = folder / FOLDER, expiry
        self.folder.mkdir(exist_ok=True)
        self.owner = {"host": _host(), "pid": os.getpid(), "id": uuid.uuid4().hex, "expiry": expiry}
        self.held: set[str] = set()

    def take(self, names: Sequence[str], is_done: Callable[[str], bool]) -> str | None:
        """Claims the first of these parts that is neither done nor another's; None where there is none."""
        with self.locked() as now:
            for name in names:
                if name in self.held or is_done(name) or not self._is_free(name, now):
                    continue
                path = self.folder / name
                path.unlink(missing_ok=True)
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                with os.fdopen(file, "w") as opened:
                    json.dump(self.owner, opened)
                self.held.add(name)
                return name
        return None

    def renew(self) -> None:
        """Touches all claims that are held."""
        for name in tuple(self.held):
            if self.is_mine(name):  # and not another's, who found it expired
                with suppress(OSError):
                    os.utime(self.folder / name)

    def is_mine(self, name: str) -> bool:
        """Whether a claim is still this process's, and not expired and taken by another; asked under the lock."""
        return _read(self.folder / name).get("id") == self.owner["id"]

    def release(self, name: str) -> None:
        """Gives a claim back."""
        with self.locked():
            self.held.discard(name)
            if self.is_mine(name):
                (self.folder / name).unlink(missing_ok=True)

    def release_all(self) -> None:
        """Gives all claims back."""
        for name in tuple(self.held):
            self.release(name)

    def remove_left(self, names: Collection[str]) -> None:
        """Removes claims of killed processes on these parts, which are done."""
        with self.locked() as now:
            for path in self.folder.glob("part-*"):
                if path.name in names and self._is_free(path.name, now):
                    path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[float]:
        """Holds the folder's lock; yields the time by the folder's clock."""
        import fcntl  # not on Windows, where the package can be imported all the same

        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in UNSUPPORTED:  # creating a claim is exclusive there too
                    raise
            os.utime(file)
            yield os.fstat(file).st_mtime
        finally:
            os.close(file)

    def _is_free(self, name: str, now: float) -> bool:
        path = self.folder / name
        try:
            found = path.stat()
        except FileNotFoundError:
            return True
        age, holder = now - found.st_mtime, _read(path)
        if not found.st_size:
            return age > min(self.expiry, WRITTEN)
        if age > max(self.expiry, holder.get("expiry", 0)):  # its holder renews it as often as its own expiry asks for
            return True
        return holder.get("host") == self.owner["host"] and not _is_alive(holder.get("pid"))


def _read(path: Path) -> dict[str, Any]:
    """A claim; empty where there is none, or one whose writer was killed as it wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(pid: object) -> bool:
    if type(pid) is not int:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _host() -> str:
    """Where process ids mean the same: a machine, and in it a container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()  # names are often alike
    except OSError:
        space = machine = ""
    return f"{socket.gethostname()} {machine} {space}"

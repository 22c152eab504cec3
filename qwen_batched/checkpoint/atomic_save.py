"""Files into a folder, all or none: staged inside it, synced, then renamed, with a journal that survives a kill.

    folder/.qwen_batched_saving/     only while a save is under way, or after one was killed
        lock                         held by the process that saves; the system releases it when the process dies
        new/                         the staged files
        journal.json                 what is renamed; from when this is there, the save is completed and not dropped
        old/                         what the renames take out of the folder

`replacing` saves; `recover` finishes or drops what a killed process left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STAGING = ".qwen_batched_saving"
LOCK, NEW, OLD, JOURNAL, DRAFT = "lock", "new", "old", "journal.json", "journal.draft"
MAX_NAME = 255  # bytes of a file's name, in any file system
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # by the file system: locks, or syncing a folder
MAX_JOURNAL = 2**20  # bytes; a line for each file has about a hundred

Mark = list[int] | None  # size and time of modification; None where there is no file
Line = tuple[str, Mark, Mark]  # of the journal: a name, and what was there before and shall be there after


@contextmanager
def replacing(folder: str | os.PathLike[str], stale: Callable[[str], bool], last: str) -> Iterator[Path]:
    """Lets the body write files beside a folder's own, then puts them in place, all or none.

    With an exception from the body or from a rename, the folder stays as it was. A process killed at any moment leaves
    the old files or, after `recover`, the new ones. A second save of the same folder waits for the first. The disk has
    to hold the old and the new files together.

    Args:
        folder: Is made where there is none. A link to a folder is followed; links inside are replaced by files.
        stale: Says of a name in the folder whether to remove it when the body has not written it.
        last: The name to put in place last, after the weights (`*.safetensors`) and then all other files.

    Yields:
        The empty folder to write into.

    Raises:
        TypeError, ValueError: `folder` is not a path, is empty, or names a file. Nothing was done.
        OSError: A file could not be written or renamed; it is named.
    """
    target = _target(folder)
    made = [path for path in (target, *target.parents) if not path.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target, wait=True):
            with suppress(ValueError):  # a journal that cannot be followed: this save replaces all that it is about
                _complete(target)
            try:
                yield from _save(target, stale, last)
            except OSError as error:  # to be of the file in the folder and not of its staged twin
                path = str(error.filename or target).replace(str(target / STAGING / NEW), str(target))
                raise OSError(error.errno, error.strerror or str(error), path) from error
        for path in made:
            _sync(path.parent)
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def recover(folder: Path) -> None:
    """Completes a `replacing` that was killed between its renames; removes what one killed before them has left.

    A save that is under way is let be: until its renames, which are waited for, the folder has its old files. Where no
    save was killed this costs one look at the folder. Raises `ValueError` where a save cannot be completed, because the
    folder cannot be written or has been changed since.
    """
    staging = folder / STAGING
    if not os.path.lexists(staging):
        return
    target = _target(folder)
    try:
        with _locked(target, wait=(staging / JOURNAL).exists()) as held:
            if held:
                _complete(target)
                _drop(target / STAGING)
    except OSError as error:
        if (staging / JOURNAL).exists():
            raise ValueError(
                f"saving to {folder} was interrupted between two renames and cannot be completed now ({error}): load "
                "the folder once where it can be written"
            ) from error


def write_file(path: Path, data: bytes) -> None:
    """Writes a file. Raises an `OSError` that names it, as a full disk's own does not."""
    with naming(path):
        path.write_bytes(data)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an `OSError` of the body that names no file this one's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _target(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, links followed."""
    path = os.fspath(folder)
    if not isinstance(path, str):
        raise TypeError(f"a folder must be given as a str or a Path, got {type(path).__name__}")
    if not path:
        raise ValueError("a folder must be named, got ''")
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path} is not a folder")
    return target


def _save(target: Path, stale: Callable[[str], bool], last: str) -> Iterator[Path]:
    """The save itself, under the lock: yields the folder to write into, then renames."""
    staging = target / STAGING
    _drop(staging)
    try:
        (staging / NEW).mkdir()
        (staging / OLD).mkdir()
        yield staging / NEW
        for path in (staging / NEW).iterdir():
            _sync(path)
        _set_modes(target)
        lines = _plan(target, stale, last)
        try:
            _write_journal(target, lines)
            _rename_all(target, lines)
            _forget_journal(target)
        except BaseException:
            if (staging / JOURNAL).exists():
                _undo(target, lines)
                _forget_journal(target)
            raise
    finally:
        if not (staging / JOURNAL).exists():  # after an undo that failed, `recover` needs all of it
            with suppress(OSError):
                _drop(staging)


@contextmanager
def _locked(target: Path, wait: bool) -> Iterator[bool]:
    """Holds the folder's lock, of which nothing stays; yields False where another holds it and `wait` is False."""
    import fcntl  # not on Windows, where the package can be imported all the same

    lock = target / STAGING / LOCK
    while True:
        with suppress(FileExistsError):
            lock.parent.mkdir()
        if lock.parent.is_symlink():  # nothing outside of the folder is ever removed
            raise ValueError(f"{lock.parent} must be a folder, got a link")
        try:
            file = _open_lock(lock)
        except FileNotFoundError:  # its last holder has just removed it
            continue
        except OSError:
            with suppress(OSError):
                lock.parent.rmdir()  # is empty if we have just made it
            raise
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
            if not _is_at(file, lock):
                continue
            try:
                yield True
            finally:
                with suppress(OSError):
                    lock.unlink()
                    lock.parent.rmdir()  # with a journal that could not be followed it stays
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has it open
            return
        finally:
            os.close(file)


def _open_lock(lock: Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not lock.exists():
            raise
        return os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)  # enough to wait for the process that holds it


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: the last holder of a lock removes it."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _plan(target: Path, stale: Callable[[str], bool], last: str) -> list[Line]:
    """What to rename, in order: weights into the folder, stale files out of it, other files into it."""
    new = target / STAGING / NEW
    staged = set(os.listdir(new))
    weights = {name for name in staged if name.endswith(".safetensors")}
    removed = {name for name in os.listdir(target) if name != STAGING and name not in staged and stale(name)}
    others = sorted(staged - weights, key=lambda name: (name == last, name))
    return [(x, _mark(target / x), _mark(new / x)) for x in (*sorted(weights), *sorted(removed), *others)]


def _write_journal(target: Path, lines: list[Line]) -> None:
    """From here on the save is completed after a kill."""
    staging = target / STAGING
    write_file(staging / DRAFT, json.dumps(lines).encode())
    for path in (staging / DRAFT, staging / NEW, staging / OLD):
        _sync(path)
    os.replace(staging / DRAFT, staging / JOURNAL)
    _sync(staging)
    _sync(target)


def _read_journal(staging: Path) -> list[Line] | None:
    """The journal's lines, None where there is none. It may have come with a folder from anywhere: it is checked."""
    journal = staging / JOURNAL
    try:
        facts = journal.lstat()
    except FileNotFoundError:
        return None
    links = any((staging / part).is_symlink() for part in (NEW, OLD))
    if links or not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_JOURNAL:
        raise ValueError(f"{journal} must be a file of at most {MAX_JOURNAL} bytes beside folders, and no link")
    try:
        lines = json.loads(journal.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{journal} is not readable as JSON: {error}") from error
    if not isinstance(lines, list) or not all(_is_line(line) for line in lines):
        raise ValueError(f"{journal} must be a list of [file name, mark, mark]")
    return [(name, before, after) for name, before, after in lines]


def _is_line(line: Any) -> bool:
    if not isinstance(line, list) or len(line) != 3 or not isinstance(line[0], str):
        return False
    try:
        size = len(os.fsencode(line[0]))
    except UnicodeEncodeError:
        return False
    plain = line[0] not in ("", ".", "..", STAGING) and "\0" not in line[0] and os.path.basename(line[0]) == line[0]
    return plain and size <= MAX_NAME


def _complete(target: Path) -> None:
    """Follows the journal of a killed save to its end, if there is one. Raises `ValueError` where it cannot be."""
    lines = _read_journal(target / STAGING)
    if lines is None:
        return
    for name, before, after in lines:
        staged = os.path.lexists(target / STAGING / NEW / name)
        expected = (None, before, after) if staged or after is None else (after,)
        if _mark(target / name) not in expected:
            raise ValueError(
                f"saving to {target} was interrupted between two renames, and {name} has been changed since: save "
                f"again, or remove {STAGING} if the files are right as they are"
            )
    _rename_all(target, lines)
    _forget_journal(target)


def _rename_all(target: Path, lines: list[Line]) -> None:
    """Puts the staged files in place and takes the stale ones out. May be called again after an interruption."""
    new, old = target / STAGING / NEW, target / STAGING / OLD
    for name, _, after in lines:
        staged = os.path.lexists(new / name)
        if after is not None and not staged:
            continue  # in place already
        unkept = os.path.lexists(target / name) and not os.path.lexists(old / name)
        if unkept and (after is None or not _link(target / name, old / name)):
            os.rename(target / name, old / name)
        if staged:
            os.replace(new / name, target / name)


def _undo(target: Path, lines: list[Line]) -> None:
    """Takes the renames back, wherever they stopped. It only renames, so that a kill here is completed forwards."""
    new, old = target / STAGING / NEW, target / STAGING / OLD
    for name, _, after in reversed(lines):
        if after is not None and not os.path.lexists(new / name):
            os.rename(target / name, new / name)
        if os.path.lexists(old / name) and not os.path.lexists(target / name):
            os.rename(old / name, target / name)


def _forget_journal(target: Path) -> None:
    """From here on there is nothing to complete."""
    _sync(target)
    (target / STAGING / JOURNAL).unlink()
    with suppress(OSError):  # a journal that comes back after a loss of power finds its work done
        _sync(target / STAGING)


def _drop(staging: Path) -> None:
    """Removes everything in the staging folder but its lock."""
    for path in (staging / name for name in (JOURNAL, DRAFT, NEW, OLD)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _link(source: Path, path: Path) -> bool:
    """Makes a second name of a file or of a link, so that a rename over the first leaves no moment without a file."""
    try:
        os.link(source, path, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a folder, or a file system without hard links
        return False
    return True


def _mark(path: Path) -> Mark:
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _set_modes(target: Path) -> None:
    """Each staged file gets the mode of the file that it replaces, a new one that of any new file here."""
    new = target / STAGING / NEW
    usual = new.stat().st_mode & 0o666  # safetensors gives its files to their owner only
    for path in new.iterdir():
        before = target / path.name
        mode = before.stat().st_mode & 0o777 if before.is_file() else usual
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _sync(path: Path) -> None:
    """Waits until the disk has a file or the names in a folder."""
    with naming(path):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as error:
            if not (path.is_dir() and error.errno in (errno.EINVAL, *UNSUPPORTED)):  # not every file system can
                raise
        finally:
            os.close(file)

"""Reads the small files of a folder: regular files only, of bounded size, as bytes, text or JSON.

A path may be anything: a pipe that never ends, a device, a folder. Its kind is looked up before it is opened.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from qwen_batched.arguments import cut

# The largest tokenizer.json in use has 33 MB. Parsed, JSON takes up to 25 times its size in memory.
MAX_BYTES = 48 * 2**20
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
KINDS |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")


def is_file(path: Path) -> bool:
    """Whether there is a file; links are followed. Raises `ValueError` where there is something else."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a loop of links, a folder that may not be entered, a name too long
        raise ValueError(f"{path} must be a file, but cannot be looked at: {cut(error)}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a file, got {KINDS.get(stat.S_IFMT(mode), 'something else')}")
    return True


def read_bytes(path: Path) -> bytes | None:
    """What is in the file, None where there is none. Raises `ValueError` where it is not readable or too large."""
    if not is_file(path):
        return None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ValueError(f"{path} must have at most {MAX_BYTES} bytes, got {size}")
            return file.read(size)
    except OSError as error:
        raise ValueError(f"{path} is not readable: {cut(error)}") from error


def read_text(path: Path) -> str | None:
    """The same as text. Raises `ValueError` where it is not UTF-8."""
    content = read_bytes(path)
    try:
        return None if content is None else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {cut(error)}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file, None where there is none. Raises `ValueError` where it is not readable."""
    text = read_text(path)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {cut(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content

"""manifest.json of an exported folder -> its content, checked before anything is loaded. PyTorch is not imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 2  # raised with each key that readers, the C++ program's of runner.txt among them, come to need

Kinds = Mapping[str, type | tuple[type, ...]]  # JSON types by key, "frames.dtype" that of "dtype" in "frames"


def read_manifest(folder: Path, target: str, needed: Kinds) -> dict[str, Any]:
    """The manifest of an export to `target`. Raises `ValueError` for another, of another format or without a key."""
    path = folder / "manifest.json"
    expected = f"{folder} must be a folder that was exported with --target {target}"
    if not path.is_file():
        raise ValueError(f"{expected}, and holds no manifest.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}: export it again") from None
    found = content.get("target") if isinstance(content, dict) else None
    if found != target:
        raise ValueError(f"{expected}, got {found!r} in manifest.json")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT}, got {content.get('format')!r}: export it again")
    check_keys(path, content, needed)
    return content


def check_keys(path: Path, content: Mapping[str, Any], needed: Kinds) -> None:
    """Raises `ValueError` where a key is missing, or is of another kind."""
    for key, kind in needed.items():
        found: Any = content
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, kind):
            names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{path} must have {key} as {names}, got {type(found).__name__}: export it again")

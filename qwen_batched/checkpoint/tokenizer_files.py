"""A tokenizer's files with tokens that were added after loading; whatever else they say stays as it is.

Not what transformers would write: what one release writes, another may not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

STATE_FILE, CONFIG_FILE, LEGACY_FILE = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"


def with_added_tokens(
    files: Mapping[str, bytes], entries: Sequence[Mapping[str, Any]], state: Callable[[], str]
) -> dict[str, bytes]:
    """`files` by name, with those of `entries`, as tokenizer.json has them, that are not there yet.

    `state` makes a tokenizer.json where there is none.
    """
    files = dict(files)
    if STATE_FILE not in files:
        files[STATE_FILE] = state().encode()
    content = json.loads(files[STATE_FILE])
    known = {entry["content"] for entry in content["added_tokens"]}
    new = [entry for entry in entries if entry["content"] not in known]
    if not new:
        return files
    content["added_tokens"] = sorted([*content["added_tokens"], *new], key=lambda entry: entry["id"])
    files[STATE_FILE] = _written(content)
    if CONFIG_FILE in files:
        config = json.loads(files[CONFIG_FILE])
        if isinstance(decoder := config.get("added_tokens_decoder"), dict):
            for entry in new:
                decoder[str(entry["id"])] = {name: value for name, value in entry.items() if name != "id"}
            files[CONFIG_FILE] = _written(config)
    if LEGACY_FILE in files:
        legacy = json.loads(files[LEGACY_FILE])
        files[LEGACY_FILE] = _written({**legacy, **{entry["content"]: entry["id"] for entry in new}})
    return files


def _written(content: object) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()

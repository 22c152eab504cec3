"""A checkpoint's added tokens: which only a layout may use, and which are read in every text."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from qwen_batched.arguments import shown
from qwen_batched.inputs.checks import check_unicode

# What `lstrip` and `rstrip` of a token take: Unicode's White_Space, which is not what str.strip() takes.
_SPACE = "[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+"
_LEADING, _TRAILING = re.compile(rf"\A{_SPACE}"), re.compile(rf"{_SPACE}\Z")
# NFC makes at most 9 bytes into 3 (three Korean letters into a syllable), never more, and of one byte 3 at most.
_NFC_SHRINKS = _NFC_GROWS = 3


class Vocabulary:
    """Cuts a layout at its control tokens and turns the rest into ids."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str], added_tokens: Sequence[str] | None = None
    ) -> None:
        """Raises `TypeError` or `ValueError` as of `select_added_tokens`, or for a tokenizer that this cannot read."""
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise ValueError(f"the checkpoint needs a tokenizer.json (a fast tokenizer), got {kind}")
        added = tokenizer.get_added_vocab()
        readable = select_added_tokens(added, control, added_tokens)
        # The control tokens that the checkpoint has, and those that were turned off.
        self.control_ids = {token: index for token, index in added.items() if token not in readable}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.entries: list[dict[str, Any]] = state["added_tokens"]  # of tokenizer.json
        # How many embeddings the ids need.
        self.size = max(len(tokenizer), *(index + 1 for index in added.values()), 0)
        flags = {entry["content"]: entry for entry in state["added_tokens"]}
        for token in self.control_ids:
            if flags[token]["single_word"]:
                raise ValueError(f"the tokenizer's control token {token!r} is a single_word, which is not implemented")
        self.first_characters = frozenset(token[0] for token in self.control_ids)  # with which control tokens begin
        self._strips_before = {index for token, index in added.items() if flags[token]["lstrip"]}
        self._strips_behind = {index for token, index in added.items() if flags[token]["rstrip"]}
        self.added = added
        # The longest token that begins at a place counts, as in the tokenizer.
        self._added_pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        self._forbidden = frozenset(self.control_ids.values())
        # To this one every string is text but the readable tokens. transformers sets truncation and padding anew at
        # each call; a file may hold those of some earlier one.
        kept = [entry for entry in state["added_tokens"] if entry["content"] in set(readable)]
        changed = {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = Tokenizer.from_str(json.dumps({**state, **changed}))
        # The tokenizers library numbers added tokens anew where there are fewer of them.
        renamed = {self._tokenizer.token_to_id(token): added[token] for token in readable}
        self._renamed = {ours: theirs for ours, theirs in renamed.items() if ours != theirs}
        self._max_token_bytes = _max_token_bytes(state, [flags[token] for token in readable])

    @property
    def strips(self) -> bool:
        """Whether an added token takes white space beside it."""
        return bool(self._strips_before or self._strips_behind)

    @property
    def renumbered(self) -> Mapping[int, int]:
        """By ids of added tokens in what `save` writes: their ids."""
        return self._renamed

    def save(self, path: Path) -> None:
        """Writes the tokenizer of stretches between control tokens, to which these are text, as tokenizer.json."""
        self._tokenizer.save(str(path))

    def cut(self, layout: str) -> list[int | str]:
        """A layout as ids of control tokens and the strings between them."""
        pieces: list[int | str] = []
        end = 0
        for match in self._added_pattern.finditer(layout):
            if match.group() in self.control_ids:
                pieces += [layout[end : match.start()], self.control_ids[match.group()]]
                end = match.end()
        return [piece for piece in [*pieces, layout[end:]] if piece != ""]

    def first_token(self, text: str) -> int | None:
        """The added token that begins a text; None where none does."""
        found = self._added_pattern.match(text)
        return None if found is None else self.added[found.group()]

    def strip(self, pieces: Sequence[int | str]) -> list[int | str]:
        """The pieces without the white space that control tokens take with them."""
        stripped = list(pieces)
        if self._strips_before or self._strips_behind:
            for place, piece in enumerate(pieces):
                if isinstance(piece, str):
                    if place > 0 and pieces[place - 1] in self._strips_behind:
                        piece = _LEADING.sub("", piece)
                    if place + 1 < len(pieces) and pieces[place + 1] in self._strips_before:
                        piece = _TRAILING.sub("", piece)
                    stripped[place] = piece
        return stripped

    def encode(self, text: str) -> list[int]:
        """Ids of a stretch without control tokens. Raises `ValueError` where the tokenizer makes one of it."""
        return self._ids(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same, and where in the text each token ends."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return self._ids(encoding), [end for _, end in encoding.offsets]

    def _ids(self, encoding: Encoding) -> list[int]:
        ids = encoding.ids
        if self._renamed:
            ids = [self._renamed.get(index, index) for index in ids]
        if not self._forbidden.isdisjoint(ids):
            reason = "its vocabulary holds one twice"
            raise ValueError(f"the checkpoint's tokenizer makes a control token of a text: {reason}")
        return ids

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, found without tokenising it."""
        if self._max_token_bytes is None:
            return 0
        if text.isascii():
            return -(-len(text) // self._max_token_bytes)
        size = len(text.encode("utf-8"))
        shrinks = 1 if unicodedata.is_normalized("NFC", text) else _NFC_SHRINKS
        return -(-size // (self._max_token_bytes * shrinks))

    def most_tokens(self, text: str) -> int | None:
        """A number of tokens that a text has at most; None where none is known, or `encode` may refuse the text."""
        if self._max_token_bytes is None or self._makes_control_tokens:
            return None
        grows = 1 if text.isascii() or unicodedata.is_normalized("NFC", text) else _NFC_GROWS
        return len(text.encode("utf-8")) * grows

    @functools.cached_property
    def largest_id(self) -> int:
        """Of those that texts are made into, and of control tokens."""
        ids = (self._renamed.get(index, index) for index in self._tokenizer.get_vocab().values())
        return max(max(ids, default=0), *self._forbidden, 0)

    @functools.cached_property
    def _makes_control_tokens(self) -> bool:
        """Whether the vocabulary holds a control token's id twice, so that a text may become it."""
        ids = {self._renamed.get(index, index) for index in self._tokenizer.get_vocab().values()}
        return not self._forbidden.isdisjoint(ids)


def check_new_tokens(tokens: object) -> dict[str, str | AddedToken]:
    """Tokens to add, by content. Raises `TypeError` or `ValueError` where they are no strings or `AddedToken`s."""
    given = [tokens] if isinstance(tokens, (str, AddedToken)) else tokens
    if not isinstance(given, (list, tuple)) or not all(isinstance(token, (str, AddedToken)) for token in given):
        raise TypeError(f"new_tokens must be a list of str or tokenizers.AddedToken, got {shown(tokens)}")
    found = {token if isinstance(token, str) else token.content: token for token in given}
    for content in found:
        if not content:
            raise ValueError("new_tokens must hold strings that are not empty, got ''")
        check_unicode("new_tokens", content)
    return found


def select_added_tokens(added: Mapping[str, int], control: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The added tokens that are read in texts, by id: those that are no control tokens, or those that are wanted.

    `wanted` are tokens, or patterns as of `fnmatch` ("<action_*>"); None for all, () for none. Raises `TypeError` where
    they are not a list or tuple of strings, `ValueError` where one names a control token or nothing.
    """
    own = sorted(added.keys() - set(control), key=added.__getitem__)
    if wanted is None:
        return own
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(pattern, str) for pattern in wanted):
        raise TypeError(f"added_tokens must be None or a list of tokens or patterns, got {wanted!r:.200}")
    chosen: set[str] = set()
    for pattern in wanted:
        found = [token for token in own if token == pattern] or [token for token in own if fnmatchcase(token, pattern)]
        if not found:
            what = "names a control token of the model" if pattern in control else "matches no added token"
            raise ValueError(
                f"added_tokens must match tokens that were added to the tokenizer ({', '.join(own[:8]) or 'none'}"
                f"{', ...' if len(own) > 8 else ''}), got {pattern!r:.200}, which {what}"
            )
        chosen.update(found)
    return [token for token in own if token in chosen]


def _max_token_bytes(state: dict[str, Any], readable: Sequence[dict[str, Any]]) -> int | None:
    """How many bytes of normalised text a token stands for at most; None where no number is known.

    Known of byte-level BPE, where nothing is dropped: every byte has a token, and splitting and normalising lose none.
    """
    normalizer, model = state["normalizer"], state["model"]
    steps = state["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    keeps_all = all(
        step.get("type") == "ByteLevel" or (step.get("type") == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    vocabulary = model.get("vocab")
    if (
        model["type"] != "BPE"
        or not keeps_all
        or not any(step.get("type") == "ByteLevel" for step in steps)
        or (normalizer is not None and normalizer["type"] != "NFC")
        or sum(len(token) == 1 for token in vocabulary) < 256
        or any(entry["lstrip"] or entry["rstrip"] for entry in readable)
    ):
        return None
    return max(max(map(len, vocabulary)), *(len(entry["content"].encode("utf-8")) for entry in readable), 1)

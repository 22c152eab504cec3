"""Text and a layout -> token ids, with one image token per camera.

The layout's control tokens are tokens; whatever the user's text contains stays text, but for tokens that a fine-tuner
added to the vocabulary. So the layout is cut at its control tokens, and the stretches between, with the text put in,
are tokenised whole by a tokenizer that knows no control tokens: the pieces merge at their seams as in transformers' own
rendering of the template. A chat template that looks at its text is rendered anew with each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_batched.arguments import cut
from qwen_batched.families import PromptStyle
from qwen_batched.inputs.chat_template import ANSWER_MARK, SYSTEM_MARK, TEXT_MARK, ChatTemplate
from qwen_batched.inputs.vocabulary import Vocabulary
from qwen_batched.runtime.lru_cache import LRUCache

MAX_LAYOUTS, MAX_LAYOUT_BYTES = 256, 16 << 20
MAX_RECENT, MAX_RECENT_BYTES = 8, 1 << 20  # stretches of one text, for the next number of cameras
_FIELDS = ("{text}", "{images}", "{image}")
_BOTH = (TEXT_MARK, SYSTEM_MARK)
_MARKS = re.compile("(" + "|".join(_BOTH) + ")")
_STAND_INS = range(0x2A00, 0x2B00)  # mathematical symbols, as "<" is one: to every test of a character the same

Cameras = int | tuple[bool, ...]  # how many there are, or which where the layout has a slot for each


@dataclass(frozen=True)
class Layout:
    """A template for some cameras."""

    # Ids of control tokens, and strings, each as its parts, of which some are marks.
    pieces: tuple[int | tuple[str, ...], ...]
    looked: bool  # whether these pieces hold for the marks only, since the chat template looks at what it lays out
    known: Mapping[str, list[int]] = field(default_factory=dict)  # the ids of strings that are the same for every text

    @property
    def control_tokens(self) -> list[int]:
        """In their order."""
        return [piece for piece in self.pieces if isinstance(piece, int)]


class PromptEncoder:
    """Tokenises prompts for one checkpoint. `chat_template` and `pad_token_id` may be assigned."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None,
        image_token_id: int,
        style: PromptStyle,
        *,
        added_tokens: Sequence[str] | None = None,
    ) -> None:
        """Takes the checkpoint's tokenizer, and its processor's chat template where that has its own.

        Of several by name "default" is taken; None is for the tokenizer's. For `added_tokens` see
        `select_added_tokens`. Raises `TypeError` or `ValueError` where an argument is not as described, the tokenizer's
        image token is not the model's, or the chat template takes more work than any has to.
        """
        self._vocabulary = Vocabulary(tokenizer, style.control_tokens, added_tokens)
        self._control_tokens, self._wanted = style.control_tokens, added_tokens
        self._tokenizer, self._image_token_id = tokenizer, image_token_id
        control_ids = self._vocabulary.control_ids
        if (theirs := control_ids.get(style.image_token)) != image_token_id:
            token = f"the tokenizer's {style.image_token} is {theirs}"
            raise ValueError(f"config.json's image_token_id is {image_token_id}, but {token}")
        self._image = style.image
        self._fields = re.compile("(" + "|".join(map(re.escape, (*_FIELDS, style.image))) + ")")
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, control_ids.get(style.default_pad), 0)
        # Fills `input_ids` on padding; hidden by the mask.
        self.pad_token_id = next(index for index in pads if index is not None)
        self._layouts, self._recent = _no_layouts(), _no_ids()
        self._without_default: list[str] | None = None
        self.chat_template = self._default(chat_template or tokenizer.chat_template)
        if self.chat is not None:
            self.chat.check()

    @property
    def vocabulary(self) -> Vocabulary:
        """What turns strings into ids; another one after `take`."""
        return self._vocabulary

    def extended(self, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """The vocabulary with what `tokenizer` has more than there was: tokens that are read in every text.

        Raises `ValueError` where it cannot be read. Nothing is changed.
        """
        new = [token for token in tokenizer.get_added_vocab() if token not in self._vocabulary.added]
        if not new:
            return self._vocabulary
        wanted = self._wanted
        if wanted is not None:
            wanted = [*wanted, *(token for token in new if token not in self._control_tokens)]
        return Vocabulary(tokenizer, self._control_tokens, wanted)

    def take(self, vocabulary: Vocabulary) -> None:
        """Encodes by an `extended` vocabulary from now on."""
        if vocabulary is not self._vocabulary:
            self._vocabulary, self._layouts, self._recent = vocabulary, _no_layouts(), _no_ids()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's."""
        return self._tokenizer

    @property
    def image_token_id(self) -> int:
        """The token that stands for an image."""
        return self._image_token_id

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, in Jinja's language; None where there is none."""
        return None if self.chat is None else self.chat.source

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        # Caches of prompts have it in their keys.
        self.chat = None if source is None else ChatTemplate(source, self._tokenizer.special_tokens_map)

    def encode(self, text: str, template: str, cameras: Cameras, system: str | None = None) -> list[int]:
        """Token ids of one prompt with an image token for each camera, not yet repeated for each image cell."""
        layout = self._layout(template, cameras, system is not None)
        return self._ids(self._vocabulary.strip(self._filled(layout, text, cameras, system)), layout)

    def encode_with_answer(
        self, text: str, answer: str, template: str, cameras: Cameras, system: str | None = None
    ) -> tuple[list[int], int]:
        """Token ids of a prompt, its answer and the end token, and how many of them, at the end, are the answer's.

        The prompt's tokens are those of `encode`, with which new text will begin. Only "chat" follows transformers,
        which tokenises a conversation whole: an answer's leading line breaks merge with the last of the generation
        prompt into one token, which counts as the answer's. Raises `ValueError` where the chat template changes the
        answer.
        """
        layout = self._layout(template, cameras, system is not None)
        pieces, end = self._filled(layout, text, cameras, system), self.end_token(template)
        if template != "chat":
            ids = self._vocabulary.encode(answer)
            return [*self._ids(self._vocabulary.strip(pieces), layout), *ids, end], len(ids) + 1
        if self._ending().looked:
            self._check_answer(text, answer, cameras, system)
        before = pieces.pop() if pieces and isinstance(pieces[-1], str) else ""
        *pieces, last, _ = self._vocabulary.strip([*pieces, before + answer, end])
        dropped = (before + answer).find(last)  # white space that the control token ahead takes
        ids, ends = self._vocabulary.encode_with_ends(last)
        of_answer = sum(stop > len(before) - dropped for stop in ends)
        return [*self._ids(pieces, layout), *ids, end], of_answer + 1

    def pieces(self, template: str, cameras: int) -> list[int | str]:
        """A layout for who tokenises elsewhere: ids of control tokens, and strings between them, one with "{text}".

        Raises `ValueError` where no such list says what prompts are.
        """
        layout = self._layout(template, cameras, False)
        if layout.looked:
            raise ValueError("the chat template must print the text as it is, and this one looks at it")
        mark = {TEXT_MARK: "{text}"}
        pieces = [x if isinstance(x, int) else "".join(mark.get(part, part) for part in x) for x in layout.pieces]
        if sum(isinstance(piece, str) and piece.count("{text}") for piece in pieces) != 1:
            raise ValueError("the template must hold {text} nowhere but in the place of the text")
        if self._vocabulary.strips:
            raise ValueError("the checkpoint's added tokens must take no white space")
        return pieces

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, found without tokenising it."""
        return self._vocabulary.least_tokens(text)

    def most_tokens(self, text: str, template: str, cameras: int, system: str | None = None) -> int | None:
        """A number of tokens that a prompt has at most, found without tokenising it.

        None where none is known, where the prompt may have no token, or where `encode` may refuse it. Raises
        `ValueError` where the template cannot be laid out.
        """
        if template == "chat" and self.chat is not None and self.chat.timed:
            return None
        layout = self._layout(template, cameras, system is not None)
        if layout.looked or not layout.control_tokens:
            return None
        most = [
            1 if isinstance(piece, int) else self._vocabulary.most_tokens(piece)
            for piece in self._filled(layout, text, cameras, system)
        ]
        return None if None in most else sum(most)

    def written_ids(self) -> list[int]:
        """The ids that are written without a text that holds them: of images, of padding, after answers."""
        ids = (self.image_token_id, self.pad_token_id, self.tokenizer.eos_token_id)
        return [token for token in ids if token is not None]

    def end_token(self, template: str) -> int:
        """What ends an answer: the end of the chat template's assistant turn, in other layouts the tokenizer's own.

        Raises `ValueError` where there is none, or the assistant's turn is not what the generation prompt begins.
        """
        if template == "chat":
            return self._ending().control_tokens[0]
        if self._tokenizer.eos_token_id is None:
            raise ValueError("targets need an end token, and the checkpoint's tokenizer has none")
        return self._tokenizer.eos_token_id

    def check_template(self, template: str, cameras: int) -> None:
        """Raises `TypeError` or `ValueError` where `template` is no layout for so many cameras."""
        if not isinstance(template, str):
            raise TypeError(f"template must be 'chat', 'plain' or a string, got {type(template).__name__}")
        if template == "chat":
            if self._without_default is not None:
                named = f"named 'default', and the checkpoint's are named {', '.join(self._without_default)}"
                raise ValueError(f"template='chat' needs a chat template {named}")
            if self.chat is None:
                raise ValueError("template='chat' needs a chat template, and the checkpoint has none")
        elif template != "plain":
            slots = self._slots(template)
            if slots is not None and slots != cameras:
                raise ValueError(
                    f"template must hold {{images}} once, or one {{image}} for each of the {cameras} cameras, got "
                    f"{template!r:.200} ({slots} times {{image}})"
                )

    def has_slots(self, template: str) -> bool:
        """Whether the layout says where each camera's image goes, and not only where all of them go."""
        return template not in ("chat", "plain") and self._slots(template) is not None

    def stamp(self, template: str) -> str | None:
        """What prompts depend on beside their arguments: the time, where the chat template prints it."""
        if template != "chat" or not self.chat.timed:
            return None
        return self.chat.render(0, TEXT_MARK).text

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _default(self, named: object) -> str | None:
        """One chat template, of several the one that is named "default", as in transformers."""
        if isinstance(named, (list, tuple)) and all(isinstance(entry, Mapping) for entry in named):
            named = {entry.get("name"): entry.get("template") for entry in named}
        if isinstance(named, Mapping):
            if "default" not in named:
                self._without_default = sorted(map(str, named))
                return None
            named = named["default"]
        if not isinstance(named, str | None):
            raise ValueError(f"the chat template must be a string, got {type(named).__name__}")
        return named

    def _filled(self, layout: Layout, text: str, cameras: Cameras, system: str | None) -> list[int | str]:
        """The layout with the texts in their places: ids of control tokens, and strings."""
        if layout.looked:
            return self._rendered_anew(text, cameras, system, layout)
        values = {TEXT_MARK: text, SYSTEM_MARK: system}
        pieces = layout.pieces
        return [x if isinstance(x, int) else "".join(values.get(part, part) for part in x) for x in pieces]

    def _rendered_anew(self, text: str, cameras: int, system: str | None, layout: Layout) -> list[int | str]:
        """The same of a chat template that looks at the texts, which it is therefore given.

        What begins a control token in a text is given to it as another character, and must not have mattered. Nor may a
        text change which control tokens there are, unless it is blank, when it cannot hold any.
        """
        rendered = self.chat.render(cameras, text, system).text
        texts = text + (system or "")
        unused = (chr(code) for code in _STAND_INS if chr(code) not in texts + rendered)
        table = {first: next(unused) for first in self._vocabulary.first_characters if first in texts}
        back = {ord(stand_in): first for first, stand_in in table.items()}
        if table:
            stands_in = str.maketrans(table)
            given = (text.translate(stands_in), system and system.translate(stands_in))
            changed = self.chat.render(cameras, *given).text
            if changed.translate(back) != rendered:
                raise ValueError(
                    f"the chat template must treat {', '.join(map(repr, table))} as any symbol, or control tokens "
                    f"in a text cannot be told from its own, got another rendering for {text!r:.200}"
                )
            rendered = changed
        pieces = self._vocabulary.cut(rendered)
        values = [value if value is None or value.strip() else "" for value in (text, system)]
        if "" in values:
            marks = (mark if value else given for mark, value, given in zip(_BOTH, values, (text, system), strict=True))
            layout = Layout(self._pieces(self.chat.render(cameras, *marks).text), looked=True)
        if [piece for piece in pieces if isinstance(piece, int)] != layout.control_tokens:
            expected = "the same control tokens for every text"
            raise ValueError(f"the chat template must have {expected}, got others for {text!r:.200}")
        return [piece if isinstance(piece, int) else piece.translate(back) for piece in pieces]

    def _ids(self, pieces: Sequence[int | str], layout: Layout) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids.extend(layout.known[piece] if piece in layout.known else self._encoded(piece))
        return ids

    def _encoded(self, piece: str) -> list[int]:
        """Ids of a stretch; one text is laid out for each number of cameras, and tokenised once."""
        vocabulary = self._vocabulary  # of which another call may `take` another
        return self._recent.get((vocabulary, piece), lambda: vocabulary.encode(piece))

    def _slots(self, template: str) -> int | None:
        """How many places for one image a layout has; None where it has one for all."""
        return self._layouts.get(("slots", template), lambda: self._count_slots(template))

    def _count_slots(self, template: str) -> int | None:
        fields = self._fields.findall(template)
        slots = fields.count("{image}") + fields.count(self._image)
        for name, few in (("{text}", 1), ("{images}", 0)):
            if not few <= fields.count(name) <= 1:
                got = f"{template!r:.200} ({fields.count(name)} times)"
                raise ValueError(f"template must be 'chat', 'plain' or hold {name} once, got {got}")
        if "{images}" in fields and slots:
            either = "either {images} or {image} for each"
            raise ValueError(f"template must hold {either}, got both in {template!r:.200}")
        return None if "{images}" in fields else slots

    def _layout(self, template: str, cameras: Cameras, has_system: bool) -> Layout:
        """The layout cut at its control tokens."""
        chat = self.chat if template == "chat" else None

        def make() -> Layout:
            looked = False
            if template == "chat":
                self.check_template(template, cameras)
                rendering = chat.render(cameras, TEXT_MARK, SYSTEM_MARK if has_system else None)
                text, looked = rendering.text, rendering.looked
            else:
                text = self._laid_out(template, cameras)
            pieces = self._pieces(text)
            literals = {piece[0] for piece in pieces if isinstance(piece, tuple) and len(piece) == 1} - {*_BOTH}
            layout = Layout(pieces, looked, {literal: self._vocabulary.encode(literal) for literal in literals})
            images = layout.control_tokens.count(self._image_token_id)
            present = cameras if isinstance(cameras, int) else sum(cameras)
            texts, systems = (text.count(mark) for mark in _BOTH)
            if images != present or not (looked or (texts, systems) == (1, int(has_system))):
                raise ValueError(
                    f"template {template!r:.200} must lay out {present} images, 1 text and {int(has_system)} system "
                    f"texts, got {images} images, {texts} texts and {systems} system texts"
                )
            return layout

        if chat is not None and chat.timed:
            return make()
        return self._layouts.get((chat, template, cameras, has_system), make)

    def _laid_out(self, template: str, cameras: Cameras) -> str:
        """A layout that is no chat template, with marks."""
        present = (True,) * cameras if isinstance(cameras, int) else cameras
        if template == "plain":
            return " ".join([TEXT_MARK] + [self._image] * sum(present))
        self.check_template(template, len(present))
        slots = iter(present)
        fields = {"{text}": lambda: TEXT_MARK, "{images}": lambda: self._image * sum(present)}
        fields |= dict.fromkeys(("{image}", self._image), lambda: self._image if next(slots) else "")
        return "".join(fields[part]() if part in fields else part for part in self._fields.split(template))

    def _pieces(self, text: str) -> tuple[int | tuple[str, ...], ...]:
        pieces = self._vocabulary.cut(text)
        return tuple(x if isinstance(x, int) else tuple(filter(None, _MARKS.split(x))) for x in pieces)

    def _ending(self) -> Layout:
        """The end token of the chat template's assistant turn, and whether the template looks at texts."""
        if self.chat is None:
            self.check_template("chat", 0)
        return self._layouts.get((self.chat, "ending"), self._make_ending)

    def _make_ending(self) -> Layout:
        prompt, conversation = self.chat.render(0, TEXT_MARK), self.chat.render(0, TEXT_MARK, answer=ANSWER_MARK)
        _, _, rest = conversation.text.partition(prompt.text + ANSWER_MARK)
        end = self._vocabulary.first_token(rest)
        if end is None:
            raise ValueError(
                "targets need a chat template whose assistant turn is the generation prompt, the answer and a special "
                f"token, got {conversation.text!r:.500} after {prompt.text!r:.500}"
            )
        return Layout((end,), conversation.looked)

    def _check_answer(self, text: str, answer: str, cameras: int, system: str | None) -> None:
        """Of a chat template that looks at texts: an answer must follow its prompt as it is."""
        prompt = self.chat.render(cameras, text, system).text
        conversation = self.chat.render(cameras, text, system, answer).text
        _, _, rest = conversation.partition(prompt + answer)
        follows = conversation.startswith(prompt + answer)
        if not follows or self._vocabulary.first_token(rest) != self.end_token("chat"):
            raise ValueError(
                f"targets need a chat template that puts the answer behind its generation prompt as it is, got "
                f"{conversation!r:.500} for the answer {answer!r:.200}"
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint folder's. Raises `ValueError` where it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on broken files
        files = "tokenizer.json, tokenizer_config.json"
        raise ValueError(f"checkpoint folder {folder} has no readable tokenizer ({files}): {cut(error)}") from error


def _no_layouts() -> LRUCache:
    return LRUCache(MAX_LAYOUTS, MAX_LAYOUT_BYTES, _layout_bytes)


def _no_ids() -> LRUCache:
    return LRUCache(MAX_RECENT, MAX_RECENT_BYTES, _ids_bytes)


def _ids_bytes(key: tuple[Vocabulary, str], ids: list[int]) -> int:
    return sys.getsizeof(key[1]) + sys.getsizeof(ids)


def _layout_bytes(key: Hashable, value: object) -> int:
    parts = [part for part in key if isinstance(part, str)]
    if isinstance(value, Layout):
        parts += [part for piece in value.pieces if isinstance(piece, tuple) for part in piece]
        parts += value.known.values()
    return sum(map(sys.getsizeof, parts))

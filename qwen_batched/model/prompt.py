"""Text and a layout -> token ids, with one image token per camera.

The layout's special tokens are control tokens; whatever the user's text contains stays text. So the layout is cut at
its special tokens, and the stretches between, with the text put in, are tokenised whole by a tokenizer that knows no
special tokens: the pieces merge at their seams as in transformers' own rendering of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_batched.arguments import cut
from qwen_batched.cache import LRUCache

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# Stand for the user's text and the answer while a layout is rendered and cut; from Unicode's private use area.
TEXT_MARK, ANSWER_MARK = "\ue000text\ue001", "\ue000answer\ue001"
MAX_LAYOUTS = 256


class PromptEncoder:
    """Tokenises prompts for one checkpoint."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, image_token_id: int) -> None:
        """Takes the checkpoint's tokenizer, and its processor's chat template where that has its own.

        Raises:
            ValueError: The tokenizer is not a fast one, or its image token is not the model's.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"the checkpoint needs a tokenizer.json (a fast tokenizer), got {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.chat_template = chat_template or tokenizer.chat_template
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._special_ids = tokenizer.get_added_vocab()
        if self._special_ids.get("<|image_pad|>") != image_token_id:
            raise ValueError(
                f"config.json's image_token_id is {image_token_id}, but the tokenizer's <|image_pad|> is "
                f"{self._special_ids.get('<|image_pad|>')}"
            )
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._text_tokenizer = _without_special_tokens(tokenizer)
        self._layouts = LRUCache(MAX_LAYOUTS)

    def encode(self, text: str, template: str, cameras: int) -> list[int]:
        """Token ids of one prompt with `cameras` image tokens, not yet repeated for each image cell."""
        return self._ids(self._filled(text, template, cameras))

    def encode_with_answer(self, text: str, answer: str, template: str, cameras: int) -> tuple[list[int], int]:
        """Token ids of a prompt, its answer and the end token, and how many of them, at the end, are the answer's.

        The prompt's tokens are those of `encode`, with which new text will begin. "chat" alone follows transformers,
        which tokenises a conversation whole: an answer's leading line breaks merge with the last of the generation
        prompt into one token, which counts as the answer's.
        """
        pieces = self._filled(text, template, cameras)
        before = pieces.pop() if template == "chat" and isinstance(pieces[-1], str) else ""
        last = self._encode_text(before + answer)
        of_answer = sum(end > len(before) for _, end in last.offsets)
        return [*self._ids(pieces), *last.ids, self.end_token(template)], of_answer + 1

    def written_ids(self) -> list[int]:
        """The ids that are written without a text that holds them: of images, of padding, after answers."""
        ids = (self.image_token_id, self.pad_token_id, self.tokenizer.eos_token_id)
        return [token for token in ids if token is not None]

    def end_token(self, template: str) -> int:
        """What ends an answer: the end of the chat template's assistant turn, in other layouts the tokenizer's own.

        Raises:
            ValueError: There is none, or the assistant's turn is not what the generation prompt begins.
        """
        return self._layouts.get(("end token", template), lambda: self._end_token(template))

    def check_template(self, template: str) -> None:
        """Raises `TypeError` or `ValueError` where `template` is no layout."""
        if not isinstance(template, str):
            raise TypeError(f"template must be 'chat', 'plain' or a string, got {type(template).__name__}")
        if template == "chat" and self.chat_template is None:
            raise ValueError("template='chat' needs a chat template, and the checkpoint has none")
        if template in ("chat", "plain"):
            return
        for field in ("{images}", "{text}"):
            if template.count(field) != 1:
                raise ValueError(
                    f"template must be 'chat', 'plain' or hold {field} once, got {template!r} "
                    f"({template.count(field)} times)"
                )

    def decode(self, ids: list[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def stream(self, batch: int) -> TextStream:
        """Decodes the tokens of `batch` samples as they come."""
        return TextStream(self, batch)

    def _filled(self, text: str, template: str, cameras: int) -> list[int | str]:
        """The layout with the text in its place: ids of special tokens, and strings."""
        layout = self._layouts.get((template, cameras), lambda: self._layout(template, cameras))
        return [piece if isinstance(piece, int) else piece.replace(TEXT_MARK, text) for piece in layout]

    def _ids(self, pieces: Sequence[int | str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids.extend([piece] if isinstance(piece, int) else self._encode_text(piece).ids)
        return ids

    def _encode_text(self, text: str) -> Encoding:
        return self._text_tokenizer.encode(text, add_special_tokens=False)

    def _layout(self, template: str, cameras: int) -> tuple[int | str, ...]:
        """The layout cut at its special tokens: ids, and strings of which one holds `TEXT_MARK`."""
        self.check_template(template)
        if template == "chat":
            rendered = self._render_chat(cameras)
        elif template == "plain":
            rendered = " ".join([TEXT_MARK] + [IMAGE] * cameras)
        else:
            rendered = template.replace("{text}", TEXT_MARK).replace("{images}", IMAGE * cameras)
        pieces = [piece for piece in self._special_pattern.split(rendered) if piece]
        layout = tuple(self._special_ids.get(piece, piece) for piece in pieces)
        images, texts = layout.count(self.image_token_id), rendered.count(TEXT_MARK)
        if images != cameras or texts != 1:
            raise ValueError(
                f"template {template!r} must lay out {cameras} images and 1 text, got {images} images and {texts} texts"
            )
        return layout

    def _end_token(self, template: str) -> int:
        if template != "chat":
            if self.tokenizer.eos_token_id is None:
                raise ValueError("targets need an end token, and the checkpoint's tokenizer has none")
            return self.tokenizer.eos_token_id
        prompt, conversation = self._render_chat(0), self._render_chat(0, answer=ANSWER_MARK)
        _, _, end = conversation.partition(prompt + ANSWER_MARK)
        found = self._special_pattern.match(end)
        if found is None:
            raise ValueError(
                "targets need a chat template whose assistant turn is the generation prompt, the answer and a special "
                f"token, got {conversation!r} after {prompt!r}"
            )
        return self._special_ids[found.group()]

    def _render_chat(self, cameras: int, answer: str | None = None) -> str:
        """A user's turn with the generation prompt, or with the assistant's turn where there is an answer."""
        content = [{"type": "image"}] * cameras + [{"type": "text", "text": TEXT_MARK}]
        turns = [{"role": "user", "content": content}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.chat_template, tokenize=False, add_generation_prompt=answer is None
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the checkpoint's chat template fails: {type(error).__name__}: {error}") from error


class TextStream:
    """The text of generated tokens, piece by piece: a character comes when all its tokens are there."""

    def __init__(self, prompts: PromptEncoder, batch: int) -> None:
        self._prompts = prompts
        self._decoders = [DecodeStream(skip_special_tokens=True) for _ in range(batch)]
        self._ids: list[list[int]] = [[] for _ in range(batch)]
        self._sent = [""] * batch

    def pieces(self, new: Sequence[Sequence[int]]) -> list[str]:
        """The text that is complete with the `new` tokens of each sample."""
        pieces = []
        for index, (row, decoder) in enumerate(zip(new, self._decoders, strict=True)):
            parts = [decoder.step(self._prompts.tokenizer.backend_tokenizer, token) for token in row]
            pieces.append("".join(part for part in parts if part is not None))
            self._ids[index] += row
            self._sent[index] += pieces[-1]
        return pieces

    def rest(self) -> list[str]:
        """What no further token will complete: broken characters, as `PromptEncoder.decode` shows them."""
        texts = map(self._prompts.decode, self._ids)
        return [text[len(sent) :] for text, sent in zip(texts, self._sent, strict=True)]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A checkpoint folder's. Raises `ValueError` where it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on broken files
        raise ValueError(
            f"checkpoint folder {folder} has no readable tokenizer (tokenizer.json, tokenizer_config.json): "
            f"{cut(error)}"
        ) from error


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer, to which every string is text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    # transformers sets truncation and padding anew at each call; a file may hold those of some earlier one.
    state["post_processor"] = state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))

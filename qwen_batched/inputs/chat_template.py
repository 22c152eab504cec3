"""A conversation -> the checkpoint's chat template -> the prompt as a string."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from qwen_batched.inputs.template_budget import MARK, TemplateBudgetError, bounded
from qwen_batched.inputs.template_sandbox import TemplateEnvironment

# Stand for texts while a layout is rendered. The sandbox sees by them whether the template looks at a text.
TEXT_MARK, ANSWER_MARK, SYSTEM_MARK = (f"{MARK}{name}\ue001" for name in ("text", "answer", "system"))


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation."""

    text: str  # the prompt
    looked: bool  # whether the template did anything with a mark but print it, so that other texts may change more


class ChatTemplate:
    """A chat template as transformers runs it, within bounds of work and memory."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Takes the tokenizer's special tokens by their names, which the template may print."""
        self.source = source
        self.timed = "strftime_now" in source  # whether it may read the clock
        self._special_tokens = special_tokens
        self._compiled: jinja2.Template | None = None

    def check(self) -> None:
        """Raises `ValueError` where compiling or rendering the template takes more than any chat template has to."""
        try:
            self._render(1, TEXT_MARK, None, None)
        except TemplateBudgetError as error:
            raise ValueError(f"the chat template is refused: {error}") from error
        except Exception:
            return  # a template that fails otherwise is refused where it is used

    def render(self, cameras: int, text: str, system: str | None = None, answer: str | None = None) -> Rendering:
        """A user's turn and the generation prompt, or the answer's. Raises `ValueError` where the template fails."""
        try:
            return self._render(cameras, text, system, answer)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the checkpoint's chat template fails: {type(error).__name__}: {error!s:.500}") from error

    def _render(self, cameras: int, text: str, system: str | None, answer: str | None) -> Rendering:
        turns = [] if system is None else [_turn("system", system)]
        turns.append(_turn("user", text, cameras))
        if answer is not None:
            turns.append(_turn("assistant", answer))
        template = self._template
        with bounded() as run:
            rendered = template.render(
                messages=turns, tools=None, documents=None, add_generation_prompt=answer is None, **self._special_tokens
            )
        return Rendering(rendered, run.looked)

    @property
    def _template(self) -> jinja2.Template:
        # No `cached_property`: before Python 3.12 it holds a lock meanwhile, on which a forked process would wait for
        # ever. Threads that come at once may each compile the template.
        if self._compiled is None:
            with bounded():
                self._compiled = TemplateEnvironment().template(self.source)
        return self._compiled

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, Mapping[str, Any]]]:
        return ChatTemplate, (self.source, self._special_tokens)  # what Jinja has compiled cannot be copied


def _turn(role: str, text: str, cameras: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * cameras + [{"type": "text", "text": text}]}

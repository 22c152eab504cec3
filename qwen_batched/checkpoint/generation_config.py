"""`generation_config.json`: what `generate` follows, and what it must refuse because it would change the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import fits

# Settings that never change which tokens come, or that the call's own arguments replace.
HARMLESS = frozenset(
    (
        # Followed: by this class, by the tokenizer, by `generate`'s arguments.
        *("eos_token_id", "repetition_penalty", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens"),
        # How transformers computes and what it returns.
        *("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        # Of beams (`num_beams` is refused), and of values that are not finite (which end a sample here).
        *("early_stopping", "length_penalty", "renormalize_logits", "remove_invalid_values"),
        # Of an assistant, which is an argument of transformers' `generate` and in no file.
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
        # Where the file comes from.
        *("transformers_version", "_from_model_config", "_commit_hash"),
    )
)
# Settings that change nothing at one value, besides None; some versions of transformers write it.
NEUTRAL = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), 0.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("token_healing", "use_mtp"), False),
    **{name: [] for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings")},
}
# Settings that only drawing tokens looks at, with the value at which they change nothing.
SAMPLING = {"min_p": 0.0, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
# Every kind of cache that keeps keys and values as they are; a quantized one does not.
EXACT_CACHES = frozenset(
    (
        *("dynamic", "static", "offloaded", "offloaded_static", "paged", "sliding_window"),
        *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    )
)


@dataclass
class GenerationConfig:
    """`generation_config.json`, as far as greedy decoding and sampling need it.

    Like transformers' it may be assigned to: Trainer does where it is given a tokenizer with other special tokens.
    """

    eos_token_ids: tuple[int, ...] = ()  # any of them ends a sample
    repetition_penalty: float = 1.0  # as in transformers; 1 for none
    # Settings, with their values, that would change transformers' tokens and are not implemented.
    refused: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # all that the checkpoint, or who assigned it, says

    @classmethod
    def of(cls, config: object) -> GenerationConfig:
        """`config`, or what transformers' config of this name says. Raises `TypeError` where it is neither."""
        if isinstance(config, cls):
            return config
        if not isinstance(config, transformers.GenerationConfig):
            raise TypeError(f"generation_config must be a GenerationConfig, got {shown(config)}")
        return cls.from_dict({name: value for name, value in vars(config).items() if not name.startswith("_")}, {})

    def __setattr__(self, name: str, value: Any) -> None:
        """Fields and properties as usual; any other name is a setting."""
        if name in self.__dataclass_fields__ or hasattr(type(self), name):
            super().__setattr__(name, value)
            if name == "repetition_penalty" and "settings" in vars(self):
                self._set(name, value)
        else:
            changed = type(self).from_dict({**self.settings, name: value}, {})
            super().__setattr__("refused", changed.refused)
            self._set(name, value)

    def __getattr__(self, name: str) -> Any:
        """A setting by its name; Trainer reads these tokens' where there is none."""
        settings = vars(self).get("settings", {})
        if name in settings or name in ("bos_token_id", "pad_token_id"):
            return settings.get(name)
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    @property
    def eos_token_id(self) -> list[int] | None:
        """`eos_token_ids` by the name, and in the form, of the file."""
        return list(self.eos_token_ids) or None

    @eos_token_id.setter
    def eos_token_id(self, tokens: int | list[int] | None) -> None:
        tokens = [] if tokens is None else [tokens] if isinstance(tokens, int) else tokens
        self.eos_token_ids = tuple(tokens)
        self._set("eos_token_id", list(tokens))

    def _set(self, name: str, value: Any) -> None:
        super().__setattr__("settings", {**self.settings, name: value})

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any] | None, config: Mapping[str, Any]) -> GenerationConfig:
        """Reads the file's content `raw`; where there is no file (None), config.json's content `config`.

        Raises `ValueError` where the end tokens are no token ids, or the repetition penalty is no number above 0.
        """
        settings = _settings_of(config) if raw is None else raw
        eos = settings.get("eos_token_id")
        eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(fits(token, int) for token in eos):
            raise ValueError(f"eos_token_id must be an int or a list of ints, got {shown(settings['eos_token_id'])}")
        penalty = settings.get("repetition_penalty")
        penalty = 1.0 if penalty is None else penalty
        if not fits(penalty, float) or penalty <= 0:
            raise ValueError(f"repetition_penalty must be a number above 0, got {shown(penalty)}")
        defaults = vars(transformers.GenerationConfig())
        draws = bool(settings.get("do_sample"))
        refused = [
            (name, shown(value))
            for name, value in settings.items()
            if not _changes_nothing(name, value, draws) and not _same(value, defaults.get(name))
        ]
        return cls(eos, float(penalty), tuple(refused), settings)

    def check(self) -> None:
        """Raises `ValueError` where the checkpoint has settings that `generate` would have to ignore."""
        if self.refused:
            given = ", ".join(f"{name}={value}" for name, value in self.refused[:5])
            raise ValueError(
                f"generate does not support these settings of the checkpoint: {given}; they stand in "
                "generation_config.json, or in config.json where there is no such file"
            )


def _changes_nothing(name: str, value: object, draws: bool) -> bool:
    if value is None or name in HARMLESS:
        return True
    if name == "cache_implementation":
        return isinstance(value, str) and value in EXACT_CACHES
    if name in SAMPLING:
        return not draws or _same(value, SAMPLING[name])
    return name in NEUTRAL and _same(value, NEUTRAL[name])


def _same(value: object, other: object) -> bool:
    # Python takes True for 1 and False for 0, and a file that says so is not understood.
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json without a generation_config.json beside it."""
    names = vars(transformers.GenerationConfig())
    text = config.get("text_config")
    sections = [text if isinstance(text, Mapping) else {}, config]
    return {k: v for section in sections for k, v in section.items() if k in names and v is not None}

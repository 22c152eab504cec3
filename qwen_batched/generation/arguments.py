"""What callers written for transformers' `generate` pass, read as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor

from qwen_batched.arguments import as_int, integer, shown
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.generation.sampling import Sampling
from qwen_batched.inputs.checks import check_inert

NAMES = (
    *("do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "max_length", "min_new_tokens"),
    *("eos_token_id", "pad_token_id", "repetition_penalty", "num_return_sequences", "return_dict_in_generate"),
)
# Of transformers' `generate`, with values besides None at which they change no token.
INERT: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("length_penalty", "encoder_repetition_penalty", "guidance_scale", "typical_p"), (1.0,)),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), (False,)),
    **dict.fromkeys(("use_cache", "early_stopping", "renormalize_logits", "remove_invalid_values"), (True, False)),
    **dict.fromkeys(("synced_gpus", "use_model_defaults", "disable_compile"), (True, False)),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "bad_words_ids", "suppress_tokens"), ([],)),
    **dict.fromkeys(("streamer", "prefix_allowed_tokens_fn", "assistant_model", "cache_implementation"), ()),
}
DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # where nothing is said
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class GenerationArguments:
    """How transformers would generate."""

    sampling: Sampling
    max_new_tokens: int
    min_new_tokens: int
    end_tokens: tuple[int, ...]
    pad_token_id: int  # follows a sample's end token
    repetition_penalty: float
    num_return_sequences: int
    return_dict: bool


def read_arguments(
    given: Mapping[str, Any], checkpoint: GenerationConfig, pad_token_id: int, length: int, seed: int | None
) -> GenerationArguments:
    """The arguments of one call, for prompts of `length` tokens, padding counted.

    What a call leaves out, or gives as None, is what its `generation_config` says, then the checkpoint's, then
    transformers' default. Raises `TypeError` or `ValueError` where an argument would change tokens and is not
    implemented, or is not as transformers takes it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    config = given.pop("generation_config", None)
    # As transformers does: what an object says by default it does not say.
    default = vars(transformers.GenerationConfig())
    own = {} if config is None else GenerationConfig.of(config).settings
    own = {name: value for name, value in own.items() if value is not None and value != default.get(name)}
    for name, value in given.items():
        if name not in NAMES:
            check_inert("generate", name, value, INERT)
    unknown = GenerationConfig.from_dict({name: x for name, x in own.items() if name not in NAMES}, {}).refused
    if unknown:
        raise ValueError(f"generation_config has settings that are not supported: {dict(unknown)}")

    def find(name: str, default: Any = None, sources: Sequence[Mapping] = (given, own, checkpoint.settings)) -> Any:
        for source in sources:
            if source.get(name) is not None:
                return source[name]
        return default

    draws = find("do_sample", False)
    if not isinstance(draws, bool):
        raise TypeError(f"do_sample must be a bool, got {shown(draws)}")
    drawn = {name: find(name, default) for name, default in DRAWN.items()} if draws else {}
    if draws and drawn["temperature"] == 0:
        raise ValueError("temperature must be above 0 with do_sample=True, got 0: give do_sample=False")
    new_tokens = find("max_new_tokens")
    if new_tokens is None:
        longest = find("max_length", None, (given, own))
        if longest is None:
            longest = find("max_length")
            # transformers' own default, which files hold that say nothing of lengths.
            longest = None if longest == DEFAULT_NEW_TOKENS else longest
        new_tokens = DEFAULT_NEW_TOKENS if longest is None else as_int("max_length", longest, 1) - length
        if new_tokens < 1:
            raise ValueError(f"max_length must be above the {length} tokens of the prompts, got {longest}")
    end_tokens = find("eos_token_id", ())
    if isinstance(end_tokens, Tensor):
        end_tokens = end_tokens.flatten().tolist()
    end_tokens = tuple(end_tokens) if isinstance(end_tokens, (list, tuple)) else (end_tokens,)
    pad = find("pad_token_id", end_tokens[0] if end_tokens else pad_token_id)
    returned = as_int("num_return_sequences", find("num_return_sequences", 1), 1)
    if returned > 1 and not draws:
        raise ValueError(f"num_return_sequences must be 1 without do_sample=True, got {returned}")
    penalty = find("repetition_penalty", 1.0)
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 < penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be a number above 0, got {shown(penalty)}")
    return GenerationArguments(
        sampling=Sampling(**{**drawn, "top_k": integer(drawn["top_k"])}, seed=seed) if draws else Sampling(seed=seed),
        max_new_tokens=as_int("max_new_tokens", new_tokens, 1),
        min_new_tokens=as_int("min_new_tokens", find("min_new_tokens", 0), 0),
        end_tokens=tuple(as_int("eos_token_id", token, 0) for token in end_tokens),
        pad_token_id=as_int("pad_token_id", pad, 0),
        repetition_penalty=float(penalty),
        num_return_sequences=returned,
        return_dict=bool(find("return_dict_in_generate", False)),
    )

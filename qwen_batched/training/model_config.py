"""`model.config`: the checkpoint's config.json as client code reads and assigns it, by transformers' names.

The package itself reads `text` and `vision`, which are frozen. What modules were built from cannot be assigned another
value; every other field can, and is saved with the model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_batched.arguments import dtype_name, shown
from qwen_batched.checkpoint.config import QwenVLConfig, TextConfig, VisionConfig
from qwen_batched.checkpoint.folder import DTYPE_NAMES, Checkpoint
from qwen_batched.families import family_of, read_config

# What config.json may leave out and code for transformers' models reads all the same.
DEFAULTS: Mapping[str, Any] = {
    **{name: False for name in ("output_attentions", "output_hidden_states", "is_encoder_decoder", "torchscript")},
    **{name: True for name in ("return_dict", "use_return_dict", "use_cache")},
    **{name: None for name in ("pad_token_id", "bos_token_id", "eos_token_id", "problem_type", "architectures")},
    **{"_attn_implementation": "sdpa", "_experts_implementation": None, "transformers_version": None},
}
# Fields that shape a decoder's computation besides those of `TextConfig`.
TEXT_FIXED = (
    *("head_dim", "rope_scaling", "rope_parameters", "mrope_section", "layer_types", "attention_dropout"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "attention_bias"),
)
OWN_TEXT_FIELDS = ("explicit_head_dim", "yarn", "mrope_section")  # of `TextConfig`, by names that are only used here
# What outputs hold besides the loss and the logits: not to be gathered over a whole evaluation.
NOT_GATHERED = (
    *("hidden_states", "attention_mask", "image_mask", "camera_ids", "position_ids", "input_ids", "image_features"),
    "past_key_values",
)
SECTIONS = ("text_config", "vision_config")


class Fields:
    """Fields of config.json as attributes, some of which are fixed."""

    _fixed: frozenset[str]  # names of fields that cannot be assigned another value
    _defaults: Mapping[str, Any]  # of fields that are not there
    _assigned: set[str]  # names of fields that were assigned

    def __init__(self, values: Mapping[str, Any], fixed: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        vars(self).update(_fixed=frozenset(fixed), _defaults=defaults, _assigned=set())
        vars(self).update(values)
        vars(self).update(fixed)

    def __getattr__(self, name: str) -> Any:  # what is no attribute
        defaults = vars(self).get("_defaults", {})
        if name not in defaults:
            raise AttributeError(f"the config has no {name}")
        return defaults[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            if value != getattr(self, name):
                built = "is what the model was built from and cannot be assigned; change the checkpoint and load it"
                raise ValueError(f"config: {name}={shown(getattr(self, name))} {built}, got {shown(value)}")
            return
        vars(self)[name] = value
        self._assigned.add(name)

    def __delattr__(self, name: str) -> None:
        if name in self._fixed:
            raise ValueError(f"config: {name} is what the model was built from and cannot be deleted")
        super().__delattr__(name)
        self._assigned.discard(name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = object.__hash__

    def to_dict(self) -> dict[str, Any]:
        """The fields as config.json has them; changing the result changes nothing here."""
        return {name: _plain(value) for name, value in _without(vars(self), _HIDDEN).items()}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as JSON. `use_diff` is there for calls written for transformers: all fields are given."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def assigned(self) -> dict[str, Any]:
        """The fields that were assigned since the model was loaded."""
        return {name: _plain(vars(self)[name]) for name in sorted(self._assigned)}

    def _fix(self, values: Mapping[str, Any]) -> None:
        """Changes fixed fields, with the modules that they describe."""
        vars(self).update(values)


# Attributes that are no fields of config.json.
_HIDDEN = ("_fixed", "_defaults", "_assigned", "_text", "_vision", "keys_to_ignore_at_inference")


class ModelConfig(Fields):
    """The config of a model, made of `text_config`, `vision_config` and the fields of both kinds at the top.

    Fields of the text config can be read and assigned at the top too: `config.hidden_size`.
    """

    keys_to_ignore_at_inference: list[str]
    _text: TextConfig
    _vision: VisionConfig

    def __init__(self, shape: QwenVLConfig, raw: Mapping[str, Any], name_or_path: str = "") -> None:
        """Takes the shape that modules are built from, what config.json says, and the name of the checkpoint."""
        family = family_of(shape.model_type)
        raw = copy.deepcopy(dict(raw))
        vision = raw.pop("vision_config", None) or {}
        text, token_ids = raw.pop("text_config", None), {**family.token_ids, "image_token_id": shape.image_token_id}
        tops = ("architectures", "transformers_version", "model_type", "tie_word_embeddings", *token_ids, *DTYPE_NAMES)
        if text is None:  # the published layout has the text's fields at the top
            text = {name: value for name, value in _without(raw, tops).items() if not name.startswith("vision_")}
            raw = _without(raw, text)
        text = _without(text, ("tie_word_embeddings", *DTYPE_NAMES))
        fixed = {"model_type": shape.model_type, "image_token_id": shape.image_token_id}
        rest = _without({**token_ids, **raw}, (*fixed, *DTYPE_NAMES))
        rest |= {"tie_word_embeddings": shape.tie_word_embeddings, "dtype": shape.dtype, "_name_or_path": name_or_path}
        super().__init__(rest, fixed, DEFAULTS)
        given = {name: text[name] for name in TEXT_FIXED if name in text}
        vars(self).update(
            _text=shape.text,
            _vision=shape.vision,
            keys_to_ignore_at_inference=list(NOT_GATHERED),
            text_config=Fields(text, {**given, **_text_fields(shape.text)}, DEFAULTS),
            vision_config=Fields({}, {**_without(vision, DTYPE_NAMES), **family.vision_names(shape.vision)}, DEFAULTS),
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> ModelConfig:
        """The config of a checkpoint, without a model; peft compares it with the model's."""
        checkpoint = Checkpoint.open(name, weights=False)
        return cls(read_config(checkpoint), checkpoint.config, str(name))

    def __getattr__(self, name: str) -> Any:
        text = vars(self).get("text_config")
        if text is not None and name in vars(text) and name not in _HIDDEN:
            return vars(text)[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SECTIONS:
            raise ValueError(f"config: {name} is what the model was built from and cannot be assigned")
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        elif name in vars(self.text_config) and name not in vars(self):
            setattr(self.text_config, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def text(self) -> TextConfig:
        """The decoder's shape; whoever changes its modules assigns it."""
        return self._text

    @text.setter
    def text(self, shape: TextConfig) -> None:
        vars(self)["_text"] = shape
        self.text_config._fix(_text_fields(shape))

    @property
    def vision(self) -> VisionConfig:
        """The vision transformer's shape."""
        return self._vision

    @property
    def shape(self) -> QwenVLConfig:
        """What the model's modules are built from."""
        return QwenVLConfig(
            self.model_type, self.vision, self.text, self.image_token_id, bool(self.tie_word_embeddings), self.dtype
        )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """An older name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    @property
    def name_or_path(self) -> str:
        """What the model was loaded from."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, name: str) -> None:
        self._name_or_path = str(name)

    def check_embedded(self, what: str, *token_ids: int) -> None:
        """Raises `ValueError` where one of these ids, which the model writes itself, has no embedding."""
        self.shape.check_embedded(what, *token_ids)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Fields:
        """The decoder's fields; the arguments are there for calls written for transformers."""
        return self.text_config

    def update(self, fields: Mapping[str, Any]) -> None:
        """Assigns several fields."""
        for name, value in fields.items():
            setattr(self, name, value)

    def changes(self) -> tuple[dict[str, Any], ...]:
        """What was assigned and is to be saved: at the top of config.json, of the text's and of the vision's section.

        Raises `ValueError` where that cannot be written as JSON.
        """
        sections = (self, self.text_config, self.vision_config)
        changes = tuple(_without(section.assigned(), _NOT_SAVED) for section in sections)
        for name, value in (pair for fields in changes for pair in fields.items()):
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"config.{name} must be what JSON can hold, got {shown(value)}") from error
        return changes


_NOT_SAVED = (
    "tie_word_embeddings",
    "_name_or_path",
    "_attn_implementation",
    "_experts_implementation",
    *DTYPE_NAMES,
    *_HIDDEN,
)


def _without(fields: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _text_fields(shape: TextConfig) -> dict[str, Any]:
    return {**_without(vars(shape), OWN_TEXT_FIELDS), "head_dim": shape.head_dim}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Fields):
        return value.to_dict()
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, tuple):
        return list(value)
    return copy.deepcopy(value)

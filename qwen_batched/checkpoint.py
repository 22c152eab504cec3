"""A checkpoint folder in the hub's layout: where it is, and its JSON files, read and written as they stand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

# Never a pickle, never code.
CONFIG_FILES, WEIGHT_FILES = ("*.json", "*.jinja", "merges.txt"), ("*.safetensors",)
# Written back as they stand: those that one version of transformers writes, another may not read.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A folder and what its JSON files say; a file that is not there is None.

    Attributes:
        folder: The folder itself.
        config: config.json.
        preprocessor: preprocessor_config.json, or its content in transformers 5's processor_config.json.
        generation: generation_config.json.
        chat_template: The processor's chat template; None where only the tokenizer has one.
        tokenizer: The tokenizer's files by name, byte for byte.
    """

    folder: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    generation: dict[str, Any] | None
    chat_template: str | None
    tokenizer: dict[str, bytes]

    @classmethod
    def open(cls, name: str | Path, weights: bool = True) -> Checkpoint:
        """Finds and reads the checkpoint `name`: a folder, or a hub id (downloaded, or taken from the hub's cache).

        Without `weights`, nothing of a hub id but its small files is downloaded.

        Raises:
            ValueError: There is no such checkpoint, or a file of it is not readable.
        """
        folder = find_folder(name, weights)
        combined = read_json(folder / "processor_config.json") or {}
        config = read_json(folder / "config.json")
        if config is None:
            raise ValueError(f"checkpoint folder {folder} has no config.json")
        return cls(
            folder=folder,
            config=config,
            preprocessor=read_json(folder / "preprocessor_config.json") or combined.get("image_processor"),
            generation=read_json(folder / "generation_config.json"),
            chat_template=_read_chat_template(folder),
            tokenizer={file: path.read_bytes() for file in TOKENIZER_FILES if (path := folder / file).is_file()},
        )

    def describing(
        self, *, num_layers: int, tied: bool, dtype: torch.dtype, min_pixels: int, max_pixels: int
    ) -> Checkpoint:
        """The same files, saying of a model loaded from them what has changed since."""
        config = dict(self.config)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        text = dict(config["text_config"]) if "text_config" in config else config
        if any(section.get("tie_word_embeddings") for section in (config, text)) != tied:  # either place ties them
            config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        text["num_hidden_layers"] = num_layers
        if "layer_types" in text:
            text["layer_types"] = text["layer_types"][:num_layers]
        if text is not config:
            config["text_config"] = text
            if "num_hidden_layers" in config:  # transformers 4.52 to 4.57 wrote the text fields in both places
                config["num_hidden_layers"] = num_layers
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels, "size": size}
        return replace(self, config=config, preprocessor={**(self.preprocessor or {}), **pixels})

    def save(self, folder: Path) -> None:
        """Writes everything but the weights into `folder`. Raises `ValueError` where that is a file."""
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.tokenizer.items():
            (folder / name).write_bytes(data)
        files = {
            "config.json": self.config,
            "preprocessor_config.json": self.preprocessor,
            "generation_config.json": self.generation,
            # transformers of every age reads the template from here; later ones write chat_template.jinja.
            "chat_template.json": self.chat_template and {"chat_template": self.chat_template},
        }
        for name, content in files.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint given by its path or hub id. Raises `ValueError` where there is none."""
    if not isinstance(name, (str, Path)):
        raise TypeError(f"a checkpoint is named by a folder or a hub id, got {type(name).__name__}")
    if Path(name).is_dir():
        return Path(name)
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ValueError(f"checkpoint folder {str(name)!r} does not exist")
    patterns = CONFIG_FILES + WEIGHT_FILES if weights else CONFIG_FILES
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:  # the hub's and the network's errors are OSErrors
        raise ValueError(f"{name!r} is neither a folder nor a checkpoint that the hub gives: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None where there is no such file. Raises `ValueError` where it is not readable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_chat_template(folder: Path) -> str | None:
    """chat_template.jinja wins over chat_template.json, as in transformers."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    template = (read_json(folder / "chat_template.json") or {}).get("chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{folder / 'chat_template.json'} must hold a string, got {type(template).__name__}")
    return template

"""A checkpoint folder in the hub's layout: where it is, and its JSON files, read and written as they stand."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

from qwen_batched.atomic_save import recover, write_file

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
# The weights that some reader would take, by the names that transformers gives them: shards, variants, pickles.
_WEIGHTS = r"((pytorch_)?model|tf_model|flax_model)(\.(bf|fp|f)\d+)?(-\d{5}-of-\d{5})?(\.(bf|fp|f)\d+)?"
CHECKPOINT_WEIGHTS = re.compile(_WEIGHTS + r"\.(safetensors|bin|h5|msgpack)(\.index(\.(bf|fp|f)\d+)?\.json)?")
# The other files of a checkpoint. Some readers prefer one that is not written here to one that is: transformers
# processor_config.json and chat_template.json, vLLM tekken.json and the descriptions of quantised weights.
CHECKPOINT_FILES = {
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "tekken.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
}
ADAPTER_FILE = "adapter_config.json"
DTYPE_NAMES = ("dtype", "torch_dtype")
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
        video: What transformers' video processor reads, to be written back; None where it reads `preprocessor`.
        stamp: Tells the checkpoint's files from those of a later save.
    """

    folder: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    generation: dict[str, Any] | None
    chat_template: str | None
    tokenizer: dict[str, bytes]
    video: dict[str, Any] | None = None
    stamp: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | Path, weights: bool = True) -> Checkpoint:
        """Finds and reads the checkpoint `name`: a folder, or a hub id (downloaded, or taken from the hub's cache).

        Without `weights`, nothing of a hub id but its small files is downloaded.

        Raises:
            ValueError: There is no such checkpoint, or a file of it is not readable.
        """
        folder = find_folder(name, weights)
        stamp = _stamp(folder)
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
            video=combined.get("video_processor") or read_json(folder / "video_preprocessor_config.json"),
            stamp=stamp,
        )

    def check_unchanged(self) -> None:
        """Is called when all is read. Raises `ValueError` where the folder was saved over meanwhile."""
        if _stamp(self.folder) != self.stamp:
            raise ValueError(f"checkpoint folder {self.folder} was saved over while it was loaded: load it again")

    def describing(self, *, num_layers: int, dtype: torch.dtype, min_pixels: int, max_pixels: int) -> Checkpoint:
        """The same files, saying of a model loaded from them what has changed since."""
        config = copy.deepcopy(self.config)
        text = config.get("text_config") or config
        text["num_hidden_layers"] = num_layers
        if "dtype" not in config:
            config["torch_dtype"] = None
        # Releases of transformers differ in the name of the dtype, and some wrote such fields in two places.
        for section in (config, text, config.get("vision_config") or {}):
            section.update({name: str(dtype).removeprefix("torch.") for name in DTYPE_NAMES if name in section})
        for section in (config, text):
            if "num_hidden_layers" in section:
                section["num_hidden_layers"] = num_layers
            if section.get("layer_types"):
                section["layer_types"] = section["layer_types"][:num_layers]
        size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels, "size": size}
        return replace(self, config=config, preprocessor={**(self.preprocessor or {}), **pixels})

    def write(self, folder: Path) -> None:
        """Writes everything but the weights into `folder`: each thing once, where transformers of every age reads it.

        Raises:
            OSError: A file cannot be written; it is named.
        """
        files = {
            "config.json": self.config,
            # Newer releases of transformers prefer processor_config.json, older ones do not know it.
            "preprocessor_config.json": self.preprocessor,
            "video_preprocessor_config.json": self.video,
            "generation_config.json": self.generation,
        }
        contents = {
            name: json.dumps(content, indent=2, ensure_ascii=False).encode()
            for name, content in files.items()
            if content is not None
        }
        if self.chat_template is not None:
            # The tokenizer reads it from here too, the processor's chat_template.json it does not.
            contents["chat_template.jinja"] = self.chat_template.encode()
        for name, data in {**self.tokenizer, **contents}.items():
            write_file(folder / name, data)


def _stamp(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells each file of the checkpoint from one of the same name that a later save renames into its place."""
    stamp = {}
    with suppress(PermissionError):  # a folder that may be entered but not listed
        for name in filter(is_checkpoint_file, os.listdir(folder)):
            with suppress(OSError):  # a link to nothing, or a file that a save has just replaced
                facts = (folder / name).stat()
                stamp[name] = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return stamp


def is_checkpoint_file(name: str) -> bool:
    """Whether transformers or vLLM would take a file (or folder) of this name for a part of the checkpoint."""
    return name in CHECKPOINT_FILES or CHECKPOINT_WEIGHTS.fullmatch(name) is not None


def warn_of_adapter(folder: Path) -> None:
    """Logs what transformers makes of an adapter beside the checkpoint, which is not ours to remove."""
    if (folder / ADAPTER_FILE).exists():
        logging.getLogger(__name__).warning(
            "%s has an adapter: where peft is installed, transformers loads that and the model it was trained on, "
            "not the checkpoint saved here",
            folder,
        )


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint given by its path or hub id. Raises `ValueError` where there is none."""
    if not isinstance(name, (str, Path)):
        raise TypeError(f"a checkpoint is named by a folder or a hub id, got {type(name).__name__}")
    if Path(name).is_dir():
        recover(Path(name))
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

"""A checkpoint folder in the hub's layout: where it is, and its JSON files, read and written as they stand."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

from qwen_batched.arguments import cut, shown
from qwen_batched.config import ImageConfig, QwenVLConfig, VisionConfig
from qwen_batched.files import is_file, read_bytes, read_json, read_text
from qwen_batched.generation_config import GenerationConfig

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
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
# What transformers opens of a folder, whatever it is: nothing of these kinds may be other than a file.
OPENED_SUFFIXES = {".json", ".jinja", ".txt", ".model"}


@dataclass(frozen=True)
class HubOptions:
    """How a hub id is looked up, as huggingface_hub takes it; a local folder needs none of it.

    Attributes:
        revision: A branch, tag or commit; None for the main branch.
        cache_dir: Where downloads are kept; None for the hub's own cache.
        token: An access token, True for the stored one, False for none.
        local_files_only: Nothing is downloaded.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        kinds = {"revision": str | None, "cache_dir": str | Path | None, "token": str | bool | None}
        for name, kind in {**kinds, "local_files_only": bool}.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind}, got {type(getattr(self, name)).__name__}")


@dataclass(frozen=True)
class Checkpoint:
    """A folder and what its JSON files say; a file that is not there is None.

    Attributes:
        folder: The folder itself.
        config: config.json.
        preprocessor: What transformers 5's processor_config.json says of images, else preprocessor_config.json.
        generation: generation_config.json.
        chat_template: The processor's chat template; None where only the tokenizer has one.
        tokenizer: The tokenizer's files by name, byte for byte.
        preprocessor_file: Where `preprocessor` comes from.
    """

    folder: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None
    generation: dict[str, Any] | None
    chat_template: str | None
    tokenizer: dict[str, bytes]
    preprocessor_file: str = PREPROCESSOR_FILE

    @classmethod
    def open(cls, name: str | Path, weights: bool = True, hub: HubOptions | None = None) -> Checkpoint:
        """Finds and reads the checkpoint `name`: a folder, or a hub id (downloaded, or taken from the hub's cache).

        Without `weights`, nothing of a hub id but its small files is downloaded. Where the folder says a thing twice,
        the order is that of transformers 5.

        Raises:
            ValueError: There is no such checkpoint, or a file of it is not readable.
        """
        folder = find_folder(name, weights, hub or HubOptions())
        _check_kinds(folder)
        config = read_json(folder / CONFIG_FILE)
        if config is None:
            raise ValueError(f"checkpoint folder {folder} has no {CONFIG_FILE}")
        processor = read_json(folder / PROCESSOR_FILE) or {}
        preprocessor, source = processor.get("image_processor"), PROCESSOR_FILE
        if preprocessor is None:
            preprocessor, source = read_json(folder / PREPROCESSOR_FILE), PREPROCESSOR_FILE
        elif not isinstance(preprocessor, dict):
            raise ValueError(f"{folder / source}: image_processor must be a JSON object, got {shown(preprocessor)}")
        return cls(
            folder=folder,
            config=config,
            preprocessor=preprocessor,
            generation=read_json(folder / GENERATION_FILE),
            chat_template=_read_chat_template(folder, processor),
            tokenizer=_read_tokenizer_files(folder),
            preprocessor_file=source,
        )

    def model_config(self) -> QwenVLConfig:
        """The model's shape. Raises `ValueError`, naming the file, for what this package does not implement."""
        with naming(self.folder / CONFIG_FILE):
            return QwenVLConfig.from_dict(self.config)

    def image_config(self, vision: VisionConfig) -> ImageConfig:
        """How images are prepared for `vision`.

        Raises:
            ValueError: The file says what this package does not implement or the model does not take. It is named.
        """
        if self.preprocessor is None:
            raise ValueError(f"checkpoint folder {self.folder} has no {PREPROCESSOR_FILE}")
        with naming(self.folder / self.preprocessor_file):
            image = ImageConfig.from_dict(self.preprocessor)
            image.check_patches(vision)
        return image

    def generation_config(self) -> GenerationConfig:
        """How text is generated. Raises `ValueError`, naming the file, where that is damaged."""
        with naming(self.folder / (CONFIG_FILE if self.generation is None else GENERATION_FILE)):
            return GenerationConfig.from_dict(self.generation, self.config)

    def describing(self, *, num_layers: int, dtype: torch.dtype, min_pixels: int, max_pixels: int) -> Checkpoint:
        """The same files, saying of a model loaded from them what has changed since."""
        config = dict(self.config)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        text = dict(config["text_config"]) if "text_config" in config else config
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


def find_folder(name: str | Path, weights: bool = True, hub: HubOptions = HubOptions()) -> Path:
    """The folder of a checkpoint given by its path or hub id. Raises `ValueError` where there is none."""
    if not isinstance(name, (str, Path)):
        raise TypeError(f"a checkpoint is named by a folder or a hub id, got {type(name).__name__}")
    with contextlib.suppress(OSError, ValueError):  # a name that no path can have: too long, or with a null character
        if Path(name).is_dir():
            return Path(name)
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ValueError(f"checkpoint folder {shown(str(name))} does not exist")
    patterns = CONFIG_FILES + WEIGHT_FILES if weights else CONFIG_FILES
    options = {field.name: getattr(hub, field.name) for field in fields(HubOptions)}
    options = {option: value for option, value in options.items() if value != getattr(HubOptions, option)}
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))
    except (OSError, HFValidationError) as error:  # the hub's and the network's errors are OSErrors
        raise ValueError(
            f"{shown(name)} is neither a folder nor a checkpoint that the hub gives: {cut(error)}"
        ) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path of a file or folder before the message of a `ValueError` about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_kinds(folder: Path) -> None:
    """Raises `ValueError` where transformers would open what is no file, and perhaps wait for ever."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix in OPENED_SUFFIXES and not path.is_dir()]
    except OSError as error:
        raise ValueError(f"checkpoint folder {folder} is not readable: {cut(error)}") from error
    for path in [*paths, *(folder / name for name in TOKENIZER_FILES), *_template_files(folder)]:
        is_file(path)


def _template_files(folder: Path) -> list[Path]:
    return sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))


def _read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files. Each is read as what it should be: transformers' own errors do not name it."""
    for name in TOKENIZER_FILES:
        content = read_json(folder / name) if name.endswith(".json") else read_text(folder / name)
        if name == "tokenizer_config.json":
            for key, value in (content or {}).items():
                # transformers reads "vocab_file" and the like from where they say.
                if key.endswith("_file") and isinstance(value, str):
                    with naming(folder / name):
                        is_file(folder / value), is_file(Path(value))
    contents = {name: read_bytes(folder / name) for name in TOKENIZER_FILES}
    return {name: content for name, content in contents.items() if content is not None}


def _read_chat_template(folder: Path, processor: dict[str, Any]) -> str | None:
    """The processor's template: of chat_template.jinja and additional_chat_templates/, else of its JSON files."""
    templates = {path.stem: read_text(path) for path in _template_files(folder)}
    jinja = read_text(folder / "chat_template.jinja")
    if jinja is not None or "default" in templates:
        return templates["default"] if jinja is None else jinja
    json_file = folder / PROCESSOR_FILE
    template = processor.get("chat_template")
    if template is None:
        json_file = folder / "chat_template.json"
        template = (read_json(json_file) or {}).get("chat_template")
    if isinstance(template, list) and all(isinstance(named, dict) for named in template):
        template = {named.get("name"): named.get("template") for named in template}
    if isinstance(template, dict):
        if not isinstance(template.get("default"), str):
            raise ValueError(
                f"{json_file}: of several chat templates one must be named 'default', got {shown(template)}"
            )
        template = template["default"]
    if not isinstance(template, str | None):
        raise ValueError(f"{json_file}: chat_template must be a string, got {shown(template)}")
    return template

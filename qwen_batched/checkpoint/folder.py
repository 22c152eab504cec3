"""A checkpoint folder in the hub's layout: where it is, and its JSON files, read and written as they stand."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError

from qwen_batched.arguments import cut, dtype_name, shown
from qwen_batched.checkpoint.atomic_save import recover, write_file
from qwen_batched.checkpoint.config import ImageConfig, QwenVLConfig, VisionConfig
from qwen_batched.checkpoint.files import is_file, read_bytes, read_json, read_text
from qwen_batched.checkpoint.generation_config import GenerationConfig
from qwen_batched.checkpoint.tokenizer_files import with_added_tokens

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
TEMPLATE_FILE, JSON_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"
# Never a pickle, never code.
CONFIG_FILES, WEIGHT_FILES = ("*.json", "*.jinja", "merges.txt"), ("*.safetensors",)
# Written back as they stand: those that one version of transformers writes, another may not read.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
# The weights that some reader would take, by the names that transformers gives them: shards, variants, pickles.
_WEIGHTS = r"((pytorch_)?model|tf_model|flax_model)(\.(bf|fp|f)\d+)?(-\d{5}-of-\d{5})?(\.(bf|fp|f)\d+)?"
CHECKPOINT_WEIGHTS = re.compile(_WEIGHTS + r"\.(safetensors|bin|h5|msgpack)(\.index(\.(bf|fp|f)\d+)?\.json)?")
# The other files of a checkpoint. Some readers prefer one that is not written here to one that is: transformers
# processor_config.json and chat_template.json, vLLM tekken.json and the descriptions of quantised weights.
CHECKPOINT_FILES = {
    *(*TOKENIZER_FILES, CONFIG_FILE, GENERATION_FILE, PREPROCESSOR_FILE, VIDEO_FILE, PROCESSOR_FILE),
    *(TEMPLATE_FILE, JSON_TEMPLATE_FILE, TEMPLATE_FOLDER, "audio_tokenizer_config.json", "tokenizer.model"),
    *("tekken.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
}
ADAPTER_FILE = "adapter_config.json"
DTYPE_NAMES = ("dtype", "torch_dtype")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What transformers opens of a folder, whatever it is: nothing of these kinds may be other than a file.
OPENED_SUFFIXES = {".json", ".jinja", ".txt", ".model"}


@dataclass(frozen=True)
class HubOptions:
    """How a hub id is looked up, as huggingface_hub takes it; a local folder needs none of it."""

    revision: str | None = None  # a branch, tag or commit; None for the main branch
    cache_dir: str | Path | None = None  # where downloads are kept; None for the hub's own cache
    token: str | bool | None = None  # an access token, True for the stored one, False for none
    local_files_only: bool = False  # nothing is downloaded

    def __post_init__(self) -> None:
        kinds = {"revision": str | None, "cache_dir": str | Path | None, "token": str | bool | None}
        for name, kind in {**kinds, "local_files_only": bool}.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind}, got {type(getattr(self, name)).__name__}")


@dataclass(frozen=True)
class Checkpoint:
    """A folder and what its JSON files say; a file that is not there is None."""

    folder: Path
    config: dict[str, Any]  # config.json
    # What transformers 5's processor_config.json says of images, else preprocessor_config.json.
    preprocessor: dict[str, Any] | None
    generation: dict[str, Any] | None  # generation_config.json
    chat_template: str | None  # the processor's chat template; None where only the tokenizer has one
    tokenizer: dict[str, bytes]  # the tokenizer's files by name, byte for byte
    # What transformers' video processor reads, to be written back; None where it reads `preprocessor`.
    video: dict[str, Any] | None = None
    preprocessor_file: str = PREPROCESSOR_FILE  # where `preprocessor` comes from
    # Tells the checkpoint's files from those of a later save.
    stamp: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str | Path, weights: bool = True, hub: HubOptions | None = None) -> Checkpoint:
        """Finds and reads the checkpoint `name`: a folder, or a hub id (downloaded, or taken from the hub's cache).

        Without `weights`, nothing of a hub id but its small files is downloaded. Where the folder says a thing twice,
        the order is that of transformers 5. Raises `ValueError` where there is no such checkpoint, or a file of it is
        not readable.
        """
        folder = find_folder(name, weights, hub or HubOptions())
        stamp = _stamp(folder)
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
        generation, template = read_json(folder / GENERATION_FILE), _read_chat_template(folder, processor)
        tokenizer, video = _read_tokenizer_files(folder), processor.get("video_processor")
        video = video or read_json(folder / VIDEO_FILE)
        return cls(folder, config, preprocessor, generation, template, tokenizer, video, source, stamp)

    def check_unchanged(self) -> None:
        """Is called when all is read. Raises `ValueError` where the folder was saved over meanwhile."""
        if _stamp(self.folder) != self.stamp:
            raise ValueError(f"checkpoint folder {self.folder} was saved over while it was loaded: load it again")

    def image_config(self, vision: VisionConfig, defaults: ImageConfig) -> ImageConfig:
        """How images are prepared. Raises `ValueError`, naming the file, for what the model does not take."""
        if self.preprocessor is None:
            raise ValueError(f"checkpoint folder {self.folder} has no {PREPROCESSOR_FILE}")
        with naming(self.folder / self.preprocessor_file):
            image = ImageConfig.from_dict(self.preprocessor, defaults)
            image.check_patches(vision)
        return image

    def generation_config(self) -> GenerationConfig:
        """How text is generated. Raises `ValueError`, naming the file, where that is damaged."""
        with naming(self.folder / (CONFIG_FILE if self.generation is None else GENERATION_FILE)):
            return GenerationConfig.from_dict(self.generation, self.config)

    def describing(
        self,
        model: QwenVLConfig,
        dtype: torch.dtype,
        image: ImageConfig,
        changes: tuple[Mapping[str, Any], ...] = ({}, {}, {}),
    ) -> Checkpoint:
        """The same files, saying of a model loaded from them what has changed since.

        `changes` are other fields of config.json: at its top, in the text's section and in the vision's.
        """
        num_layers, tied = model.text.num_hidden_layers, model.tie_word_embeddings
        config = copy.deepcopy(self.config)
        text = config.get("text_config") or config
        vision = config.get("vision_config") or {}
        for section, changed in zip((config, text, vision), changes, strict=True):
            section.update(changed)
        if vision:
            config["vision_config"] = vision
        if any(section.get("tie_word_embeddings") for section in (config, text)) != tied:  # either place ties them
            config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
        text["num_hidden_layers"] = num_layers
        for section in (config, text):
            if section is text or "vocab_size" in section:
                section["vocab_size"] = model.text.vocab_size
        if "dtype" not in config:
            config["torch_dtype"] = None
        # Releases of transformers differ in the name of the dtype, and some wrote such fields in two places.
        for section in (config, text, config.get("vision_config") or {}):
            section.update({name: dtype_name(dtype) for name in DTYPE_NAMES if name in section})
        for section in (config, text):
            if "num_hidden_layers" in section:
                section["num_hidden_layers"] = num_layers
            if section.get("layer_types"):
                section["layer_types"] = section["layer_types"][:num_layers]
        size = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
        pixels = {"min_pixels": image.min_pixels, "max_pixels": image.max_pixels, "size": size}
        return replace(self, config=config, preprocessor={**(self.preprocessor or {}), **pixels})

    def with_added_tokens(self, entries: Sequence[Mapping[str, Any]], state: Callable[[], str]) -> Checkpoint:
        """The same with a tokenizer that has these added tokens: see `tokenizer_files.with_added_tokens`."""
        return replace(self, tokenizer=with_added_tokens(self.tokenizer, entries, state))

    def write(self, folder: Path) -> None:
        """Writes everything but the weights: each thing once, where transformers of every age reads it."""
        files = {
            CONFIG_FILE: self.config,
            # Newer releases of transformers prefer processor_config.json, older ones do not know it.
            PREPROCESSOR_FILE: self.preprocessor,
            VIDEO_FILE: self.video,
            GENERATION_FILE: self.generation,
        }
        given = {name: content for name, content in files.items() if content is not None}
        contents = {name: json.dumps(x, indent=2, ensure_ascii=False).encode() for name, x in given.items()}
        if self.chat_template is not None:
            # The tokenizer reads it from here too, the processor's chat_template.json it does not.
            contents[TEMPLATE_FILE] = self.chat_template.encode()
        for name, data in {**self.tokenizer, **contents}.items():
            write_file(folder / name, data)


def _stamp(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells each file of the checkpoint from one of the same name that a later save renames into its place."""
    stamp = {}
    with contextlib.suppress(PermissionError):  # a folder that may be entered but not listed
        for name in filter(is_checkpoint_file, os.listdir(folder)):
            with contextlib.suppress(OSError):  # a link to nothing, or a file that a save has just replaced
                facts = (folder / name).stat()
                stamp[name] = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    return stamp


def is_checkpoint_file(name: str) -> bool:
    """Whether transformers or vLLM would take a file (or folder) of this name for a part of the checkpoint."""
    return name in CHECKPOINT_FILES or CHECKPOINT_WEIGHTS.fullmatch(name) is not None


def warn_of_adapter(folder: Path) -> None:
    """Logs what transformers makes of an adapter beside the checkpoint, which is not ours to remove."""
    if (folder / ADAPTER_FILE).exists():
        effect = "where peft is installed, transformers loads that and the model it was trained on"
        logging.getLogger(__name__).warning("%s has an adapter: %s, not the checkpoint saved here", folder, effect)


def find_folder(name: str | Path, weights: bool = True, hub: HubOptions = HubOptions()) -> Path:
    """The folder of a checkpoint given by its path or hub id. Raises `ValueError` where there is none."""
    if not isinstance(name, (str, Path)):
        raise TypeError(f"a checkpoint is named by a folder or a hub id, got {type(name).__name__}")
    is_folder = False
    with contextlib.suppress(OSError, ValueError):  # a name that no path can have: too long, or with a null character
        is_folder = name != "" and Path(name).is_dir()
    if is_folder:
        recover(Path(name))
        return Path(name)
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise ValueError(f"checkpoint folder {shown(str(name))} does not exist")
    patterns = CONFIG_FILES + WEIGHT_FILES if weights else CONFIG_FILES
    chosen = ((option, getattr(hub, option.name)) for option in fields(HubOptions))
    options = {option.name: value for option, value in chosen if value != option.default}
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))
    except (OSError, HFValidationError) as error:  # the hub's and the network's errors are OSErrors
        reason = f"neither a folder nor a checkpoint that the hub gives: {cut(error)}"
        raise ValueError(f"{shown(name)} is {reason}") from error


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
    jinja = read_text(folder / TEMPLATE_FILE)
    if jinja is not None or "default" in templates:
        return templates["default"] if jinja is None else jinja
    json_file = folder / PROCESSOR_FILE
    template = processor.get("chat_template")
    if template is None:
        json_file = folder / JSON_TEMPLATE_FILE
        template = (read_json(json_file) or {}).get("chat_template")
    if isinstance(template, list) and all(isinstance(named, dict) for named in template):
        template = {named.get("name"): named.get("template") for named in template}
    if isinstance(template, dict):
        if not isinstance(template.get("default"), str):
            expected = "of several chat templates one must be named 'default'"
            raise ValueError(f"{json_file}: {expected}, got {shown(template)}")
        template = template["default"]
    if not isinstance(template, str | None):
        raise ValueError(f"{json_file}: chat_template must be a string, got {shown(template)}")
    return template

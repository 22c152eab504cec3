"""Safetensors files -> parameters: streamed one tensor at a time, strictly checked, in any key layout; and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_batched.arguments import cut, shown
from qwen_batched.checkpoint.atomic_save import write_file
from qwen_batched.checkpoint.device import resolve_device, resolve_dtype
from qwen_batched.checkpoint.files import is_file, read_json
from qwen_batched.checkpoint.folder import Checkpoint
from qwen_batched.checkpoint.keys import EMBEDDING_NAME, HEAD_NAME, KeyLayout

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what it is, before it is read."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def build_on_meta(make: Callable[[], M], config: Path | str = "config.json") -> M:
    """A module without storage. Raises `ValueError` where `config` describes tensors larger than PyTorch can count."""
    try:
        with torch.device("meta"):
            return make()
    except RuntimeError as error:
        raise ValueError(f"{config} describes a model that cannot be built: {cut(error)}") from error


def load_weights(
    module: M,
    checkpoint: Checkpoint,
    keys: KeyLayout,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    prefix: str = "",
    skip: Callable[[str], bool] = lambda name: False,
    tied_head: bool = False,
) -> M:
    """Fills a module on the meta device from a folder's safetensors files. Each tensor goes straight to its place.

    Args:
        module, keys: Its parameters' names, after `prefix`, are those of the whole model; how files may spell them.
        dtype, device: None for the stored one, as "auto"; None for CUDA where there is any, else the CPU.
        skip: Says of a name that the module lacks whether it may be left unread.
        tied_head: The module's output projection is its embedding; one that is stored all the same must be equal.

    Raises:
        ValueError: A file is missing or corrupt; a key is unknown, missing or there twice; a shape or
                the tied head differs; the folder is saved over meanwhile.
    """
    folder = checkpoint.folder
    stored = find_tensors(folder, keys)
    wanted = {prefix + name: parameter for name, parameter in module.named_parameters()}
    _check_names(folder, wanted, stored, skip)
    for name, parameter in wanted.items():
        found, shape = stored[name], tuple(parameter.shape)
        if found.shape != shape:
            raise ValueError(f"{found.file}: {found.key} must have shape {shape}, got {found.shape}")
    # transformers has used either of the two over time; a checkpoint that says both things is not read.
    if tied_head and HEAD_NAME in stored and not torch.equal(*(_read(stored[x]) for x in (HEAD_NAME, EMBEDDING_NAME))):
        raise ValueError(f"{folder}: tie_word_embeddings is true, but {HEAD_NAME} differs from {EMBEDDING_NAME}")
    dtype = resolve_dtype(dtype, stored[next(iter(wanted))].dtype)
    device = resolve_device(device)
    if device.type == "meta":
        raise ValueError("weights must be loaded to a device with memory, got 'meta'")
    for name, parameter in wanted.items():
        owner_name, _, leaf = name.removeprefix(prefix).rpartition(".")
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value.copy_(_read(stored[name]))
        setattr(module.get_submodule(owner_name), leaf, nn.Parameter(value))
    checkpoint.check_unchanged()
    return module


def whole_tensors(state_dict: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """`state_dict`. Raises `ValueError` where it is not that of what `build` makes, or is sharded or quantised."""
    tensors = dict(state_dict)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"a state_dict must hold tensors, got {value!r} for {name}")
        if value.is_meta or not value.is_floating_point():
            kind = "one without values" if value.is_meta else str(value.dtype)
            raise ValueError(f"a state_dict must hold tensors of floating dtypes, got {kind} for {name}")
    fresh = build_on_meta(build).state_dict()
    shapes, expected = ({name: tuple(x.shape) for name, x in each.items()} for each in (tensors, fresh))
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        raise ValueError(
            f"a checkpoint must hold the model's own tensors, got others for {wrong[:5]} ({len(wrong)} in all): an "
            "adapter has to be merged or unloaded first"
        )
    for name, tensor in tensors.items():
        if (kind := type(tensor)) not in (Tensor, nn.Parameter):
            got = f"a {kind.__name__} for {name}: give a gathered state_dict"
            raise ValueError(f"tensors to save must be whole, got {got}")
    return tensors


def save_weights(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Writes tensors under their names into `folder`, in shards of `max_shard_size`. An `OSError` names its file."""
    split = huggingface_hub.split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_file(folder / INDEX_FILE, json.dumps(index, indent=2).encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file. Raises an `OSError` that names it where it cannot be written."""
    try:
        save_file(_savable(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else None, str(error), str(file)) from error


def find_tensors(folder: Path, keys: KeyLayout) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files, by its module's name. Reads the files' headers only."""
    found: dict[str, StoredTensor] = {}
    for file in _files(folder):
        for tensor in _read_header(file):
            if tensor.key.startswith(keys.ignored):
                continue
            name = keys.module_name(tensor.key)
            if other := found.get(name):
                raise ValueError(f"{cut(tensor.key)} is in {file} and, as {cut(other.key)}, in {other.file}")
            found[name] = tensor
    return found


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: rows next to each other, and none in the memory of another."""
    # Where weights are packed, a tensor's rows may lie further apart than they are long.
    savable = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    first = {tensor.data_ptr(): name for name, tensor in reversed(savable.items())}
    return {name: x if first[x.data_ptr()] == name else x.clone() for name, x in savable.items()}


def _files(folder: Path) -> list[Path]:
    """The safetensors files to read: the single one, or those that the index names."""
    if is_file(folder / SINGLE_FILE):
        return [folder / SINGLE_FILE]
    index = read_json(folder / INDEX_FILE)
    if index is None:
        expected = f"{SINGLE_FILE} or {INDEX_FILE} (pickles are not read)"
        raise ValueError(f"checkpoint folder {folder} has no weights: expected {expected}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map")
    names = sorted({name if isinstance(name, str) else shown(name) for name in weight_map.values()})
    for name in names:
        if not name or Path(name).name != name or "\0" in name or not is_file(folder / name):
            raise ValueError(f"{folder / INDEX_FILE} names {shown(name)}, which is not a file of the folder")
    return [folder / name for name in names]


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 (not a mapping)
            entries = [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {cut(error)}") from error
    for key, _, dtype in entries:
        if dtype not in STORED_DTYPES:
            raise ValueError(f"{file}: {cut(key)} must be one of {', '.join(STORED_DTYPES)}, got {dtype}")
    return [StoredTensor(file, key, shape, STORED_DTYPES[dtype]) for key, shape, dtype in entries]


def _read(tensor: StoredTensor) -> Tensor:
    # The file is mapped anew for each tensor: pages of one mapping would stay in memory until its end.
    with safe_open(tensor.file, framework="pt") as tensors:
        return tensors.get_tensor(tensor.key)


def _check_names(
    folder: Path, wanted: dict[str, nn.Parameter], stored: dict[str, StoredTensor], skip: Callable[[str], bool]
) -> None:
    missing = [name for name in wanted if name not in stored]
    unknown = [tensor.key for name, tensor in stored.items() if name not in wanted and not skip(name)]
    for what, names in (("misses", missing), ("has unknown", unknown)):
        if names:
            keys = ", ".join(cut(name) for name in names[:5])
            raise ValueError(f"checkpoint {folder} {what} keys: {keys} ({len(names)} in all)")

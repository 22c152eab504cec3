"""In: a frozen vision transformer and frames. Out: their image features, from a file where there is one."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn, uint8


def cached_features(path: Path, origin: Mapping[str, str], compute: Callable[[], Tensor]) -> Tensor:
    """What `compute()` gives, written to `path` the first time and read from there later.

    Args:
        path: A safetensors file; its folder is made where there is none.
        origin: What the features depend on, such as `digest(model.visual)` and `digest(frames)`. It is written beside
            them, and compared.
        compute: Runs the vision transformer.

    Raises:
        ValueError: The file's features are of another origin, or it is no such file.
    """
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                found, features = file.metadata() or {}, file.get_tensor("features")
        except SafetensorError as error:
            raise ValueError(f"{path} does not hold features: {error}") from None
        if others := [name for name in origin if found.get(name) != origin[name]]:
            raise ValueError(f"{path} does not fit this run's {' and '.join(others)}: choose another folder")
        return features
    features = compute().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({"features": features}, unfinished, metadata=dict(origin))
    os.replace(unfinished, path)  # never half a file
    return features


def digest(of: nn.Module | Mapping[str, Tensor]) -> str:
    """A hash of a module's weights, or of named tensors: of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted((of.state_dict() if isinstance(of, nn.Module) else of).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy())
    return found.hexdigest()

"""A model of transformers -> one of this package that has the very same parameters: nothing is copied.

An optimizer's step, an adapter or a freeze on either is seen by both, and `.to()` moves both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from qwen_batched.arguments import shown
from qwen_batched.checkpoint.config import QwenVLConfig
from qwen_batched.checkpoint.folder import CONFIG_FILE, Checkpoint
from qwen_batched.checkpoint.keys import TEXT_PREFIX, VISION_PREFIX, KeyLayout
from qwen_batched.checkpoint.weights import build_on_meta
from qwen_batched.families import family_of
from qwen_batched.linear.fused import pack
from qwen_batched.linear.padded import PaddedLinear
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.training.pretrained import PreTrainedModel

if TYPE_CHECKING:  # which imports torchvision, where it is broken too
    from transformers import ProcessorMixin

M = TypeVar("M", bound=nn.Module)
Make = Callable[[QwenVLConfig, TensorProcessor, Checkpoint, bool], M]
# Layers that may be wrapped, by an adapter for one: they are called with their input alone.
WRAPPED = (nn.Linear, nn.Embedding)


def share_weights(make: Make[M], theirs: nn.Module, source: ProcessorMixin | str | Path, **options: Any) -> M:
    """What `make` makes of a config, a processor, a checkpoint and whether there is a head, with `theirs`' parameters.

    See `ClientMethods.from_transformers`; `options` are `TensorProcessor.from_checkpoint`'s.
    """
    base = theirs.get_base_model() if hasattr(theirs, "get_base_model") else theirs
    if not isinstance(base, PreTrainedModel) or hasattr(base, "has_tied_head"):
        raise TypeError(f"from_transformers takes a model of transformers or peft, got a {type(theirs).__name__}")
    raw = json.loads(json.dumps(base.config.to_dict(), default=str))
    family = family_of(raw.get("model_type"))
    modules = {_module_name(family.keys, name): module for name, module in base.named_modules()}
    config, has_head = family.read_config(raw), modules.get("lm_head") is not None
    if has_head:
        config.tie_word_embeddings = _leaf(modules["lm_head"]) is _leaf(modules["model.embed_tokens"])
    with tempfile.TemporaryDirectory(prefix="qwen_batched_") as folder:
        checkpoint = _open(source, raw, base, Path(folder))
        processor = TensorProcessor.from_checkpoint(checkpoint, **options)
    model = build_on_meta(lambda: make(config, processor, checkpoint, has_head), "the model's config")
    _check_names(model, base, family.keys)
    shared = {"lm_head"} if config.tie_word_embeddings else set()
    for path, module in list(model.named_modules()):
        if module._parameters and path not in shared:
            _share(model, path, module, modules.get(path))
    if has_head and config.tie_word_embeddings:
        _share(model, "lm_head", model.lm_head, modules["lm_head"])
    model.shares_weights = True
    model.name_or_path = model.config.name_or_path = str(base.name_or_path)
    for layer in model.modules():
        if isinstance(layer, PaddedLinear):
            layer.keep_contiguous()  # packed, it has other strides than their model's code and files expect
    pack(model)
    return model.train(theirs.training)


def _share(model: nn.Module, path: str, ours: nn.Module, theirs: nn.Module | None) -> None:
    """Puts the parameters of their module into ours, or, where theirs is wrapped, their module in place of ours."""
    if theirs is None:
        raise ValueError(f"the model of transformers has no {path}")
    for leaf, own in list(ours._parameters.items()):
        if own is None:
            continue
        found = theirs._parameters.get(leaf)
        if found is None:
            if not isinstance(ours, WRAPPED):
                raise ValueError(f"{path} must be plain or a wrapped linear layer or embedding, got {shown(theirs)}")
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, theirs)
            return
        if type(found) is not nn.Parameter or not found.is_floating_point() or found.is_meta:
            kind = f"{type(found).__name__} of {found.dtype} on {found.device}"
            raise ValueError(f"{path}.{leaf} must be a plain parameter of a floating dtype in memory, got a {kind}")
        if found.shape != own.shape:
            raise ValueError(f"{path}.{leaf} must have shape {tuple(own.shape)}, got {tuple(found.shape)}")
        setattr(ours, leaf, found)


def _check_names(model: nn.Module, base: nn.Module, keys: KeyLayout) -> None:
    """Raises `ValueError` where their model has layers that ours would leave out."""
    own = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    parts = (VISION_PREFIX, TEXT_PREFIX)  # a head of its own is its business
    names = (keys.module_name(name) for name, _ in base.named_parameters())
    unknown = [n for n in names if n.startswith(parts) and not any(n.startswith(f"{o}.") for o in own)]
    if unknown:
        raise ValueError(f"the model of transformers has parameters that are unknown here: {shown(unknown[:5])}")


def _module_name(keys: KeyLayout, name: str) -> str:
    return keys.module_name(f"{name}.").removesuffix(".")


def _leaf(module: nn.Module) -> object:
    """The weight inside of a layer, wrapped or not."""
    while (inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None)) is not None:
        module = inner
    return module._parameters.get("weight")


def _open(source: ProcessorMixin | str | Path, raw: dict[str, Any], base: nn.Module, folder: Path) -> Checkpoint:
    """The checkpoint that `source` is, or is written to `folder`, with the model's own config."""
    if isinstance(source, str | Path):
        return replace(Checkpoint.open(source, weights=False), config=raw)
    from transformers import ProcessorMixin

    if not isinstance(source, ProcessorMixin):
        raise TypeError(f"processor must be transformers' or a checkpoint's name, got a {type(source).__name__}")
    source.save_pretrained(str(folder))
    (folder / CONFIG_FILE).write_text(json.dumps(raw), encoding="utf-8")
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(str(folder))
    return Checkpoint.open(folder, weights=False)

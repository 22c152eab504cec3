"""A model -> a checkpoint's folder: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_batched.checkpoint.atomic_save import replacing
from qwen_batched.checkpoint.folder import CONFIG_FILE, is_checkpoint_file, warn_of_adapter
from qwen_batched.checkpoint.keys import EMBEDDING_NAME
from qwen_batched.checkpoint.options import SaveOptions, read_options
from qwen_batched.checkpoint.weights import save_weights, whole_tensors
from qwen_batched.model.client_methods import ClientMethods


class Savable(ClientMethods):
    """A model with the `processor` and the `checkpoint` that it was loaded with."""

    def save_pretrained(
        self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None, **options: Any
    ) -> None:
        """Writes a folder that transformers, vLLM and `from_pretrained` load: all of it, or nothing.

        Everything is written beside what the folder holds, then renamed: the disk needs room for both. After a kill
        `from_pretrained` finds the old checkpoint or the new one. Files of an old checkpoint that are not written are
        removed; files that are no part of a checkpoint stay.

        Where merging an adapter has parted a tied head from its embedding, an untied checkpoint.

        Args:
            folder: Is made where there is none. Links in it are replaced; what they lead to stays as it is.
            state_dict: The whole tensors of a sharded model, as gathered by accelerate or `get_model_state_dict`; None
                for the model's own.
            **options: `is_main_process`, `max_shard_size` and `safe_serialization` (True) as in transformers.

        Raises:
            TypeError: An option is unknown.
            ValueError: The output projection was left out, and transformers would put random weights in its place. Or
                tensors are missing, unknown, of another shape, or sharded. Or the folder's name is empty or a file's.
            OSError: The disk is full, or a file cannot be written; it is named. The folder is as before.
        """
        chosen = read_options(SaveOptions, options, "save_pretrained")
        if not chosen.is_main_process:
            return
        if not (self.has_lm_head or self.config.tie_word_embeddings):
            lost = "its checkpoint would lack lm_head.weight"
            raise ValueError(f"a model loaded with lm_head=False cannot be saved: {lost}")
        tied = self.lm_head is None or self.has_tied_head
        config = replace(self.config.shape, tie_word_embeddings=tied)
        tensors = whole_tensors(
            self.state_dict() if state_dict is None else state_dict,
            lambda: type(self)(config, self.processor, self.checkpoint, self.has_lm_head),
        )
        image = self.processor.image
        checkpoint = self.checkpoint.describing(config, tensors[EMBEDDING_NAME].dtype, image, self.config.changes())
        with replacing(folder, stale=is_checkpoint_file, last=CONFIG_FILE) as staged:
            checkpoint.write(staged)
            named = {self.family.keys.saved_name(name): x for name, x in tensors.items()}
            save_weights(named, staged, chosen.max_shard_size)
        warn_of_adapter(Path(folder))

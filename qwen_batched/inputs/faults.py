"""What is wrong with a batch, by sample: refused where the host can see it, otherwise made safe, to become NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qwen_batched.inputs.batch import Batch
from qwen_batched.inputs.sequence import NO_LABEL

Faults = Mapping[str, Tensor]  # bool (B,), True for the samples at fault, by what would be right


def find_label_faults(labels: Tensor, attention_mask: Tensor, rows: int) -> dict[str, Tensor]:
    """Of labels (B, S), for an embedding of so many rows."""
    is_label = labels != NO_LABEL
    return {
        f"labels of {NO_LABEL} or from 0 to {rows - 1}": (is_label & ((labels < 0) | (labels >= rows))).any(dim=1),
        "labels on tokens only, not on padding": (is_label & ~attention_mask).any(dim=1),
    }


def refuse(what: str, found: Faults) -> None:
    """Raises `ValueError` for the first fault of any sample; reads the values."""
    for right, bad_B in found.items():
        if bad_B.any():
            raise ValueError(f"{what} must hold {right}, got others for sample {int(bad_B.int().argmax())}")


def make_safe(batch: Batch, found: Faults, of_labels: Faults, rows: int, features: int) -> Batch:
    """A batch whose every index may be looked up, in an embedding of `rows` and among so many `features`.

    `valid` is False for the samples at fault, `labels_valid` for these and those whose labels are: hidden states and
    loss shall be NaN then.
    """
    valid, labels = ~torch.stack([*found.values()]).any(dim=0), batch.labels
    if labels is not None:
        labels = labels.clamp(0, rows - 1).where(labels != NO_LABEL, NO_LABEL)
    ids = batch.input_ids
    return replace(
        batch,
        input_ids=None if ids is None else ids.clamp(0, rows - 1),
        feature_index=batch.feature_index.clamp(-1, features - 1),
        labels=labels,
        valid=valid,
        labels_valid=None if labels is None else ~torch.stack([~valid, *of_labels.values()]).any(dim=0),
        is_checked=True,
    )

"""What tests of single modules share."""

import pytest
import torch
from torch import nn


@pytest.fixture
def always_packed(monkeypatch):
    """The CPU packs where a GPU would: modules take their parameters for a GPU's."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture(scope="session")
def load(checkpoint):
    """Loads the tiny checkpoint each time: loading packs."""
    from qwen_batched import QwenBatchedVL  # not with this file, which pytest may load before it is configured

    return lambda **options: QwenBatchedVL.from_pretrained(checkpoint, **{"device": "cpu", **options})

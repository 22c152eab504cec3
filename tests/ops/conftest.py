"""Where kernels run, and memory that shows what they leave out."""

import math

import pytest
import torch


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32), id="interpreter-float32"),
        pytest.param(("cuda", torch.float32), id="cuda-float32", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    ]
)
def where(request):
    """Device and dtype."""
    if request.param[0] == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    return request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel was to fill and did not is NaN."""

    def poisoning(allocate):
        def filled(*args, **options):
            out = allocate(*args, **options)
            return out.fill_(math.nan) if out.dtype.is_floating_point else out

        return filled

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))

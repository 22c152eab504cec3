"""The Triton kernel that expands prompts gives what the reference gives, to the last integer."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_batched.ops import reference
from qwen_batched.ops.reference import NO_TOKEN

kernels = pytest.importorskip("qwen_batched.ops.triton.expand_prompts", reason="needs Triton")

IMAGE, PAD = 151655, 3
FIELDS = "input_ids", "attention_mask", "position_ids", "camera_ids", "feature_index"


def make_case(batch, cameras, longest_text, largest_side, masked, seed):
    """Prompts with an image token for each present camera and random text between them, grids and mask."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    grids = numbers(1, largest_side + 1, cameras, 2)
    mask = numbers(0, 2, batch, cameras).bool() if masked else None
    present = mask.sum(1).tolist() if masked else [cameras] * batch
    rows = []
    for images in present:
        texts = [numbers(10, 151643, int(numbers(0, longest_text + 1, 1))).tolist() for _ in range(images + 1)]
        rows.append([token for text in texts[:-1] for token in [*text, IMAGE]] + texts[-1])
    width = max(1, *map(len, rows), 1)
    prompts = torch.tensor([row + [NO_TOKEN] * (width - len(row)) for row in rows])
    cells = grids.prod(1) if cameras else torch.zeros(0, dtype=torch.int64)
    here = mask if masked else torch.ones(batch, cameras, dtype=torch.bool)
    lengths = [len(row) - n + int(cells[one].sum()) for row, n, one in zip(rows, present, here, strict=True)]
    return prompts, grids, mask, lengths


def assert_equals_the_reference(case, left, slack, device):
    prompts, grids, mask, lengths = case
    length = max(1, *lengths, 1) + slack
    how = (IMAGE, PAD, length, left)
    expected = reference.expand_prompts(prompts, grids, mask, *how)
    on_device = [None if x is None else x.to(device) for x in (prompts, grids, mask)]
    for name, ours, theirs in zip(FIELDS, kernels.expand_prompts(*on_device, *how), expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours.cpu(), theirs), name


@given(
    batch=st.integers(1, 3),
    cameras=st.integers(0, 5),
    longest_text=st.integers(0, 9),
    largest_side=st.integers(1, 5),
    masked=st.booleans(),
    left=st.booleans(),
    slack=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_expanded_prompts_equal_the_reference(
    device, batch, cameras, longest_text, largest_side, masked, left, slack, seed
):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    case = make_case(batch, cameras, longest_text, largest_side, masked, seed)
    assert_equals_the_reference(case, left, slack, device)


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    ("batch", "cameras", "longest_text"),
    [
        (2, 0, 70),
        (1, 3, 80),
        (2, 9, 3),
        *(pytest.param(*of, marks=pytest.mark.gpu) for of in [(17, 2, 20), (33, 0, 70)]),
    ],
)
def test_more_than_a_block_of_samples_tokens_and_places(batch, cameras, longest_text, left, device):
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    for masked in (True, False):
        case = make_case(batch, cameras, longest_text, 9, masked, seed=batch)
        assert_equals_the_reference(case, left, 1, device)


def test_no_samples_are_no_sequences():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    nothing = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), None
    out = kernels.expand_prompts(*nothing, IMAGE, PAD, 5, True)
    assert [x.shape for x in out] == [(0, 5), (0, 5), (3, 0, 5), (0, 5), (0, 5)]

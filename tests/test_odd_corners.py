"""Corners where a good call once went wrong; each was found by attacking the package, and stays found."""

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer

from qwen_batched import QwenBatchedVL, TensorProcessor, ops
from qwen_batched.testing import write_checkpoint
from tests.support import photos

TEXTS = ["Pick up the red block.", "Go."]


def test_a_tokenizer_saved_with_truncation_or_padding_neither_cuts_nor_pads(tmp_path, checkpoint):
    folder = write_checkpoint(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer("hello", truncation=True, padding="max_length", max_length=16)
    tokenizer.save_pretrained(folder)
    for text in ("pick up the cup " * 20, "hi"):
        ids = [TensorProcessor.from_pretrained(where)(None, [text])["input_ids"] for where in (folder, checkpoint)]
        assert torch.equal(*ids)


@pytest.mark.parametrize("options", [{"temperature": 1e-39}, {"temperature": 1.0, "top_p": 1e-46}])
def test_any_allowed_temperature_and_top_p_draw_a_token(model, options):
    greedy = model.generate(None, TEXTS, max_new_tokens=3)
    drawn = model.generate(None, TEXTS, max_new_tokens=3, seed=0, **options)
    assert all(torch.equal(*pair) for pair in zip(greedy.token_ids, drawn.token_ids, strict=True))


def test_grids_of_one_cell_and_masks_do_not_share_a_table(model):
    images = photos(2, 2, 28, 28).to(model.device)
    mask = torch.ones(2, 2, dtype=torch.bool)
    for _ in range(2):
        alone, masked = model(images, TEXTS), model(images, TEXTS, camera_mask=mask)
        assert torch.equal(alone.last_hidden_state, masked.last_hidden_state)


def test_generate_works_under_autocast(model):
    images = photos(2, 1, 56, 56).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        assert len(model.generate(images, TEXTS, max_new_tokens=3).texts) == 2


def test_a_saved_folder_holds_the_tokenizer_files_byte_for_byte(tmp_path, checkpoint):
    """One version of transformers does not read what another writes."""
    QwenBatchedVL.from_pretrained(checkpoint, device="cpu").save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_processor_downloads_no_weights(monkeypatch, checkpoint):
    asked = []

    def download(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    TensorProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)


def test_a_default_device_set_once_leaves_no_trace_in_resizing(checkpoint):
    processor, frames = TensorProcessor.from_pretrained(checkpoint), photos(1, 1, 61, 97)
    with torch.device("meta"):
        under = processor(frames)["pixel_values"]
    assert torch.equal(under, processor(frames)["pixel_values"])


@pytest.mark.gpu
def test_a_device_without_an_index_is_the_current_one(checkpoint):
    processor, frames = TensorProcessor.from_pretrained(checkpoint), photos(1, 1, 56, 84).cuda()
    assert torch.equal(processor(frames, device="cuda")["pixel_values"], processor(frames)["pixel_values"])


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_refused_by_value_error(checkpoint, device):
    with pytest.raises(ValueError, match="device"):
        QwenBatchedVL.from_pretrained(checkpoint, device=device)


def test_more_new_tokens_than_fit_are_refused_before_a_frame_is_touched(model, monkeypatch):
    touched = []
    frames_to_patches = ops.frames_to_patches
    monkeypatch.setattr(ops, "frames_to_patches", lambda *a, **k: touched.append(1) or frames_to_patches(*a, **k))
    images = photos(2, 1, 56, 56).to(model.device)
    with pytest.raises(ValueError, match="max_new_tokens=5000"):
        model.generate(images, TEXTS, max_new_tokens=5000)
    assert not touched
    model.generate(images, TEXTS, max_new_tokens=1)
    assert touched

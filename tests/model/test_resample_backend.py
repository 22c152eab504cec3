"""uint8 frames on a CPU equal the image processor of transformers that was chosen, by default its own choice."""

import copy
import functools
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoImageProcessor

from qwen_batched import QwenBatchedVL, TensorProcessor, transformers_reference
from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.inputs import resample_backend
from qwen_batched.inputs.resample_backend import resolve_resample_backend
from tests.support import noise

# Where the two libraries round most values of these frames differently.
SIZE = (480, 640)
FRAMES = noise(2, 1, *SIZE)
ONE_STEP = 1 / 255 / 0.28  # of a whole number, after normalisation


@pytest.fixture
def installed(monkeypatch):
    """Makes torchvision look installed or not."""
    return lambda there: monkeypatch.setattr(resample_backend, "is_torchvision_available", lambda: there)


def raw(processor, frames, **options):
    """The whole numbers that the model sees of frames (B, 1, 3, H, W), in window order."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image.image_mean, processor.image.image_std))
    patches = processor(frames, None, **options)["pixel_values"].unflatten(-1, (3, 2, -1))
    return ((patches * std + mean) * 255).round()


# release of transformers, class that the checkpoint names -> the default where torchvision is installed
CHOICES = {
    ("4.51.3", "Qwen2VLImageProcessor"): "pillow",
    ("4.51.3", "Qwen2VLImageProcessorFast"): "torchvision",
    ("4.51.3", None): "pillow",
    ("4.53.3", "Qwen2VLImageProcessor"): "pillow",
    ("4.54.0", "Qwen2VLImageProcessor"): "torchvision",
    ("4.57.3", "Qwen2VLImageProcessor"): "torchvision",
    ("4.57.3", "Qwen2VLImageProcessorFast"): "torchvision",
    ("4.57.3", "Qwen2_5_VLImageProcessor"): "pillow",
    ("4.57.3", None): "pillow",
    ("5.0.0", "Qwen2VLImageProcessor"): "torchvision",
    ("5.3.0", "Qwen2VLImageProcessorFast"): "torchvision",
    ("5.3.0", None): "pillow",
    ("5.4.0", None): "torchvision",
    ("5.23.0", "Qwen2VLImageProcessor"): "torchvision",
    ("5.23.0", "Qwen2VLImageProcessorPil"): "torchvision",
    ("6.0.0.dev0", "Qwen2VLImageProcessor"): "torchvision",
}


@pytest.mark.parametrize(("release", "name"), CHOICES, ids=str)
def test_the_default_is_that_of_the_transformers_release(installed, release, name):
    installed(True)
    assert resolve_resample_backend(None, name, FAMILY.image_processor, release) == CHOICES[release, name]
    installed(False)
    assert resolve_resample_backend(None, name, FAMILY.image_processor, release) == "pillow"


@pytest.mark.parametrize("name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", None])
def test_the_default_is_what_transformers_uses_on_this_machine(checkpoint, tmp_path, name):
    path = checkpoint / "preprocessor_config.json"
    shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads(path.read_text()) | {"image_processor_type": name}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "copy" / path.name).write_text(json.dumps(config))
    theirs = transformers_reference._resample_backend(AutoImageProcessor.from_pretrained(tmp_path / "copy"))
    assert TensorProcessor.from_pretrained(tmp_path / "copy").resample_backend == theirs


def test_the_choice_is_made_when_the_processor_is_and_stays(checkpoint, installed):
    for there, backend, other in ((True, "torchvision", False), (False, "pillow", True)):
        installed(there)
        processor = TensorProcessor.from_pretrained(checkpoint)
        assert processor.resample_backend == backend
        installed(other)
        assert processor.resample_backend == backend
        assert pickle.loads(pickle.dumps(processor)).resample_backend == backend
        assert copy.deepcopy(processor).resample_backend == backend
        again = TensorProcessor(processor.config, processor.image, processor.prompts)
        assert again.resample_backend != backend
        assert torch.equal(raw(processor, FRAMES), raw(made(checkpoint, backend), FRAMES))


def made(checkpoint, backend):
    return TensorProcessor.from_pretrained(checkpoint, resample_backend=backend)


@pytest.mark.parametrize("there", [True, False])
def test_what_is_asked_for_is_taken_whatever_is_installed(checkpoint, installed, there):
    installed(there)
    for backend in ("pillow", "torchvision"):
        assert made(checkpoint, backend).resample_backend == backend
        model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu", resample_backend=backend)
        assert model.processor.resample_backend == backend


@pytest.mark.parametrize("unknown", ["pil", "Pillow", "", 0, True, ["pillow"]])
def test_an_unknown_backend_is_refused_at_loading_and_when_assigned(checkpoint, unknown):
    for load in (TensorProcessor.from_pretrained, QwenBatchedVL.from_pretrained):
        with pytest.raises(ValueError, match=r"resample_backend must be one of .*pillow.*torchvision"):
            load(checkpoint, resample_backend=unknown)
    processor = made(checkpoint, None)
    processor.resample_backend = unknown
    with pytest.raises(ValueError, match="resample_backend"):
        processor(FRAMES, None)


def test_an_assigned_backend_is_used_from_the_next_call_on(checkpoint):
    processor = made(checkpoint, "pillow")
    pillow = raw(processor, FRAMES)
    processor.resample_backend = "torchvision"
    torchvision = raw(processor, FRAMES)
    processor.resample_backend = "pillow"
    assert torch.equal(raw(processor, FRAMES), pillow)
    assert torch.equal(torchvision, raw(made(checkpoint, "torchvision"), FRAMES))
    assert (pillow != torchvision).float().mean() > 0.1


side = st.integers(28, 130)


@settings(max_examples=30, deadline=None)
@given(
    source=st.tuples(side, side), target=st.tuples(*[st.sampled_from([28, 56, 84, 112])] * 2), seed=st.integers(0, 9)
)
def test_torchvisions_pixels_are_those_of_pytorchs_kernel(checkpoint, source, target, seed):
    frames = noise(2, 1, *source, seed=seed)
    expected = F.interpolate(frames.flatten(0, 1), target, mode="bicubic", antialias=True)
    already_resized = made_once(checkpoint)(expected.unflatten(0, (2, 1)), None, resize=None)
    ours = made_once(checkpoint)(frames, None, resize=target)
    assert torch.equal(ours["pixel_values"], already_resized["pixel_values"])


@functools.cache
def made_once(checkpoint):
    return made(checkpoint, "torchvision")


@pytest.mark.parametrize("size", [(480, 640), (97, 31), (240, 320), (300, 300), (50, 40)], ids=str)
@pytest.mark.parametrize("backend", ["pillow", "torchvision"])
def test_uint8_frames_equal_the_image_processor_of_that_library(checkpoint, backend, size):
    if backend == "torchvision":
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    theirs = transformers_reference._image_processor(checkpoint, backend)
    assert transformers_reference._resample_backend(theirs) == backend
    frame, processor = noise(1, 1, *size), made(checkpoint, backend)
    expected = theirs(images=[frame[0, 0].permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
    batch = processor(frame, None)
    cells = batch["pixel_values"][0, 0].unflatten(0, (-1, 4))
    ours = cells.index_select(0, batch["raster_order"][0].flatten()).flatten(0, 1)
    assert (ours - expected).abs().max() < ONE_STEP / 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_frames_are_never_rounded(checkpoint, dtype):
    frames = torch.rand(1, 1, 3, 90, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    pillow, torchvision = (made(checkpoint, backend)(frames, None) for backend in ("pillow", "torchvision"))
    assert torch.equal(pillow["pixel_values"], torchvision["pixel_values"])
    values = pillow["pixel_values"].unflatten(-1, (3, 2, -1)) / ONE_STEP
    assert not torch.allclose(values, values.round(), atol=0.1)


@pytest.mark.gpu
def test_frames_on_a_gpu_do_not_depend_on_it(checkpoint):
    pillow, torchvision = (made(checkpoint, backend)(FRAMES.cuda(), None) for backend in ("pillow", "torchvision"))
    assert torch.equal(pillow["pixel_values"], torchvision["pixel_values"])


@pytest.mark.slow
def test_a_torchvision_that_cannot_be_imported_is_chosen_as_by_transformers_and_not_needed(checkpoint, tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
from qwen_batched import QwenBatchedVL
model = QwenBatchedVL.from_pretrained({str(checkpoint)!r}, device="cpu")
model(torch.zeros(1, 1, 3, 40, 50, dtype=torch.uint8), ["Go."])
print(model.processor.resample_backend, "torchvision" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    default = resolve_with_torchvision()
    assert done.stdout.split() == [default, "False"]


def resolve_with_torchvision():
    return "torchvision" if Version(transformers.__version__).release >= (4, 54) else "pillow"

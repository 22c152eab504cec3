"""Features from disk: a row at random, a batch joined with them, a training step that does without the tower."""

import pickle

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from qwen_batched.extract import main
from qwen_batched.extraction import FeatureDataset
from qwen_batched.extraction.picture import main as draw
from qwen_batched.extraction.reading import ShardReader
from qwen_batched.integrations.lerobot import from_lerobot
from qwen_batched.testing import write_checkpoint
from tests.extraction import written
from tests.extraction.test_extraction import LENGTHS, frames_of
from tests.extraction.written import TASKS, arguments
from tests.support import assert_equal_to

PLACES = [(2, 8), (0, 0), (1, 4), (0, 6)]


def batch_of(places):
    """As LeRobot's loader gives it, but for what is not looked at."""
    episodes, frames = (torch.tensor(values) for values in zip(*places, strict=True))
    return {"episode_index": episodes, "frame_index": frames, "task": [TASKS[e % 2] for e, _ in places]}


def rows_of(places):
    return [sum(LENGTHS[:episode]) + frame for episode, frame in places]


def test_an_item_has_the_frame_that_it_says(extracted, lerobot, load):
    data, model, frames = FeatureDataset(extracted), load(), frames_of(lerobot)
    assert len(data) == sum(LENGTHS) and data.cameras == ("front", "wrist") and data.episodes == [0, 1, 2]
    for index, (episode, frame) in enumerate((e, i) for e, length in enumerate(LENGTHS) for i in range(length)):
        item = data[index]
        assert (item["episode"], item["frame"]) == (episode, frame) and data.position(episode, frame) == index
        assert abs(item["timestamp"] - frame / 10) < 1e-6
    with torch.no_grad():
        found = model.encode_images([camera[8:12] for camera in frames])
    for x, y in zip(data[9]["image_features"], found, strict=True):
        assert torch.equal(x, y[1])
    assert data[-1]["frame"] == 8 and data[9]["last"].shape == (len(data[9]["last.mask"]), model.config.hidden_size)
    with pytest.raises(IndexError):
        data[sum(LENGTHS)]
    for place in ((0, 7), (0, 2**32), (1, -(2**32)), (1, -1), (3, 0), ("0", 0)):  # the second is no frame of episode 1
        with pytest.raises(KeyError, match=f"frame {place[1]} of episode {place[0]}"):
            data.position(*place)
    assert data[torch.tensor(3)]["frame"] == 3
    for wrong in (1.5, "0", slice(0, 2)):
        with pytest.raises(TypeError):
            data[wrong]
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["last"], data[3]["last"])


def test_a_training_step_on_cached_features_is_that_of_frames(extracted, lerobot, load):
    data, frames, targets = FeatureDataset(extracted), frames_of(lerobot), ["yes", "no", "up", "no, later"]
    losses, gradients = [], []
    for given in ("frames", "features"):
        model = load()
        model.visual.requires_grad_(False)
        batch = batch_of(PLACES)
        arguments = data.features_for(batch)
        if given == "frames":
            arguments = {"images": [camera[rows_of(PLACES)] for camera in frames], "texts": batch["task"]}
        loss = model(**arguments, targets=targets).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.model.parameters()])
    assert_equal_to(losses[1][None], losses[0][None])
    for x, y in zip(*gradients, strict=True):
        assert_equal_to(x, y)


IMAGES = "observation.images."
ABSENT = torch.tensor([[False], [True], [False], [True]])
PADDED = {
    "nothing": ({}, {}),
    "a frame of a policy's steps": ({f"{IMAGES}front_is_pad": ABSENT}, {}),
    "frames of two cameras": ({f"{IMAGES}front_is_pad": ABSENT[:, 0], f"{IMAGES}wrist_padding_mask": ABSENT}, {}),
    "a camera that the batch lacks": ({f"{IMAGES}front": None}, {}),
    "a camera that the extraction lacks": ({}, {"cameras": ["wrist", "head", f"{IMAGES}front"]}),
    "one camera of two": ({f"{IMAGES}wrist_padding_mask": ABSENT}, {"cameras": ["wrist"]}),
    "what is said beside the batch": ({f"{IMAGES}front_is_pad": ABSENT}, {"image_masks": {"front": ABSENT.flip(0)}}),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_is_padding_of_frames_is_masked_of_features(extracted, lerobot, load, name):
    """Hidden states are those of `from_lerobot` with the same batch, whether features_for sees its frames or not."""
    changes, options = PADDED[name]
    data, model, frames = FeatureDataset(extracted), load(), frames_of(lerobot)
    images = {IMAGES + camera: x[rows_of(PLACES)] for camera, x in zip(("front", "wrist"), frames, strict=True)}
    batch = {key: x for key, x in (batch_of(PLACES) | images | changes).items() if x is not None}
    with torch.no_grad():
        want = model(**from_lerobot(batch, **({"cameras": data.cameras} | options)))
        for given in (batch, {key: x for key, x in batch.items() if key not in images or "lacks" in name}):
            found = data.features_for(given, **options)
            assert (found["camera_mask"] is None) == (name == "nothing") and found["images"] is None
            out = model(**found)
            assert torch.equal(out.attention_mask, want.attention_mask)
            kept = out.attention_mask
            assert_equal_to(out.last_hidden_state[kept], want.last_hidden_state[kept])


def test_absent_cameras_have_zeros_at_every_level_of_deep_features(lerobot, tmp_path):
    model = write_checkpoint(tmp_path / "model", "qwen3-vl-tiny")
    resize = ("--cameras", "wrist", "--resize", "64x64")
    assert main(arguments(lerobot, tmp_path / "out", model, *resize)) == 0
    data = FeatureDataset(tmp_path / "out")
    found = data.features_for(batch_of(PLACES), ["front", "wrist"])
    alone = data.features_for(batch_of(PLACES))
    assert alone["camera_mask"] is None and found["camera_mask"].tolist() == [[False, True]] * 4
    maps = [found["image_features"].main, *found["image_features"].deep]
    for x, y in zip(maps, [alone["image_features"].main, *alone["image_features"].deep], strict=True):
        assert torch.equal(x[:, 1], y[:, 0]) and not x[:, 0].any() and x.shape[1] == 2
    assert len(maps) > 1


def test_a_camera_without_a_name_is_masked_by_its_key(checkpoint, tmp_path):
    root = written.write_v3(tmp_path / "data", (3,), ("image",), ((28, 56),), files=1)
    for file in (*root.rglob("*.json"), *root.rglob("file-*.parquet")):
        rename_camera(file)
    assert main(arguments(root, tmp_path / "out", checkpoint)) == 0
    data, batch = FeatureDataset(tmp_path / "out"), batch_of([(0, 0), (0, 2)])
    assert data.cameras == ("image",)
    for cameras in (None, ["image"], ["observation.image"]):
        mask = data.features_for(batch | {"observation.image_is_pad": torch.tensor([True, False])}, cameras)
        assert mask["camera_mask"].tolist() == [[False], [True]]


def rename_camera(file):
    if file.suffix == ".json":
        file.write_text(file.read_text().replace(f"{IMAGES}front", "observation.image"))
    else:
        table = pq.read_table(file)
        names = [name.replace(f"{IMAGES}front", "observation.image") for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)


def test_masks_and_cameras_that_do_not_fit_are_refused(extracted):
    data, good = FeatureDataset(extracted), batch_of(PLACES)
    steps = good | {f"{IMAGES}front_is_pad": torch.zeros(4, 2, dtype=torch.bool)}
    for batch, options, error, message in (
        (steps, {}, ValueError, "one step"),
        (good | {f"{IMAGES}front": torch.zeros(4, 2, 3, 28, 28)}, {}, ValueError, "one step"),
        (good | {f"{IMAGES}front": [None] * 4}, {}, TypeError, "must be a tensor"),
        (good | {f"{IMAGES}front_is_pad": torch.zeros(4)}, {}, ValueError, "bool"),
        (good | {f"{IMAGES}wrist_padding_mask": [True] * 4}, {}, TypeError, "bool tensor"),
        (good, {"cameras": ["head"]}, ValueError, "front, wrist"),
        (good, {"cameras": []}, ValueError, "one or more"),
        (good, {"cameras": ["front", f"{IMAGES}front"]}, ValueError, "different"),
        (good, {"cameras": "front"}, TypeError, "list of str"),
        (good, {"cameras": [1]}, TypeError, "list of str"),
        (good, {"image_masks": {"head": ABSENT}}, ValueError, "image_masks"),
        (good | {f"{IMAGES}head": torch.zeros(4, 3, 28, 28)}, {"cameras": ["front", "head"]}, ValueError, "batch has"),
    ):
        with pytest.raises(error, match=message):
            data.features_for(batch, **options)


def test_a_batch_that_cannot_be_joined_is_refused(extracted, tmp_path, lerobot, checkpoint):
    data, good = FeatureDataset(extracted), batch_of(PLACES)
    with pytest.raises(KeyError, match="frame 9 of episode 2"):
        data.features_for(batch_of([(2, 9)]))
    with pytest.raises(ValueError, match="frame_index"):
        data.features_for({name: x for name, x in good.items() if name != "frame_index"})
    with pytest.raises(ValueError, match="1 tasks"):
        data.features_for(good | {"task": "one"})
    for task in ([], [3] * 4, None, torch.zeros(4)):
        with pytest.raises(TypeError, match="task must be a list of at least one str"):
            data.features_for(good | {"task": task})
    with pytest.raises(TypeError, match="integer"):
        data.features_for(good | {"frame_index": torch.zeros(4)})
    with pytest.raises(ValueError, match="must be an extraction's folder"):
        FeatureDataset(tmp_path)
    pooled = tmp_path / "pooled"
    assert main(arguments(lerobot, pooled, checkpoint, "--pool", "mean", "--limit", 9)) == 0
    assert len(FeatureDataset(pooled)) == 9 and FeatureDataset(pooled)[0]["image_features"].shape[0] == 2
    with pytest.raises(ValueError, match="not pooled"):
        FeatureDataset(pooled).features_for(good)
    assert draw([str(pooled), str(tmp_path / "a.png")]) == 2


@pytest.mark.parametrize("header", [b"", b"\2" + bytes(7) + b"13", b"\2" + bytes(7) + b"{}", b"\xff" * 9, "cut"])
def test_a_damaged_shard_is_named(header, extracted, tmp_path):
    path = tmp_path / "part-00000.safetensors"
    whole = (extracted / "features/last/part-00000.safetensors").read_bytes()
    path.write_bytes(whole[:-1] if header == "cut" else header)
    with pytest.raises(ValueError, match=f"{path} is not a shard that can be read"):
        ShardReader(path)


def test_an_episode_is_drawn(extracted, tmp_path, capsys):
    picture = tmp_path / "episode.png"
    assert draw([str(extracted), str(picture), "--episode", "2", "--camera", "wrist", "--frames", "5"]) == 0
    assert len(Image.open(picture).convert("RGB").getcolors(2**16)) > 20
    for wrong in (["--camera", "head"], ["--episode", "9"], ["--frames", "0"]):
        assert draw([str(extracted), str(picture), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

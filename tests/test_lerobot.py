"""A batch in LeRobot's form gives what the same frames and texts give when they are passed by hand."""

import pytest
import torch

from qwen_batched.integrations.lerobot import from_lerobot
from tests.support import photos

CAMERAS = ["front", "wrist"]
TEXTS = ["pick up the red block", "stop"]


def make_batch(**changes):
    front, wrist = (photos(2, 1, 56, 84)[:, 0].float() / 255, photos(2, 1, 56, 84)[:, 0].flip(-1).float() / 255)
    batch = {
        "observation.images.front": front,
        "observation.images.wrist": wrist,
        "observation.state": torch.zeros(2, 6),
        "action": torch.zeros(2, 6),
        "task": TEXTS,
        "task_index": torch.tensor([0, 1]),
    }
    return {key: value for key, value in (batch | changes).items() if value is not None}


def test_cameras_are_stacked_in_the_order_asked_for():
    batch = make_batch()
    found = from_lerobot(batch, ["front", "wrist"])
    assert set(found) == {"images", "texts", "camera_mask"}
    front, wrist = batch["observation.images.front"], batch["observation.images.wrist"]
    assert torch.equal(found["images"], torch.stack([front, wrist], 1))
    assert found["texts"] == TEXTS and found["camera_mask"] is None
    assert torch.equal(from_lerobot(batch, ["wrist", "front"])["images"], torch.stack([wrist, front], 1))
    assert torch.equal(from_lerobot(batch, ["observation.images.wrist"])["images"], wrist[:, None])


def test_a_single_camera_without_a_name_is_found():
    frames = photos(2, 1, 56, 84)[:, 0].float() / 255
    found = from_lerobot({"observation.image": frames, "task": TEXTS}, ["observation.image"])
    assert torch.equal(found["images"], frames[:, None])


def test_cameras_of_different_sizes_stay_a_list():
    wrist = photos(2, 1, 28, 56)[:, 0]
    found = from_lerobot(make_batch(**{"observation.images.wrist": wrist}), CAMERAS)
    assert [tuple(images.shape) for images in found["images"]] == [(2, 3, 56, 84), (2, 3, 28, 56)]


def test_one_observation_step_is_taken_out():
    batch = make_batch()
    with_steps = {key: x[:, None] if key.startswith("observation.images") else x for key, x in batch.items()}
    assert torch.equal(from_lerobot(with_steps, CAMERAS)["images"], from_lerobot(batch, CAMERAS)["images"])


@pytest.mark.parametrize("with_step", [False, True])
def test_a_frame_that_is_padding_is_masked(with_step):
    is_pad = torch.tensor([False, True])
    is_pad = is_pad[:, None] if with_step else is_pad
    for name, mask in (("is_pad", is_pad), ("padding_mask", ~is_pad)):
        found = from_lerobot(make_batch(**{f"observation.images.front_{name}": mask}), CAMERAS)
        assert found["camera_mask"].tolist() == [[True, True], [False, True]]


def test_masks_are_joined_whoever_gives_them():
    batch = make_batch(**{"observation.images.front_is_pad": torch.tensor([False, True])})
    masks = {"wrist": torch.tensor([False, True]), "front": torch.tensor([True, True])}
    assert from_lerobot(batch, CAMERAS, masks)["camera_mask"].tolist() == [[True, False], [False, True]]


def test_a_camera_that_the_batch_lacks_is_absent_for_all():
    found = from_lerobot(make_batch(**{"observation.images.wrist": None}), ["wrist", "front"])
    assert found["images"].shape == (2, 2, 3, 56, 84)
    assert found["camera_mask"].tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("task", [TEXTS[0], "", TEXTS[:1]])
def test_one_observation_is_a_batch_of_one(batched, task):
    """Without the batch dimension, or with the one that LeRobot's robot loop adds to tensors but not to the task."""
    front, wrist = (make_batch()[f"observation.images.{camera}"][:1] for camera in CAMERAS)
    observation = {"observation.images.front": front, "observation.images.wrist": wrist, "task": task}
    if not batched:
        observation = {key: x[0] if isinstance(x, torch.Tensor) else x for key, x in observation.items()}
    found = from_lerobot(observation, CAMERAS)
    assert torch.equal(found["images"], torch.stack([front, wrist], 1)) and found["images"].shape == (1, 2, 3, 56, 84)
    assert found["texts"] == [task if isinstance(task, str) else task[0]] and found["camera_mask"] is None


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_observation_has_masks_without_a_batch_dimension_too(shape):
    observation = {"observation.images.front": make_batch()["observation.images.front"][0], "task": TEXTS[0]}
    no, yes = torch.zeros(shape).bool(), torch.ones(shape).bool()
    assert from_lerobot(observation, CAMERAS)["camera_mask"].tolist() == [[True, False]]
    padded = observation | {"observation.images.front_is_pad": yes}
    assert from_lerobot(padded, ["front"])["camera_mask"].tolist() == [[False]]
    assert from_lerobot(observation, ["front"], {"front": no})["camera_mask"].tolist() == [[False]]


def test_a_batch_of_one_stays_a_batch_of_one():
    batch = {key: x[:1] for key, x in make_batch().items()}
    assert torch.equal(from_lerobot(batch, CAMERAS)["images"], from_lerobot(make_batch(), CAMERAS)["images"][:1])


def test_the_model_takes_one_observation_as_the_robot_gives_it(model):
    batch = make_batch()
    observation = {key: x[0] for key, x in batch.items()}
    with torch.no_grad():
        ours = model(**from_lerobot(observation, CAMERAS))
        expected = model(**from_lerobot({key: x[:1] for key, x in batch.items()}, CAMERAS))
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)


def test_the_model_takes_it(model):
    batch = make_batch(**{"observation.images.wrist_is_pad": torch.tensor([True, False])})
    images = torch.stack([batch["observation.images.front"], batch["observation.images.wrist"]], 1)
    with torch.no_grad():
        ours = model(**from_lerobot(batch, CAMERAS))
        expected = model(images, TEXTS, camera_mask=torch.tensor([[True, False], [True, True]]))
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": None}, ValueError, "must hold 'task'"),
        ({"task": ["one"]}, ValueError, "each of 1 tasks"),
        ({"task": "ab"}, ValueError, "each of 1 tasks.*several samples need a list"),
        ({"task": 3}, TypeError, "list of str"),
        ({"observation.images.wrist": torch.zeros(3, 3, 56, 84)}, ValueError, "each of 2 tasks.*3"),
        ({"observation.images.wrist": torch.zeros(2, 4, 3, 56, 84)}, ValueError, "one step.*got 4 steps"),
        ({"observation.images.wrist": torch.zeros(2, 56, 84)}, ValueError, r"\(2, 56, 84\)"),
        ({"observation.images.wrist": torch.zeros(2, 56, 84, 3)}, ValueError, r"\(2, 56, 84, 3\)"),
        ({"observation.images.wrist": torch.zeros(56, 84)}, ValueError, r"\(56, 84\)"),
        ({"observation.images.wrist": torch.zeros(3, 56, 84)}, ValueError, r"batch dimension.*\(3, 56, 84\)"),
        ({"observation.images.wrist_is_pad": torch.tensor(True)}, ValueError, r"bool \(2,\)"),
        ({"observation.images.wrist": [1, 2]}, TypeError, "wrist must be a tensor"),
        ({"observation.images.wrist_is_pad": torch.zeros(2)}, ValueError, r"bool \(2,\)"),
        ({"observation.images.wrist_is_pad": torch.zeros(3).bool()}, ValueError, r"bool \(2,\)"),
        ({"observation.images.wrist_is_pad": [True, False]}, TypeError, "bool tensor"),
        ({"observation.images.wrist": None, "observation.images.front": None}, ValueError, "at least one of"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        from_lerobot(make_batch(**changes), CAMERAS)


@pytest.mark.parametrize(
    ("cameras", "error"), [("front", TypeError), ([1], TypeError), ([], ValueError), (["front", "front"], ValueError)]
)
def test_cameras_must_be_different_names(cameras, error):
    with pytest.raises(error, match="cameras must be"):
        from_lerobot(make_batch(), cameras)


def test_masks_of_other_cameras_are_refused():
    with pytest.raises(ValueError, match="back"):
        from_lerobot(make_batch(), CAMERAS, {"back": torch.ones(2).bool()})

"""A data set that LeRobot's own package has written, where it is installed."""

import numpy as np
import pytest

from qwen_batched.extraction.sources.opening import open_source
from tests.extraction import written
from tests.extraction.test_sources import expected, numbers


@pytest.mark.slow
def test_every_frame_that_lerobot_has_written_once_at_its_timestamp(tmp_path):
    module = pytest.importorskip("lerobot.datasets.lerobot_dataset", reason="needs LeRobot")
    lengths, root = (7, 5, 9), tmp_path / "data"
    said = {
        f"observation.images.{name}": {"dtype": kind, "shape": (56, 84, 3), "names": ["height", "width", "channels"]}
        for name, kind in (("front", "video"), ("wrist", "image"))
    }
    said["action"] = {"dtype": "float32", "shape": (2,), "names": None}
    data = module.LeRobotDataset.create("test/data", fps=written.FPS, features=said, root=root, use_videos=True)
    for episode, length in enumerate(lengths):
        for index in range(length):
            images = {
                f"observation.images.{name}": written.frame(episode, index, camera)
                for camera, name in enumerate(("front", "wrist"))
            }
            data.add_frame({**images, "action": np.zeros(2, np.float32), "task": written.TASKS[episode % 2]})
        data.save_episode()
    data.finalize()
    source = open_source(str(root))
    assert source.cameras == ("front", "wrist")
    for camera in source.cameras:
        assert numbers(source, camera) == expected(lengths)
    assert [source.texts(episode)[0] for episode in range(3)] == [*written.TASKS, written.TASKS[0]]
    assert np.allclose(source.timestamps(2), np.arange(9) / written.FPS)

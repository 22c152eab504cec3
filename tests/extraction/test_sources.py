"""Data sets of every form: each frame once, at its timestamp; what is damaged or lacking is named."""

import io
import json
import shutil
import struct
import tarfile
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_batched.extraction.sources import opening
from qwen_batched.extraction.sources.opening import open_source
from qwen_batched.extraction.sources.pixels import read_image
from qwen_batched.extraction.sources.source import Damage, Run
from qwen_batched.extraction.sources.video import frame_times, frames_at
from tests.extraction import written

ENCODED = [
    pytest.param(codec, marks=[] if written.has_encoder(codec) else pytest.mark.skip(reason=f"no encoder of {codec}"))
    for codec in written.CODECS
]


def runs_of(source):
    return [Run(place, 0, episode.frames) for place, episode in enumerate(source.episodes)]


def numbers(source, camera, runs=None):
    return [written.read_number(frame) for frame in source.frames(camera, runs or runs_of(source))]


def expected(lengths):
    return [written.number_of(episode, index) for episode, length in enumerate(lengths) for index in range(length)]


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("gop", [2, 250])
def test_every_frame_of_a_lerobot_v3_data_set_once_at_its_timestamp(tmp_path, codec, gop):
    lengths = (7, 5, 9)
    source = open_source(str(written.write_v3(tmp_path, lengths, codec=codec, gop=gop)))
    assert source.form == "lerobot v3.0" and source.cameras == ("front", "wrist")
    assert [(episode.name, episode.frames) for episode in source.episodes] == [(0, 7), (1, 5), (2, 9)]
    for camera in source.cameras:
        assert numbers(source, camera) == expected(lengths)
    times = np.concatenate([source.timestamps(episode) for episode in range(3)])
    assert np.allclose(times, [i / written.FPS for length in lengths for i in range(length)], atol=1e-6)
    assert [source.texts(episode)[0] for episode in range(3)] == [*written.TASKS, written.TASKS[0]]
    middle = [Run(0, 5, 7), Run(1, 0, 3), Run(2, 4, 6), Run(0, 1, 2)]  # across episodes, files, and back
    for camera in source.cameras:
        want = [written.number_of(run.episode, i) for run in middle for i in range(run.start, run.stop)]
        assert numbers(source, camera, middle) == want


def test_every_frame_of_a_lerobot_v2_data_set_once(tmp_path):
    source = open_source(str(written.write_v21(tmp_path, (7, 5))), ["observation.images.wrist"])
    assert source.form == "lerobot v2.1" and source.cameras == ("wrist",)
    assert numbers(source, "wrist") == expected((7, 5))
    assert source.texts(1) == [written.TASKS[1]] * 5


def test_every_image_of_a_folder_once(tmp_path):
    source = open_source(str(written.write_images(tmp_path, (3, 2))))
    assert source.form == "images" and source.cameras == ("image",)
    assert [episode.name for episode in source.episodes] == ["scene0", "scene1"]
    assert numbers(source, "image") == expected((3, 2)) and source.texts(0) is None
    as_cameras = open_source(str(tmp_path), ["scene1"])
    assert as_cameras.cameras == ("scene1",) and [episode.frames for episode in as_cameras.episodes] == [2]


def test_every_frame_of_a_folder_of_videos_once(tmp_path):
    for camera in range(2):
        for episode in range(2):
            frames = (written.frame(episode, i, camera) for i in range(4 + episode))
            written.write_video(tmp_path / f"camera{camera}/take{episode}.mp4", frames)
    source = open_source(str(tmp_path), ["camera1", "camera0"])
    assert source.form == "videos" and [episode.name for episode in source.episodes] == ["take0", "take1"]
    assert numbers(source, "camera1") == numbers(source, "camera0") == expected((4, 5))
    assert np.allclose(source.timestamps(0), np.arange(4) / written.FPS)
    assert [episode.frames for episode in open_source(str(tmp_path)).episodes] == [4, 5, 4, 5]


def test_every_row_of_tables_once(tmp_path):
    source = open_source(str(written.write_parquet(tmp_path / "a", (5, 3))), text_column="caption")
    assert source.form == "parquet" and source.cameras == ("photo",)
    assert numbers(source, "photo") == expected((5, 3))
    assert numbers(source, "photo", [Run(0, 3, 5)]) == [written.number_of(0, 3), written.number_of(0, 4)]
    assert source.texts(1) == ["number 0", "number 1", "number 2"]
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").iterdir():  # as `datasets` saves to disk
        table = pq.read_table(file)
        with pa.ipc.new_stream(tmp_path / "b" / f"{file.stem}.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    source = open_source(str(tmp_path / "b"))
    assert numbers(source, "photo") == expected((5, 3))
    assert numbers(source, "photo", [Run(0, 3, 5)]) == [written.number_of(0, 3), written.number_of(0, 4)]


def test_links_are_followed_once_and_hidden_files_are_none_of_the_data(tmp_path):
    images, data = written.write_images(tmp_path / "images", (3, 2)), tmp_path / "data"
    data.mkdir()
    (data / "first").symlink_to(images / "scene0")
    (data / "second").symlink_to(images / "scene1")
    for loop in (images / "scene0/again", images / "scene1/round"):
        loop.symlink_to(data)
    (images / "scene0/._000.png").write_bytes(b"\0\5\x16\7")
    (images / "scene0/.thumbnails").mkdir()
    shutil.copy(images / "scene0/000.png", images / "scene0/.thumbnails")
    source = open_source(str(data))
    assert [episode.name for episode in source.episodes] == ["first", "second"]
    assert numbers(source, "image") == expected((3, 2))


def test_a_folder_is_no_file_whatever_its_name(tmp_path):
    """Spark and Dask write a folder `data.parquet` with the files in it."""
    written.write_parquet(tmp_path / "data.parquet", (4, 3))
    (tmp_path / "data.parquet/rows0.parquet").rename(tmp_path / "data.parquet/rows0.PARQUET")
    source = open_source(str(tmp_path))
    assert source.form == "parquet" and numbers(source, "photo") == expected((4, 3))


def test_an_image_of_any_mode_is_read_as_it_is_seen(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name, pixels in {"8": grey.astype(np.uint8), "16": grey * 256 + 7}.items():
        for suffix in ("png", "tif"):
            Image.fromarray(pixels).save(tmp_path / f"{name}.{suffix}")
            assert np.array_equal(read_image(tmp_path / f"{name}.{suffix}", name)[..., 1], grey), (name, suffix)
    for name, pixels in {"F": grey.astype(np.float32), "I": grey.astype(np.int32)}.items():  # of which range?
        Image.fromarray(pixels).save(tmp_path / "file.tif")
        assert "8 or 16 bits" in str(read_image(tmp_path / "file.tif", name))


def test_whatever_pillow_raises_is_damage(tmp_path, monkeypatch):
    """As it does for a damaged TIFF: TypeError, `'float' object cannot be interpreted as an integer`."""

    def fail(*_):
        raise TypeError("'float' object cannot be interpreted as an integer")

    monkeypatch.setattr(Image, "open", fail)
    assert isinstance(read_image(tmp_path / "a.tif", "a.tif"), Damage)


def test_every_sample_of_tars_once(tmp_path):
    source = open_source(str(written.write_tars(tmp_path, (4, 3))))
    assert source.form == "webdataset" and source.cameras == ("front", "wrist")
    assert numbers(source, "wrist") == expected((4, 3))
    assert source.texts(1) == ["number 0", "number 1", "number 2"]


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    folder, asked = written.write_images(tmp_path, (2,)), []
    monkeypatch.setattr(opening.huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or folder)
    assert open_source("somebody/data", revision="v3.0").episodes[0].frames == 2
    assert asked[0][0] == ("somebody/data",) and asked[0][1]["repo_type"] == "dataset"
    assert asked[0][1]["revision"] == "v3.0"


def test_a_timestamp_has_the_nearest_frame_within_the_tolerance_and_no_other(tmp_path):
    path = tmp_path / "video.mp4"
    written.write_video(path, (written.frame(0, i, 0) for i in range(6)))
    assert np.allclose(frame_times(path), np.arange(6) / written.FPS)
    found = list(frames_at(path, [0.00005, 0.1, 0.19995, 0.25, 0.3, 0.9], 1e-4))
    read = [None if isinstance(frame, Damage) else written.read_number(frame) for frame in found]
    assert read == [0, 1, 2, None, 3, None]
    assert "within 0.0001 s of 0.2500 s" in str(found[3]) and "nearest is at 0.5000 s" in str(found[5])
    assert [written.read_number(frame) for frame in frames_at(path, [0.14, 0.16], 0.05)] == [1, 2]


@pytest.mark.parametrize("parameters", ["intra-refresh=1", "open-gop=1:bframes=3", "bframes=3"])
def test_frames_from_the_middle_are_those_of_the_whole_file(tmp_path, parameters):
    """With intra refresh there is no key frame but the first: a decoder that is sent to a recovery point gives grey."""
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=written.FPS)
        stream.height, stream.width = 56, 84
        stream.options = {"x264-params": f"{parameters}:keyint=12"}
        for place in range(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(written.frame(0, place, 0), format="rgb24")))
        container.mux(stream.encode())
    times = frame_times(path).tolist()
    whole = list(frames_at(path, times))
    assert [written.read_number(frame) for frame in whole] == list(range(70))
    for place, time in enumerate(times):
        assert np.array_equal(next(frames_at(path, [time])), whole[place]), place


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_that_is_cut_short_is_named(tmp_path, suffix):
    """Demultiplexers read to the cut, and say nothing where the header stands before it."""
    path = tmp_path / f"video.{suffix}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as container:
        stream = container.add_stream("libx264", rate=written.FPS)
        stream.height, stream.width, stream.options = 56, 84, {"g": "6", "bf": "0"}
        for place in range(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(written.frame(0, place, 0), format="rgb24")))
        container.mux(stream.encode())
    assert len(frame_times(path)) == 30
    written.write_video(tmp_path / "whole.mp4", (written.frame(1, i, 0) for i in range(3)))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match=f"{path.name}: is cut short"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), skip=True)
    assert [episode.name for episode in source.episodes] == ["whole"] and "cut short" in str(source.left_out[0])


def test_timestamps_behind_many_minutes_of_a_file_have_their_frames(tmp_path):
    """Float32 numbers there are farther apart than the tolerance: LeRobot's distance of equal moments exceeds it."""
    path, fps, start, count = tmp_path / "video.mp4", 30, 1000 * 30, 900
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height = stream.width = 32
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps * 512)
        stream.options = {"bf": "0"}
        for place in range(count):
            image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            image.pts, image.time_base = (start + place) * 512, Fraction(1, fps * 512)
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    offset = 700.0  # of an episode with 300 s before these frames
    stored = np.array([(300 * fps + place) / fps for place in range(count)], np.float32).astype(np.float64)
    times = (offset + stored).tolist()
    far = np.abs(np.float32(times) - np.float32(frame_times(path)))
    assert (far > 1e-4).any()
    assert not [found for found in frames_at(path, times, 1e-4) if isinstance(found, Damage)]


def test_frames_before_the_start_of_a_video_that_was_trimmed_are_none(tmp_path):
    """A cut without encoding keeps those since the last key frame, with an edit list that says not to show them."""
    whole, folder = tmp_path / "whole.mp4", tmp_path / "data"
    folder.mkdir()
    written.write_video(whole, (written.frame(0, i, 0) for i in range(12)), gop=12)
    with av.open(str(whole)) as source:
        options = {"avoid_negative_ts": "disabled"}
        with av.open(str(folder / "trimmed.mp4"), "w", options=options) as target:
            taken = source.streams.video[0]
            stream = target.add_stream_from_template(taken)
            for packet in source.demux(taken):
                if packet.dts is not None:
                    cut = round(0.3 / taken.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, stream
                    target.mux(packet)
    source = open_source(str(folder))
    assert numbers(source, "video") == list(range(3, 12)) and np.allclose(source.timestamps(0), np.arange(9) / 10)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_video_that_was_filmed_upright_is_read_upright(tmp_path, quarters):
    """As telephones write them: lying, with a matrix in the track's header that turns them for the viewer."""
    path, cosine, sine = tmp_path / "video.mp4", (0, -1, 0)[quarters - 1], (1, 0, -1)[quarters - 1]
    upright = [written.frame(0, i, 0) for i in range(3)]
    written.write_video(path, (np.ascontiguousarray(np.rot90(frame, quarters)) for frame in upright))  # as it lay
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, number, duration, layer, volume
    assert struct.unpack(">9i", data[place : place + 36])[0] == 1 << 16
    matrix = (cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    source = open_source(str(tmp_path))
    assert next(source.frames("video", [Run(0, 0, 1)])).shape == upright[0].shape
    assert numbers(source, "video") == [0, 1, 2]


def test_a_time_that_is_no_number_has_no_frame(tmp_path):
    path = tmp_path / "video.mp4"
    written.write_video(path, (written.frame(0, i, 0) for i in range(3)))
    assert all(isinstance(frame, Damage) for frame in frames_at(path, [float("nan"), float("nan")]))


@pytest.mark.parametrize("damage", ["cut", "no video", "missing"])
def test_a_damaged_video_is_damage_for_each_of_its_frames(tmp_path, damage):
    path = tmp_path / "video.mp4"
    written.write_video(path, (written.frame(0, i, 0) for i in range(6)))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "no video":
        path.write_text("no video")
    else:
        path.unlink()
    found = list(frames_at(path, [0.0, 0.1], 1e-4))
    assert len(found) == 2 and all(isinstance(frame, Damage) and frame.path == str(path) for frame in found)


def rewrite(root, name, **changes):
    table = pq.read_table(root / name)
    for column, change in changes.items():
        place = table.column_names.index(column)
        values = change(table[column].to_pylist())
        table = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, root / name)


EPISODES, ROWS = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"
BAD = {
    "another version": (lambda root: edit_info(root, codebase_version="v9.0"), ["v3.x", "v9.0"]),
    "no features": (lambda root: edit_info(root, features=3), ["features", "3"]),
    "info": (lambda root: (root / "meta/info.json").write_text("{"), ["info.json"]),
    "where videos are": (lambda root: edit_info(root, video_path="{nowhere}.mp4"), ["video_path", "{nowhere}"]),
    "length": (lambda root: rewrite(root, EPISODES, length=lambda x: [6, *x[1:]]), ["episode 0", "6", "7"]),
    "an empty episode": (lambda root: rewrite(root, EPISODES, length=lambda x: [0, *x[1:]]), ["frames", ": 0"]),
    "order": (lambda root: rewrite(root, ROWS, frame_index=lambda x: x[::-1]), ["episode 0", "order"]),
    "task": (lambda root: rewrite(root, ROWS, task_index=lambda x: [9] * len(x)), ["task_index"]),
    "no timestamp": (lambda root: rewrite(root, ROWS, timestamp=lambda x: [None, *x[1:]]), ["timestamp", "episode 0"]),
    "no video": (lambda root: (root / VIDEO).unlink(), [VIDEO]),
    "no data": (lambda root: shutil.rmtree(root / "data"), ["episode 0", "0 in data"]),
    "damaged data": (lambda root: (root / ROWS).write_bytes(b"PAR1"), ["file-000.parquet"]),
    "no episodes": (lambda root: shutil.rmtree(root / "meta/episodes"), ["meta/episodes"]),
}


def edit_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_lerobot_folder_is_refused_with_what_is_wrong(name, lerobot, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(lerobot, root)
    change, words = BAD[name]
    change(root)
    with pytest.raises(ValueError) as raised:
        open_source(str(root))
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("keep", ["half", "a header", "all but the end", "no members"])
def test_a_tar_that_is_cut_short_is_refused(tmp_path, keep):
    """Python's tarfile reads on to the cut, and says nothing."""
    path = written.write_tars(tmp_path, (4,)) / "000000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    lengths = {
        "half": len(data) // 2,
        "a header": last.offset + 100,
        "all but the end": last.offset_data + 512,
        "no members": 10,
    }
    path.write_bytes(data[: lengths[keep]])
    with pytest.raises(ValueError, match=r"000000\.tar"):
        open_source(str(path))


def test_a_sample_with_two_images_of_a_camera_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.png", "x.PNG"):
            data = written.png(written.frame(0, 0, 0))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="sample x must have one image of camera image"):
        open_source(str(tmp_path))


def test_cameras_of_one_short_name_keep_their_own(tmp_path):
    written.write_v3(tmp_path, kinds=("image", "image"))
    other, path = "observation.wrist", tmp_path / "meta/info.json"
    info = json.loads(path.read_text())
    edit_info(tmp_path, features=info["features"] | {other: info["features"]["observation.images.front"]})
    for file in (tmp_path / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column(other, table["observation.images.front"]), file)
    source = open_source(str(tmp_path))
    assert source.cameras == ("front", "observation.images.wrist", other)
    assert (
        next(source.frames(other, [Run(0, 0, 1)])).shape != next(source.frames(source.cameras[1], [Run(0, 0, 1)])).shape
    )
    assert open_source(str(tmp_path), [other, "observation.images.front"]).cameras == (other, "front")


def test_a_chunk_has_episodes(tmp_path):
    edit_info(written.write_v21(tmp_path), chunks_size=0)
    with pytest.raises(ValueError, match="chunks_size"):
        open_source(str(tmp_path))


def test_a_task_without_a_text_is_refused(tmp_path):
    written.write_v21(tmp_path)
    (tmp_path / "meta/tasks.jsonl").write_text('{"task_index": 0}\n')
    with pytest.raises(ValueError, match=r"tasks\.jsonl"):
        open_source(str(tmp_path))


def test_tables_of_which_one_has_no_images_in_the_column_are_refused(tmp_path):
    written.write_parquet(tmp_path, (3,))
    pq.write_table(pa.table({"photo": [1, 2]}), tmp_path / "rows1.parquet")
    with pytest.raises(ValueError, match=r"rows1\.parquet must have the columns photo, got no photo"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("text", [None, ["a"], 3])
def test_a_row_without_a_text_is_refused(tmp_path, text):
    path = written.write_parquet(tmp_path, (3,)) / "rows0.parquet"
    table = pq.read_table(path)
    captions = pa.array([["b"], text, ["c"]]) if isinstance(text, list) else pa.array([text] * 3)
    pq.write_table(table.set_column(1, "caption", captions), path)
    with pytest.raises(ValueError, match=r"rows0\.parquet, row .: caption must be a text, got"):
        open_source(str(path), text_column="caption")
    assert len(open_source(str(path)).episodes) == 1


def test_what_is_no_data_set_is_refused(tmp_path, lerobot):
    with pytest.raises(ValueError, match="front, wrist"):
        open_source(str(lerobot), ["head"])
    with pytest.raises(ValueError, match="different"):
        open_source(str(lerobot), ["front", "front"])
    with pytest.raises(ValueError, match="none of these"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="not there"):
        open_source(str(tmp_path / "nothing" / "here"))
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"a\.tar"):
        open_source(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        open_source(str(tmp_path))

"""Data sets written by the rules of their formats, with frames that say which they are."""

import io
import json
import tarfile
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS = 10
TASKS = ("Pick up the red block.", "Open the drawer, please, and look inside.")
CODECS = {"h264": "libx264", "av1": "libsvtav1"}
PANDAS = {"pandas_type": None, "numpy_type": None, "metadata": None}  # of a column, in a table of pandas
LAST_ROWS = 8  # of a frame, in which its number stands


def has_encoder(codec):
    try:
        return bool(av.codec.Codec(CODECS[codec], "w"))
    except av.codec.codec.UnknownCodecError:
        return False


def frame(episode, index, camera, size=(56, 84)):
    """(H, W, 3): a slope of colours, and the number of the frame in blocks that survive a video's compression."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([(x * 2 + 40 * camera) % 256, (y * 3 + 30 * episode) % 256, (x + y) % 256], axis=-1)
    for bit in range(7):
        pixels[-LAST_ROWS:, bit * 8 : bit * 8 + 8] = 235 if number_of(episode, index) >> bit & 1 else 20
    return pixels.astype(np.uint8)


def number_of(episode, index):
    return (episode * 37 + index) % 128


def read_number(pixels):
    """The number in a frame that was decoded."""
    blocks = pixels[-LAST_ROWS + 2 : -2].astype(float).mean(axis=(0, 2))
    return sum(int(blocks[bit * 8 + 2 : bit * 8 + 6].mean() > 128) << bit for bit in range(7))


def write_video(path, frames, codec="h264", gop=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = list(frames)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[codec], rate=FPS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        quality = {"crf": "20", "g": str(gop), "bf": "2"} if codec == "h264" else {"crf": "20", "g": str(gop)}
        stream.options = quality | ({"preset": "10", "svtav1-params": "lp=1"} if codec == "av1" else {})
        stream.time_base = Fraction(1, FPS)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def features_of(cameras):
    """`features` of info.json: name -> (dtype, size)."""
    said = {
        name: {"dtype": dtype, "shape": [*size, 3], "names": ["height", "width", "channels"]}
        for name, (dtype, size) in cameras.items()
    }
    scalars = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    for name, dtype in {"timestamp": "float32", **scalars}.items():
        said[name] = {"dtype": dtype, "shape": [1], "names": None}
    return said


def table_of(episodes, lengths, cameras, first_index):
    """Rows of data/ of some episodes."""
    rows = [(episode, index) for episode in episodes for index in range(lengths[episode])]
    columns = {
        "timestamp": pa.array([index / FPS for _, index in rows], pa.float32()),
        "frame_index": pa.array([index for _, index in rows], pa.int64()),
        "episode_index": pa.array([episode for episode, _ in rows], pa.int64()),
        "index": pa.array([first_index + i for i in range(len(rows))], pa.int64()),
        "task_index": pa.array([episode % len(TASKS) for episode, _ in rows], pa.int64()),
    }
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for number, (name, (dtype, size)) in enumerate(cameras.items()):
        if dtype == "image":
            images = [{"bytes": png(frame(*row, number, size)), "path": f"frame-{row[1]:06d}.png"} for row in rows]
            columns[name] = pa.array(images, kind)
    return pa.table(columns)


def cameras_of(kinds, sizes):
    return {
        f"observation.images.{name}": (kind, size)
        for name, kind, size in zip(("front", "wrist"), kinds, sizes, strict=False)
    }


def write_v3(
    root, lengths=(7, 5, 9), kinds=("video", "image"), sizes=((56, 84), (56, 56)), codec="h264", gop=2, files=2
):
    """A LeRobot v3 data set: the first episodes share files, the last has its own where `files` is 2."""
    cameras = cameras_of(kinds, sizes)
    groups = [list(range(len(lengths)))] if files == 1 else [list(range(len(lengths) - 1)), [len(lengths) - 1]]
    described, first = [], 0
    for file, episodes in enumerate(groups):
        data = root / f"data/chunk-000/file-{file:03d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        table = table_of(episodes, lengths, cameras, first)
        with pq.ParquetWriter(data, table.schema) as writer:  # a row group for each episode, as LeRobot writes them
            start = 0
            for episode in episodes:
                writer.write_table(table.slice(start, lengths[episode]))
                start += lengths[episode]
        for number, (name, (dtype, size)) in enumerate(cameras.items()):
            if dtype == "video":
                frames = (frame(e, i, number, size) for e in episodes for i in range(lengths[e]))
                write_video(root / f"videos/{name}/chunk-000/file-{file:03d}.mp4", frames, codec, gop)
        offset = 0.0
        for episode in episodes:
            length = lengths[episode]
            row = {
                "episode_index": episode,
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": first,
                "dataset_to_index": first + length,
                "tasks": [TASKS[episode % len(TASKS)]],
                "length": length,
                "stats/index/min": [float(first)],
            }
            for name, (dtype, _) in cameras.items():
                if dtype == "video":
                    row[f"videos/{name}/chunk_index"] = 0
                    row[f"videos/{name}/file_index"] = file
                    row[f"videos/{name}/from_timestamp"] = offset
                    row[f"videos/{name}/to_timestamp"] = offset + length / FPS
            described.append(row)
            first, offset = first + length, offset + length / FPS
    meta = root / "meta/episodes/chunk-000"
    meta.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(described), meta / "file-000.parquet")
    tasks = pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)})
    names = [{"name": None if x[0] == "_" else x, "field_name": x, **PANDAS} for x in tasks.column_names]
    pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": names}
    pq.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(pandas)}), root / "meta/tasks.parquet")
    write_info(root, "v3.0", cameras, lengths)
    return root


def write_v21(root, lengths=(7, 5), kinds=("video", "video"), sizes=((56, 84), (56, 84)), codec="h264"):
    """A LeRobot v2.1 data set: a file for each episode."""
    cameras = cameras_of(kinds, sizes)
    first, lines = 0, []
    for episode, length in enumerate(lengths):
        data = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of([episode], lengths, cameras, first), data)
        for number, (name, (dtype, size)) in enumerate(cameras.items()):
            if dtype == "video":
                frames = (frame(episode, i, number, size) for i in range(length))
                write_video(root / f"videos/chunk-000/{name}/episode_{episode:06d}.mp4", frames, codec)
        lines.append({"episode_index": episode, "tasks": [TASKS[episode % len(TASKS)]], "length": length})
        first += length
    (root / "meta").mkdir(exist_ok=True)
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = ({"task_index": index, "task": task} for index, task in enumerate(TASKS))
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    write_info(root, "v2.1", cameras, lengths)
    return root


def write_info(root, version, cameras, lengths):
    is_v3 = version == "v3.0"
    info = {
        "codebase_version": version,
        "fps": FPS,
        "features": features_of(cameras),
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if is_v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if is_v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def write_images(root, lengths=(3, 2), size=(56, 84)):
    for episode, length in enumerate(lengths):
        (root / f"scene{episode}").mkdir(parents=True)
        for index in range(length):
            Image.fromarray(frame(episode, index, 0, size)).save(root / f"scene{episode}/{index:03d}.png")
    return root


def write_parquet(root, lengths=(4, 3), size=(56, 84)):
    root.mkdir(parents=True, exist_ok=True)
    for episode, length in enumerate(lengths):
        images = [{"bytes": png(frame(episode, i, 0, size)), "path": None} for i in range(length)]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        columns = {"photo": pa.array(images, kind), "caption": [f"number {i}" for i in range(length)]}
        pq.write_table(pa.table(columns), root / f"rows{episode}.parquet", row_group_size=2)
    return root


def write_tars(root, lengths=(4, 3), size=(56, 84)):
    root.mkdir(parents=True, exist_ok=True)
    for episode, length in enumerate(lengths):
        with tarfile.open(root / f"{episode:06d}.tar", "w") as tar:
            for index in range(length):
                members = {
                    "front.png": png(frame(episode, index, 0, size)),
                    "wrist.png": png(frame(episode, index, 1, size)),
                }
                for name, data in (members | {"txt": f"number {index}".encode()}).items():
                    member = tarfile.TarInfo(f"sample{index:04d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def arguments(dataset, out, model, *more):
    """The command line of a small extraction on the CPU, in float32 batches of 4."""
    usual = {"--dtype": "float32", "--device": "cpu", "--batch-size": "4", "--decoders": "2", "--threads": "1"}
    given = [part for name, value in usual.items() if name not in more for part in (name, value)]
    return [str(dataset), str(out), "--model", str(model), *given, *map(str, more)]


def contents(out):
    """Every file of a folder with its bytes."""
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}

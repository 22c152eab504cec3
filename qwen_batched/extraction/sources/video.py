"""A video file and timestamps -> its frames, decoded from the first to the last in one go.

Which frame belongs to a timestamp follows LeRobot's `decode_video_frames_pyav`: the nearest one, and none that is
farther away than the tolerance. LeRobot takes distances between float32 numbers; behind 1024 s these are farther apart
than its tolerance, so that a distance may be that of the exact numbers too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType

from qwen_batched.extraction.sources.source import Damage, Frame

SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"})
REFERRING = (PictureType.P, PictureType.B)  # frames that need others; a decoder gives grey ones where it has none
SLACK = 0.5  # seconds that the frames of a whole file may end before it does
TOLERANCE = 1e-4  # seconds; LeRobot's default


def frame_times(path: Path) -> np.ndarray:
    """When each frame of a file is shown, in seconds, ascending; nothing is decoded.

    Raises `ValueError`, `OSError` or `av.FFmpegError` where the file cannot be read, or ends before it should.
    """
    with av.open(str(path)) as container:
        stream = _video(container, path)
        shown = (x for x in container.demux(stream) if x.pts is not None and not x.is_discard)
        pairs = [(float(x.pts * x.time_base), float((x.duration or 0) * x.time_base)) for x in shown]
        times, durations = np.sort(np.array([time for time, _ in pairs])), [duration for _, duration in pairs]
        if len(times):
            end = times[-1] + max(durations)
            lasts, began = _said_duration(stream), float((stream.start_time or 0) * stream.time_base)
            if end - began < lasts - max(SLACK, 2 * float(np.diff(times, prepend=times[0]).max())):
                raise ValueError(f"is cut short: it lasts {lasts:.2f} s, its frames end at {end - began:.2f} s")
        return times


def _said_duration(stream: av.VideoStream) -> float:
    """Seconds that a file says it lasts; 0 where it does not."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    match = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION") or "")  # of Matroska
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


def frames_at(
    path: Path, times: Sequence[float], tolerance: float = TOLERANCE, upright: bool = False
) -> Iterator[Frame]:
    """The frames at ascending timestamps in seconds, one for each; `Damage` where there is none within `tolerance`.

    `upright`: rotated as the file's metadata ask for, in quarters; LeRobot's decoder does not.
    """
    given = 0
    try:
        for frame in _nearest(path, times, tolerance, upright):
            yield frame
            given += 1
    except (OSError, av.FFmpegError, ValueError) as error:
        reason = " ".join(str(error).split()).removesuffix(f": '{path}'") or type(error).__name__
        for _ in range(len(times) - given):
            yield Damage(str(path), reason)


def _video(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError("has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # each decoding worker is a thread already
    return stream


def _nearest(path: Path, times: Sequence[float], tolerance: float, upright: bool) -> Iterator[Frame]:
    place, before = 0, None
    for frame in _decoded_from(path, times[0]):
        time = _time(frame)
        while place < len(times) and times[place] <= time:
            wanted = times[place]
            is_before = before is not None and wanted - _time(before) <= time - wanted
            yield _pixels(path, before if is_before else frame, wanted, tolerance, upright)
            place += 1
        if place == len(times):
            return
        before = frame
    if before is None:
        raise ValueError("no frame can be decoded")
    for wanted in times[place:]:
        yield _pixels(path, before, wanted, tolerance, upright)


def _decoded_from(path: Path, time: float) -> Iterator[av.VideoFrame]:
    """Frames in the order in which they are shown, from one at or before `time` on where there is one."""
    for is_sought in (True, False) if time > 0 else (False,):
        with av.open(str(path)) as container:
            stream = _video(container, path)
            if is_sought:
                container.seek(round(time / stream.time_base) - 1, stream=stream, backward=True)
            is_first = True
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                if is_first and is_sought and (_time(frame) > time or frame.pict_type in REFERRING):
                    break  # a container sought by decoding time, or a stream without key frames: from its start then
                is_first = False
                yield frame
            else:
                if not (is_first and is_sought):  # the decoder gave something, or there is nothing
                    return


def _time(frame: av.VideoFrame) -> float:
    """Seconds."""
    return float(frame.pts * frame.time_base)


def _pixels(path: Path, frame: av.VideoFrame, wanted: float, tolerance: float, upright: bool) -> Frame:
    time = _time(frame)
    if not min(abs(wanted - time), abs(np.float32(wanted) - np.float32(time))) <= tolerance:
        return Damage(str(path), f"has no frame within {tolerance} s of {wanted:.4f} s, the nearest is at {time:.4f} s")
    if frame.is_corrupt:
        return Damage(str(path), f"the frame at {time:.4f} s is damaged")
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90)) if upright and frame.rotation else pixels

"""Frames of media files as arrays: by decord where it is exact, by PyAV, by Pillow. Knows no model, imports no torch.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from utils.common.digests import hash_file
from utils.common.errors import UserError
from utils.common.files import file_stamp
from utils.media.description import VIDEO, MediaError, MediaInfo
from utils.media.files import check_file
from utils.media.images import read_images
from utils.media.probing import probe
from utils.media.rendering import deinterlaced, stored_size, to_pixels
from utils.media.stream import time_of
from utils.media.video import Video, open_video

INDEXED = ("mov", "matroska", "avi")  # containers in which a seek finds the packet of that time
MARGIN = 2  # seconds before a keyframe from which it is looked for in others


def read_pixels(path: Path, indices: Sequence[int], info: MediaInfo | None = None, alpha: bool = False) -> np.ndarray:
    """Frames `indices` (strictly ascending) of a video, or (0,) of an image, as shown: uint8 RGB (F, H, W, 3).

    `info` is the result of `probe` for this file, if the caller has it. With `alpha` frames that are transparent are
    RGBA (F, H, W, 4), not blended. Raises `MediaError` for a file that cannot be read, that has no such frame, or
    that now holds something else than `info` says, and ValueError for indices that are negative or not ascending.
    """
    indices = list(indices)
    if not indices or indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
        raise ValueError(f"frame indices must be ascending and not negative, not {indices}")
    try:
        info = _current_info(path, info)
        if indices[-1] >= info.frames:
            raise MediaError(path, f"frame {indices[-1]} was requested, but the last frame is {info.frames - 1}")
        if info.kind != VIDEO:
            return read_images(path, indices, info.look, alpha)
        pixels = _read_with_decord(path, indices, info)
        return _read_with_pyav(path, indices, info, alpha) if pixels is None else pixels
    except UserError:
        raise
    except MemoryError:
        raise MediaError(path, "main memory is too small to read it: fewer --num_workers need less") from None
    except Exception as error:  # a decoder's, of any type: only here is it known which file it is about
        raise MediaError(path, f"it cannot be decoded: {type(error).__name__}: {error}") from error


def _current_info(path: Path, info: MediaInfo | None) -> MediaInfo:
    """The description of a file. Raises `MediaError` where the file is another one than was described."""
    if info is None or not info.stamp:
        return probe(path)
    stamp = file_stamp(check_file(path))
    if stamp == info.stamp:
        return info
    if info.digest:  # a link or a backup changes the stamp too, but not the content
        is_same = _digest(path, stamp) == info.digest
    else:
        now = probe(path)
        is_same = (now.frames, now.look) == (info.frames, info.look)
    if not is_same:
        was = f"{info.frames} frames of {info.width}x{info.height}"
        raise MediaError(path, f"it has changed since it was checked, and no longer holds {was}")
    return info


@functools.lru_cache(maxsize=2**12)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Of the file that has this stamp."""
    return hash_file(path)


def has_decord() -> bool:
    """Whether decord can be imported."""
    return _decord() is not None


@functools.cache
def _decord() -> ModuleType | None:
    """decord, imported only when frames are read: imported before torch it can hang or crash CUDA."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _read_with_decord(path: Path, indices: list[int], info: MediaInfo) -> np.ndarray | None:
    """Frames `indices` (ascending) as (F, H, W, 3), or None if decord is not exact for this file.

    It reports no damage, so that only a file that was decoded in full is left to it. Its frame count must equal the
    verified one: it never returns if a requested frame exists only in the header.

    decord has no list of allowed formats. It needs none: a description exists only for files that PyAV opened as one of
    the allowed containers. FFmpeg recognises these by their first bytes, where a script or a playlist has its own.
    """
    decord = _decord() if info.timeline.suits_decord and info.is_whole else None
    if decord is None:
        return None
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        return reader.get_batch(indices).asnumpy() if len(reader) == info.frames else None
    except (decord.DECORDError, RuntimeError, UnicodeEncodeError):  # the last: a name that is not UTF-8
        return None


def _read_with_pyav(path: Path, indices: list[int], info: MediaInfo, alpha: bool = False) -> np.ndarray:
    """Frames `indices` (ascending) as shown, (F, H, W, C). Seeks by presentation time, or counts from the start."""
    timeline = info.timeline
    wanted = [timeline.times[index] for index in indices] if timeline.times else []
    # The frame before is part of one that is deinterlaced.
    start = timeline.times[max(0, indices[0] - info.look.reaches_back)] if wanted else None
    keyframe = max((time for time in timeline.keyframes if start is not None and time <= start), default=None)
    if keyframe is not None:
        with contextlib.suppress(MediaError):  # in some containers no time can be found
            found = _decode(path, wanted, info, alpha, keyframe)
            if len(found) == len(indices):
                return np.stack(found)
    found = _decode(path, wanted or indices, info, alpha)
    if len(found) < len(indices):
        raise MediaError(path, f"only {len(found)} of the {len(indices)} requested frames can be decoded")
    return np.stack(found)


def _decode(
    path: Path, wanted: list[int], info: MediaInfo, alpha: bool = False, keyframe: int | None = None
) -> list[np.ndarray]:
    """The frames shown at the ascending times `wanted`, or without times those of these numbers.

    Decoding starts at the keyframe of that time; without one, at the start.
    """
    found, labels, convert = [], set(wanted), VideoReformatter()
    size = info.look.scaled or stored_size(info)
    with open_video(path) as video:
        frames = _frames_from(video, keyframe, info)
        if info.look.interlaced:
            frames = deinterlaced(frames, video.stream, info.look.interlaced)
        for number, frame in enumerate(frames):
            label = time_of(frame) if info.timeline.times else number
            if label in labels:
                look = info.look if (frame.width, frame.height) == size else replace(info.look, scaled=size)
                found.append(to_pixels(frame, look, convert, alpha and info.look.transparent))
            if label is not None and label >= wanted[-1]:
                break
    return found


def _frames_from(video: Video, keyframe: int | None, info: MediaInfo) -> Iterator[VideoFrame]:
    """The whole frames from a keyframe on. Raises `av.FFmpegError` for damage."""
    waits = keyframe is not None
    if keyframe is not None:
        is_indexed = any(name in video.container.format.name for name in INDEXED)
        margin = 0 if is_indexed else round(MARGIN / info.timeline.time_base)
        video.container.seek(keyframe - margin, stream=video.stream)
    for packet in chain(video.packets(), (None,)):
        waits = waits and packet is not None and not (packet.is_keyframe and packet.pts == keyframe)
        if not waits:
            yield from (frame for frame in video.decode(packet) if not frame.is_corrupt)

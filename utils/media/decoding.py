"""Frames of media files as arrays: by decord where it is exact, else by PyAV. Knows no model and imports no torch.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8 RGB.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from utils.media.probing import MediaError, MediaInfo, Timeline, is_image, open_image, open_video, probe, read_timeline


def read_pixels(path: Path, indices: Sequence[int], info: MediaInfo | None = None) -> np.ndarray:
    """Frames `indices` (strictly ascending) of a video, or (0,) of an image, upright: uint8 (F, H, W, 3).

    `info` is the result of `probe` for this file, if the caller has it. Raises `MediaError` for a file that cannot be
    read or has no such frame, and `ValueError` for indices that are negative or not ascending.
    """
    indices = list(indices)
    if not indices or indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
        raise ValueError(f"frame indices must be ascending and not negative, not {indices}")
    if is_image(path):
        _check_last(path, indices, available=1)
        return np.asarray(_read_rgb(path))[None].copy()
    timeline = read_timeline(path)
    _check_last(path, indices, timeline.frames)
    rotation = (info or probe(path)).rotation
    # PyAV leaves the rotation to the caller. decord applies it, and returns another pixel format.
    pixels = _read_with_decord(path, indices, timeline) if rotation == 0 else None
    pixels = _read_with_pyav(path, indices, timeline) if pixels is None else pixels
    return np.rot90(pixels, rotation // 90, (1, 2)) if rotation else pixels


def _check_last(path: Path, indices: list[int], available: int) -> None:
    if indices[-1] >= available:
        raise MediaError(path, f"frame {indices[-1]} was requested, but the last frame is {available - 1}")


def _read_rgb(path: Path) -> Image.Image:
    """An upright 8-bit RGB image: 16-bit values are scaled, and transparent areas become white."""
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8)).convert("RGB")
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return upright.convert("RGB")


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


def _read_with_decord(path: Path, indices: list[int], timeline: Timeline) -> np.ndarray | None:
    """Frames `indices` (ascending) as (F, H, W, 3), or None if decord is not exact for this file.

    Its frame count must equal the verified one: decord never returns if a requested frame exists only in the header.

    decord has no list of allowed formats. It needs none: `timeline` exists only for files that PyAV opened as one of
    the allowed containers. FFmpeg recognises these by their first bytes, where a script or a playlist has its own.
    """
    decord = _decord()
    if decord is None or not timeline.suits_decord:
        return None
    try:
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        return reader.get_batch(indices).asnumpy() if len(reader) == timeline.frames else None
    except (decord.DECORDError, RuntimeError):
        return None


def _read_with_pyav(path: Path, indices: list[int], timeline: Timeline) -> np.ndarray:
    """Frames `indices` (ascending) as stored, (F, H, W, 3). Seeks by presentation time, or counts from the start."""
    wanted = [timeline.times[index] for index in indices] if timeline.times else []
    keyframe = max((time for time in timeline.keyframes if wanted and time <= wanted[0]), default=None)
    if keyframe is not None:
        found = _decode(path, wanted, keyframe)
        if len(found) == len(indices):
            return np.stack(found)
    found = _decode(path, indices)
    if len(found) < len(indices):
        raise MediaError(path, f"only {len(found)} of the {len(indices)} requested frames can be decoded")
    return np.stack(found)


def _decode(path: Path, wanted: list[int], keyframe: int | None = None) -> list[np.ndarray]:
    """The frames shown at the ascending times `wanted`, from the keyframe at that time on; without one, by number."""
    found, labels = [], set(wanted)
    to_rgb = VideoReformatter()
    with open_video(path) as (container, stream):
        if keyframe is not None:
            container.seek(keyframe, stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            label = number if keyframe is None else frame.pts
            if label in labels:
                found.append(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            if label is not None and label >= wanted[-1]:
                break
    return found

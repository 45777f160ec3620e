"""Frames out of media files, as arrays: decord where it is exact, PyAV everywhere else. Knows no model, and no torch.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8 RGB.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from utils.media.probing import MediaError, MediaInfo, is_image, open_image, open_video, probe, read_timeline


def read_pixels(path: Path, indices: Sequence[int], info: MediaInfo | None = None) -> np.ndarray:
    """Frames `indices` (strictly ascending) of a video, or (0,) of an image, upright: uint8 (F, H, W, 3).

    `info` is what `probe` said of this file, where that is known already. Raises `MediaError` for a file that cannot
    be read or has no such frame, and `ValueError` for indices in another order.
    """
    indices = list(indices)
    if not indices or indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
        raise ValueError(f"frame indices must be ascending and not negative, not {indices}")
    info = info or probe(path)
    available = 1 if is_image(path) else read_timeline(path).frames
    if indices[-1] >= available:
        raise MediaError(path, f"frame {indices[-1]} was asked for, but only frames 0 to {available - 1} are there")
    if is_image(path):
        return np.asarray(_open_rgb(path))[None].copy()
    pixels = _read_with_decord(path, indices, info)
    pixels = _read_with_pyav(path, indices) if pixels is None else pixels
    return np.rot90(pixels, info.rotation // 90, (1, 2)) if info.rotation else pixels


def _open_rgb(path: Path) -> Image.Image:
    """An upright 8-bit RGB image: 16-bit values are scaled, and what is transparent shows white."""
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8)).convert("RGB")
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return upright.convert("RGB")


def has_decord() -> bool:
    """Whether decord can be imported here."""
    return _decord() is not None


@functools.cache
def _decord() -> ModuleType | None:
    """decord, imported only when a frame is wanted: loaded before torch it can hang or crash CUDA."""
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _read_with_decord(path: Path, indices: list[int], info: MediaInfo) -> np.ndarray | None:
    """Frames `indices` (ascending) as (F, H, W, 3), or None where decord cannot be trusted with this file.

    Its count must equal the verified one: asked for a frame that only the header promises, it never returns.
    """
    decord = _decord()
    if decord is None or info.rotation or not read_timeline(path).suits_decord:
        return None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(indices).asnumpy() if len(reader) == info.frames else None
    except (decord.DECORDError, RuntimeError):
        return None


def _read_with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    """Frames `indices` (ascending) as stored, (F, H, W, 3). Seeks by presentation time, or counts from the start."""
    timeline = read_timeline(path)
    wanted = [timeline.times[index] for index in indices] if timeline.times else []
    entry = max((time for time in timeline.keyframes if wanted and time <= wanted[0]), default=None)
    if entry is not None:
        found = _decode(path, wanted, entry)
        if len(found) == len(indices):
            return np.stack(found)
    found = _decode(path, indices)
    if len(found) < len(indices):
        raise MediaError(path, f"only {len(found)} of the {len(indices)} frames that were asked for can be decoded")
    return np.stack(found)


def _decode(path: Path, wanted: list[int], entry: int | None = None) -> list[np.ndarray]:
    """The frames at the ascending times `wanted` after the keyframe at `entry`; without one, the `wanted`th frames."""
    found, sought = [], set(wanted)
    to_rgb = VideoReformatter()
    with open_video(path) as (container, stream):
        if entry is not None:
            container.seek(entry, stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            label = count if entry is None else frame.pts
            if label in sought:
                found.append(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            if label is not None and label >= wanted[-1]:
                break
    return found

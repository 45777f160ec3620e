"""What a mask says: which parts of a picture count, and how much.

One rule for all files. Where opacity varies, opacity is the mask: cut-outs, and white painted on nothing. Otherwise
brightness is, the largest of red, green and blue; a coloured pixel counts fully, however dark. A picture with no value
above 15 holds labels: all but 0 count fully.

Letters in shapes: `F` frames, `H` height, `W` width. Masks are uint8, 255 where a pixel counts fully.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.media.decoding import read_pixels
from utils.media.description import BRIGHTNESS, COLOURS, LABELS, OPACITY, Coverage, MediaInfo
from utils.media.images import read_raw

HIGHEST_LABEL = 15
COLOURED = 64  # of 255 between the largest and the smallest of red, green and blue
SAMPLED = 16  # frames of a video that are looked at
PIXELS = 2**27  # of the frames of a video that are read at a time
BLACK, EQUAL = 15, 15  # of 255: what compression makes of black, and of one value


def measure_mask(path: Path, info: MediaInfo) -> Coverage:
    """By which part of the rule a mask is read, and how much of the picture counts. Raises `MediaError`."""
    if info.is_image:
        values, opacity = read_raw(path)
        rule = _image_rule(values, opacity)
        return _coverage(rule, _image_mask(values, opacity, rule), read_pixels(path, (0,), info)[0, ..., 0])
    indices = sorted({round(place) for place in np.linspace(0, info.frames - 1, SAMPLED)})
    pixels = read_pixels(path, indices, info, alpha=True)
    if pixels[..., :3].max() <= BLACK and len(indices) < info.frames:  # what counts may be seen for a moment only
        return _coverage_of_all(path, info)
    return _coverage_of_video(pixels)


def _coverage_of_all(path: Path, info: MediaInfo) -> Coverage:
    """Of every frame of a video, in parts that fit into memory; by the rule of the first part that is not black."""
    step = max(1, PIXELS // (info.width * info.height))
    parts, sizes = [], []
    for start in range(0, info.frames, step):
        pixels = read_pixels(path, range(start, min(start + step, info.frames)), info, alpha=True)
        parts.append(_coverage_of_video(pixels))
        sizes.append(len(pixels))
    seen = next((part for part in parts if part.most > BLACK), parts[0])
    share = sum(part.share * size for part, size in zip(parts, sizes, strict=True)) / info.frames
    least, most = min(part.least for part in parts), max(part.most for part in parts)
    return Coverage(seen.rule, share, least, most, any(part.is_new for part in parts))


def _coverage_of_video(pixels: np.ndarray) -> Coverage:
    rule = OPACITY if pixels.shape[-1] == 4 and np.ptp(pixels[..., 3]) > EQUAL else _colour_rule(pixels)
    return _coverage(rule, _video_mask(pixels, rule), pixels[..., 0])


def read_mask(path: Path, indices: Sequence[int], info: MediaInfo) -> np.ndarray:
    """The mask of frames `indices` of a video, or of an image, (0,): uint8 (F, H, W). Raises as `read_pixels` does."""
    rule = (info.mask or measure_mask(path, info)).rule
    if info.is_image:
        return _image_mask(*read_raw(path), rule)[None]
    return _video_mask(read_pixels(path, indices, info, alpha=True), rule)


def _image_rule(values: np.ndarray, opacity: np.ndarray | None) -> str:
    if opacity is not None and np.ptp(opacity) > EQUAL:
        return OPACITY
    if 0 < values.max() <= HIGHEST_LABEL:
        return LABELS
    return _colour_rule(values) if values.ndim == 3 else BRIGHTNESS


def _image_mask(values: np.ndarray, opacity: np.ndarray | None, rule: str) -> np.ndarray:
    if rule == OPACITY and opacity is not None:
        return opacity
    if rule == LABELS:
        brightest = values if values.ndim == 2 else values.max(-1)
        return np.where(brightest > 0, 255, 0).astype(np.uint8)
    if values.ndim == 3:
        return _brightness(values)
    if values.dtype == np.uint8:
        return values
    full = 255.0 if values.max() <= 255 else 65535.0
    return np.rint(np.clip(values / full, 0, 1) * 255).astype(np.uint8)


def _video_mask(pixels: np.ndarray, rule: str) -> np.ndarray:
    return pixels[..., 3] if rule == OPACITY else _brightness(pixels[..., :3])


def _brightness(colours: np.ndarray) -> np.ndarray:
    largest = colours.max(-1)
    return np.where(largest - colours.min(-1) > COLOURED, np.uint8(255), largest)


def _colour_rule(pixels: np.ndarray) -> str:
    colours = pixels[..., :3]
    return COLOURS if (colours.max(-1) - colours.min(-1)).max() > COLOURED else BRIGHTNESS


def _coverage(rule: str, mask: np.ndarray, red: np.ndarray) -> Coverage:
    """Of a mask; versions up to 0.2 took the `red` of what is shown."""
    is_new = not np.array_equal(mask, red)
    return Coverage(rule, float(mask.mean() / 255), int(mask.min()), int(mask.max()), is_new)

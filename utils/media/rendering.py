"""From decoded frames to the pictures that a player shows, as a `Look` says. Imports no torch.

Letters in shapes: `H` height, `W` width, `C` channels.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from utils.media.colour import HDR_TRANSFERS, WIDE_PRIMARIES, to_sdr
from utils.media.description import ALL, FLAGGED, Look, MediaInfo
from utils.media.video import Video

# Rows of a display matrix without its translation, as (a, b, c, d): x' = a x + c y, y' = b x + d y, with y downwards.
ORIENTATIONS = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
NEAR = 0.01  # a pixel's width and height that differ by less are rounding of a picture's size
MOST_STRETCHED = 8  # a file that states more is wrong
# Their decoders do not say that a picture is of two fields; the container does.
SILENT_CODECS = frozenset({"rawvideo", "huffyuv", "ffvhuff", "v210", "v410", "r210", "qtrle", "png", "magicyuv"})
FIELD_ORDERS = (2, 3, 4, 5)  # FFmpeg's numbers of all that are not progressive
BT709, UNSPECIFIED, BT2020 = 1, 2, 9  # of matrices, and the second of all colours, by the numbers of ITU-T H.273
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT


def look_of(frame: VideoFrame, video: Video) -> tuple[Look, float]:
    """How the first frame of a video is to be shown, and by how many degrees it is tilted, which is not applied.

    Whether pictures are `interlaced` is known for this frame alone.
    """
    orientation, tilt = _orientation(frame)
    stream = video.stream
    transfer = HDR_TRANSFERS.get(video.transfer if frame.color_trc == UNSPECIFIED else frame.color_trc, "")
    primaries = video.primaries if frame.color_primaries == UNSPECIFIED else frame.color_primaries
    is_silent = stream.codec_context.name in SILENT_CODECS and stream.codec_context.field_order in FIELD_ORDERS
    look = Look(
        orientation=orientation,
        scaled=_square(frame, stream),
        transfer=transfer,
        primaries=WIDE_PRIMARIES.get(primaries, "bt2020" if transfer else ""),
        interlaced=ALL if is_silent else FLAGGED if frame.interlaced_frame else "",
        transparent=any(component.is_alpha for component in frame.format.components),
    )
    return look, tilt


def has_transparency(frame: VideoFrame) -> bool:
    """Whether any pixel is not opaque."""
    return bool(VideoReformatter().reformat(frame, format="rgba", threads=1).to_ndarray()[..., 3].min() < 255)


def shown_size(frame: VideoFrame, look: Look) -> tuple[int, int]:
    """Width and height in pixels of what is shown."""
    width, height = look.scaled or (frame.width, frame.height)
    return (width, height) if ORIENTATIONS[look.orientation][0] else (height, width)


def stored_size(info: MediaInfo) -> tuple[int, int]:
    """Width and height in pixels of the frames before they are turned for display."""
    return (info.width, info.height) if ORIENTATIONS[info.look.orientation][0] else (info.height, info.width)


def deinterlaced(frames: Iterable[VideoFrame], stream: VideoStream, interlaced: str) -> Iterator[VideoFrame]:
    """The same number of frames at the same times, with both fields of each completed by bwdif.

    All frames of the stream that precede one must be given: its neighbours matter.
    """
    for _, alike in groupby(frames, key=lambda frame: (frame.width, frame.height, frame.format.name)):
        graph: Graph | None = None
        for frame in alike:
            graph = graph or _bwdif(frame, stream, "interlaced" if interlaced == FLAGGED else "all")
            yield from _pull(graph, stream, frame)
        if graph is not None:
            yield from _pull(graph, stream, None)


def to_pixels(frame: VideoFrame, look: Look, convert: VideoReformatter, keep_alpha: bool = False) -> np.ndarray:
    """What is shown, uint8 (H, W, C): RGB, or RGBA with `keep_alpha`, which leaves colours as stored.

    `convert` should be the same for all frames of a file: it keeps what it has computed for their format.
    """
    width, height = look.scaled or (frame.width, frame.height)
    size = {"width": width, "height": height, "threads": 1}
    if (width, height) != (frame.width, frame.height):
        size["interpolation"] = EXACT
    if keep_alpha:
        pixels = convert.reformat(frame, format="rgba", **size).to_ndarray()
    elif look.transfer or look.primaries:
        pixels = _to_sdr(frame, look, convert, size)
    elif look.transparent:
        pixels = _on_white(convert.reformat(frame, format="rgba", **size).to_ndarray())
    else:
        pixels = convert.reformat(frame, format="rgb24", **size).to_ndarray()
    return upright(pixels, look.orientation)


def _to_sdr(frame: VideoFrame, look: Look, convert: VideoReformatter, size: dict[str, Any]) -> np.ndarray:
    """BT.709 of HDR and wide colours, on white where they are transparent: uint8 (H, W, 3)."""
    matrix = _matrix(frame, look)
    deep = convert.reformat(
        frame,
        format="rgba64le" if look.transparent else "rgb48le",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        dst_color_range=ColorRange.JPEG,
        **(size | {"interpolation": EXACT}),
    ).to_ndarray()
    colours = to_sdr(deep[..., :3], look)
    if not look.transparent:
        return colours
    opacity = np.rint(deep[..., 3:] / 257).astype(np.uint8)
    return _on_white(np.concatenate([colours, opacity], axis=-1))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, C), turned and mirrored for display."""
    a, b, c, d = ORIENTATIONS[orientation]
    if a == 0:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """Blended with white by opacity, rounded: uint8 (H, W, 3)."""
    opacity = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _matrix(frame: VideoFrame, look: Look) -> int:
    """Which colour matrix a frame has; if it does not say so, that of its primaries."""
    stated = int(frame.colorspace)
    if stated == UNSPECIFIED:
        return BT2020 if look.primaries == "bt2020" else BT709
    return stated


def _orientation(frame: VideoFrame) -> tuple[int, float]:
    """The nearest of the eight orientations to a frame's display matrix, and the angle in degrees that is left."""
    parts: Any = frame.side_data  # a sequence, whatever its stub says
    side = next((part for part in parts if part.type == Type.DISPLAYMATRIX), None)
    if side is None:
        return 1, 0.0
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].astype(float)
    norm = math.sqrt((a * a + b * b + c * c + d * d) / 2)
    if norm == 0:
        return 1, 0.0
    fits = {name: sum(p * q for p, q in zip((a, b, c, d), row, strict=True)) for name, row in ORIENTATIONS.items()}
    best = max(fits, key=fits.__getitem__)
    return best, math.degrees(math.acos(min(1.0, fits[best] / (2 * norm))))


def _square(frame: VideoFrame, stream: VideoStream) -> tuple[int, int] | None:
    """The size with square pixels, larger than stored; None where they are square."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    stretch = float(ratio or 1)
    if abs(stretch - 1) < NEAR or not 1 / MOST_STRETCHED <= stretch <= MOST_STRETCHED:
        return None
    return round(frame.width * max(stretch, 1)), round(frame.height * max(1 / stretch, 1))


def _bwdif(frame: VideoFrame, stream: VideoStream, which: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    nodes = (
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=stream.time_base),
        graph.add("bwdif", f"mode=send_frame:deint={which}"),
        graph.add("buffersink"),
    )
    graph.link_nodes(*nodes).configure()
    return graph


def _pull(graph: Graph, stream: VideoStream, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    """The frames that are complete with this one; with None those that are left."""
    graph.push(frame)
    while True:
        try:
            complete = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(complete, VideoFrame)
        if complete.pts is not None and complete.time_base and stream.time_base:
            complete.pts = round(complete.pts * complete.time_base / stream.time_base)
        yield complete

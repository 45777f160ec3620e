"""Small clips whose frames carry their numbers, of any codec that PyAV writes, and ways to damage and change files.

What is read of a clip can so be judged by value. Letters in shapes: `F` frames, `H` height, `W` width.
"""

import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame

from utils.media.decoding import read_pixels
from utils.media.description import MediaInfo

COLOURS = ((230, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20), (128, 128, 128), (200, 150, 120))
FIXED = 1 << 16


def numbered(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A picture whose upper quarter is its number in eight blocks, above six known colours: uint8 (H, W, 3)."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    for bit in range(8):
        pixels[: height // 4, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 16
    for place, colour in enumerate(COLOURS):
        pixels[height // 4 : height * 3 // 4, place * width // 6 : (place + 1) * width // 6] = colour
    left = number * 3 % (width - 8)
    pixels[height * 13 // 16 : height * 15 // 16, left : left + 8] = 200
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that a picture of `numbered`, (H, W, 3), carries."""
    height, width = pixels.shape[:2]
    edges = [bit * width // 8 for bit in range(9)]
    inside = [(edge + width // 32, end - width // 32) for edge, end in zip(edges, edges[1:], strict=False)]
    blocks = [pixels[height // 16 : height * 3 // 16, left:right].mean() for left, right in inside]
    return sum(int(block > 125) << bit for bit, block in enumerate(blocks))


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that pictures, (F, H, W, 3), carry."""
    return [number_of(pixels) for pixels in frames]


def colours_of(pixels: np.ndarray) -> np.ndarray:
    """The mean of each of the six colours in a picture of `numbered`: float (6, 3)."""
    height, width = pixels.shape[:2]
    row, column = slice(height * 3 // 8, height * 5 // 8), width // 6
    parts = [pixels[row, place * width // 6 + column // 4 : place * width // 6 + column * 3 // 4] for place in range(6)]
    return np.stack([part.reshape(-1, 3).mean(0) for part in parts])


def write_clip(
    path: Path,
    codec: str = "libx264",
    frames: int | Iterable[np.ndarray] = 24,
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 48),
    times: Sequence[int] | None = None,
    **more: Any,
) -> Path:
    """`frames` pictures of `numbered`, or those given, rgb24, rgba or rgb48, at `times` of 1 / `base` seconds.

    `more`: `container` and its `muxer` options, the `rate` of frames, `base`, `gop` from keyframe to keyframe, the
    `matrix` and the range (`span`, 2: full) of colours, a function `edit` of the codec context, options of the codec.
    """
    rate, base, gop = more.pop("rate", 16), more.pop("base", None), more.pop("gop", 6)
    container, muxer = more.pop("container", None), more.pop("muxer", {})
    edit, matrix, span = more.pop("edit", None), more.pop("matrix", None), more.pop("span", None)
    if isinstance(frames, int):
        frames = [numbered(number, *size) for number in range(frames)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container, muxer) as target:
        stream = target.add_stream(codec, rate=rate, options={name: str(value) for name, value in more.items()})
        stream.pix_fmt, stream.codec_context.gop_size = pixels, gop
        if base is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, base)
        for number, array in enumerate(frames):
            frame = as_frame(array, pixels, matrix, span)
            if number == 0:
                stream.width, stream.height = frame.width, frame.height
                if edit is not None:
                    edit(stream.codec_context)
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, base)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return path


def as_frame(array: np.ndarray, pixels: str, matrix: int | None = None, span: int | None = None) -> VideoFrame:
    """A frame in a pixel format, of rgb24, rgba or rgb48 values."""
    form = "rgb48le" if array.dtype == np.uint16 else "rgba" if array.shape[-1] == 4 else "rgb24"
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(array), format=form)
    how = {"dst_colorspace": matrix or None, "dst_color_range": span}
    return frame.reformat(format=pixels, **{name: value for name, value in how.items() if value})


def turned(source: Path, target: Path, a: float, b: float, c: float, d: float) -> Path:
    """An mp4 with another display matrix, as phones and editors write it."""
    data = bytearray(source.read_bytes())
    start = data.index(b"tkhd")
    at = start + 4 + 4 + (32 if data[start + 4] else 20) + 16
    values = [a * FIXED, b * FIXED, 0, c * FIXED, d * FIXED, 0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *map(round, values))
    target.write_bytes(data)
    return target


def edited(source: Path, target: Path, edits: Sequence[tuple[int, int]], rate: int = 16) -> Path:
    """An mp4 that shows only some of its frames: for each of `edits` so many, from the one of that number on.

    -1 instead of a number shows nothing for that long.
    """
    data = source.read_bytes()
    ticks = [struct.unpack_from(">I", data, data.index(name) + 16)[0] for name in (b"mvhd", b"mdhd")]
    old = data.find(b"elst")
    offset = struct.unpack_from(">i", data, old + 16)[0] if old > 0 else 0  # pictures in two directions start later
    table = struct.pack(">II", 0, len(edits))
    for count, first in edits:
        start = -1 if first < 0 else offset + first * ticks[1] // rate
        table += struct.pack(">IiI", count * ticks[0] // rate, start, FIXED)
    target.write_bytes(_with_edits(data, _box(b"edts", _box(b"elst", table))))
    return target


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _with_edits(boxes: bytes, edits: bytes) -> bytes:
    """The boxes of an mp4 with other edits: behind the header of its track, in the place of its own."""
    result, at = b"", 0
    while at < len(boxes):
        size, kind = struct.unpack_from(">I4s", boxes, at)
        whole = boxes[at : at + size]
        if kind in (b"moov", b"trak"):
            whole = _box(kind, _with_edits(whole[8:], edits))
        result += b"" if kind == b"edts" else whole + edits * (kind == b"tkhd")
        at += size
    return result


def packets_of(path: Path) -> list[Packet]:
    """The packets of a file's first stream."""
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(container.streams[0]) if packet.size]


def joined(sources: Sequence[Path], target: Path, step: int, first: int = 0, **muxer: str) -> Path:
    """The packets of files behind one another, each file `step` units of time after the one before.

    Without the `first` packets of all: so programs cut files that do not decode them.
    """
    timed = [(packet, number * step) for number, source in enumerate(sources) for packet in packets_of(source)]
    with av.open(str(sources[0])) as model, av.open(str(target), "w", options=muxer) as outside:
        copied = outside.add_stream_from_template(model.streams[0])
        for packet, later in timed[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, copied
            outside.mux(packet)
    return target


def together(target: Path, sources: Sequence[Path], covers: Sequence[Path] = ()) -> Path:
    """The first streams of several files in one; those of `covers` as pictures that players do not play."""
    with ExitStack() as stack:
        outside = stack.enter_context(av.open(str(target), "w"))
        models = [stack.enter_context(av.open(str(source))).streams[0] for source in sources]
        copied = [outside.add_stream_from_template(model) for model in models]
        for source, stream in zip(sources, copied, strict=True):
            if source in covers:
                stream.disposition = Disposition.attached_pic
        for source, stream in zip(sources, copied, strict=True):
            for packet in packets_of(source):
                packet.stream = stream
                outside.mux(packet)
    return target


def packed(source: Path, target: Path) -> Path:
    """An AVI of MPEG-4 with pictures in two directions as DivX and Xvid write it: two pictures in one packet.

    The packet after it holds an empty picture, so that there are as many packets as pictures.
    """
    start, coded = b"\0\0\1\xb6", packets_of(source)
    kinds = [bytes(packet)[bytes(packet).index(start) + 4] >> 6 for packet in coded]  # 2: in two directions
    with av.open(str(source)) as model, av.open(str(target), "w") as outside:
        stream = outside.add_stream_from_template(model.streams[0])
        contents: list[bytes] = []
        for packet, kind in zip(coded, kinds, strict=True):
            if kind != 2:
                contents.append(bytes(packet))
                continue
            before = contents[-1]
            at = before.index(start) + 4
            header = f"{int.from_bytes(before[at : at + 3], 'big'):024b}"  # kind, 1 for each second, 0, 1, time, 1
            end = header.index("0", 2) + 2 + 4 + 1
            empty = f"01{header[2:end]}00".ljust(24, "1")  # neither coded nor filled
            contents[-1] = before + bytes(packet)
            contents.append(start + int(empty, 2).to_bytes(3, "big"))
        contents[0] = contents[0].replace(start, b"\0\0\1\xb2DivX503b1393p" + start, 1)
        for number, content in enumerate(contents):
            made = Packet(content)
            made.pts = made.dts = number
            made.time_base, made.stream, made.is_keyframe = Fraction(1, 16), stream, coded[number].is_keyframe
            outside.mux(made)
    return target


def damaged(source: Path, target: Path, seed: int | None = None) -> Path:
    """A sixth of a file, in its middle, overwritten with zeros, or with a seed with random bytes."""
    data = bytearray(source.read_bytes())
    start, count = len(data) * 5 // 12, len(data) // 6
    data[start : start + count] = bytes(count) if seed is None else np.random.default_rng(seed).bytes(count)
    target.write_bytes(data)
    return target


def check_every_way_of_reading(path: Path, info: MediaInfo, whole: np.ndarray) -> None:
    """Frames read one by one, in ranges, scattered and after seeks are those of `whole`, (F, H, W, 3)."""
    count = info.frames
    assert count == len(whole), f"{count} frames, {len(whole)} decoded"
    ranges = [
        range(count),
        range(count // 2, count),
        range(count // 3, count // 3 + 3),
        range(0, count, 5),
        (0, count - 1),
    ]
    for wanted in [*([index] for index in range(count)), *ranges]:
        wanted = sorted({min(index, count - 1) for index in wanted})
        assert np.array_equal(read_pixels(path, wanted, info), whole[wanted]), f"frames {wanted} of {path.name}"

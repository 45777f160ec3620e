"""What a media file holds, found by reading it. Knows no model, and no torch: a child process starts in no time.

Nothing is taken from a header that the file itself can contradict.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from utils.common.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".avi", ".webm"})

# Where decord's frames equal FFmpeg's. Elsewhere it was measured to return other frames after a seek (HEVC, MPEG-4,
# open GOPs) or other colours (10 bit), without an error.
_DECORD_CODECS = frozenset({"h264"})
_DECORD_PIXELS = frozenset({"yuv420p", "yuvj420p"})
# VP8 keeps frames that are never shown in packets of their own: only decoding tells them apart.
_HIDDEN_FRAME_CODECS = frozenset({"vp8"})


class MediaError(UserError):
    """A media file that cannot be used: `path` says which, `reason` why, in one line. Survives pickling."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds, as displayed: sizes in pixels, frames that can be decoded, frames per second.

    `rotation` is how many degrees counterclockwise a video's stored frames are turned for display. Images have
    one frame and no fps; their orientation is already in the size.
    """

    width: int
    height: int
    frames: int
    fps: float | None
    rotation: int = 0


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown, in display order and in units of `unit` seconds; no times where the file gives none.

    `suits_decord` says that decord is exact here: a codec it decodes faithfully, in closed groups of pictures.
    """

    frames: int
    times: tuple[int, ...]
    keyframes: tuple[int, ...]
    unit: Fraction
    suits_decord: bool


def is_image(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `IMAGE_SUFFIXES`."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `VIDEO_SUFFIXES`."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def probe(path: Path) -> MediaInfo:
    """Size, frame count and frame rate of an image or a video, found by reading it rather than its header.

    Raises `MediaError` for a file that is missing, empty, cut short, or not of the kind its suffix says.
    """
    _require_content(path)
    if not is_image(path):
        return _probe_video(path)
    with open_image(path) as image:
        return MediaInfo(*ImageOps.exif_transpose(image).size, frames=1, fps=None)


def seconds(path: Path) -> list[float]:
    """When each frame of a video is shown, from its first: by its timestamps, or by its frame rate without them.

    Raises `MediaError` for a file that cannot be read, or that says neither.
    """
    timeline = read_timeline(path)
    if timeline.times:
        return [float((time - timeline.times[0]) * timeline.unit) for time in timeline.times]
    fps = probe(path).fps
    if fps is None:
        raise MediaError(path, "it has no timestamps and no frame rate")
    return [index / fps for index in range(timeline.frames)]


def read_timeline(path: Path) -> Timeline:
    """Demux the whole file. Raises `MediaError` where its header promises frames that are not there."""
    _require_content(path)
    status = path.stat()
    return _demuxed(path, status.st_mtime_ns, status.st_size)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A fully decoded image: `Image.verify` alone lets a JPEG that was cut short through."""
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(path, "not a readable image: damaged, cut short or of another kind") from error


@contextlib.contextmanager
def open_video(path: Path, options: dict[str, str] | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its main video stream; what FFmpeg raises inside becomes a `MediaError`.

    Decoding keeps to one thread: one that writes to the log waits for Python's lock, while Python, closing the
    decoder, waits for the thread. It is not slower for windows of this length.
    """
    try:
        with av.open(str(path), options=options or {}) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise MediaError(path, "there is no video in it")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        reason = f"not a readable video: damaged, cut short or of another kind ({error.strerror})"
        raise MediaError(path, reason) from error


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise MediaError(path, "there is no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "the file is empty")


def _probe_video(path: Path) -> MediaInfo:
    timeline = read_timeline(path)
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or timeline.frames == 0:
            raise MediaError(path, "not a single frame of it can be decoded")
        fps = stream.average_rate or stream.guessed_rate
        sideways = frame.rotation % 180 == 90
    width, height = (frame.height, frame.width) if sideways else (frame.width, frame.height)
    return MediaInfo(width, height, timeline.frames, float(fps) if fps else None, frame.rotation % 360)


@functools.lru_cache(maxsize=2**16)
def _demuxed(path: Path, modified: int, size: int) -> Timeline:
    """The timeline of the file as it was at `modified` with `size` bytes: two keys that outdate a remembered answer."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        codec, pixel_format, promised = stream.codec_context.name, stream.codec_context.pix_fmt, stream.frames
        unit = Fraction(stream.time_base)
    whole = sum(not packet.is_corrupt for packet in packets)
    if whole < len(packets) or (promised > whole and promised > _stored(path)):
        raise MediaError(path, f"cut short: only {whole} of its {max(promised, len(packets))} frames are there")
    times = _shown_times(path) if codec in _HIDDEN_FRAME_CODECS else [packet.pts for packet in packets]
    if None in times or len(set(times)) < len(times):
        return Timeline(len(times), (), (), unit, suits_decord=False)
    keyframes = tuple(sorted(packet.pts for packet in packets if packet.is_keyframe))
    faithful = codec in _DECORD_CODECS and pixel_format in _DECORD_PIXELS
    return Timeline(len(times), tuple(sorted(times)), keyframes, unit, faithful and _groups_are_closed(packets))


def _groups_are_closed(packets: list[av.Packet]) -> bool:
    """Whether no frame is shown before the keyframe that precedes it in the file: none needs the group before."""
    keyframe_time = None
    for packet in packets:
        if packet.is_keyframe:
            keyframe_time = packet.pts
        elif keyframe_time is None or packet.pts < keyframe_time:
            return False
    return True


def _stored(path: Path) -> int:
    """Frames in the file, those included that its edit list hides: a trimmed file rightly shows fewer than it has."""
    with open_video(path, options={"ignore_editlist": "1"}) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _shown_times(path: Path) -> list[int | None]:
    with open_video(path) as (container, stream):
        return [frame.pts for frame in container.decode(stream)]

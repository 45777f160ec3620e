"""Opens media files, and finds what they hold by reading them. Imports no torch, so that child processes start fast.

Headers are checked against the data that follows them. Decoders come from fixed lists: the content of a file never
makes another program run or another file open.
"""

import contextlib
import functools
import os
import stat
from collections.abc import Iterator, Sequence
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

# Any of these may stand behind any suffix: a WebP named .jpg is common. Pillow knows more formats, but it starts
# Ghostscript for PostScript. JPEG includes the MPO photographs of phones and stereo cameras.
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# FFmpeg's names for MP4 and MOV, MKV and WebM, and AVI. FFmpeg knows more formats, but some are scripts and playlists
# that make it read other files and addresses. Codecs need no list: they only see the packets of their own stream.
_VIDEO_CONTAINERS = "mov,matroska,avi"
_FFMPEG_OPTIONS = {"format_whitelist": _VIDEO_CONTAINERS, "protocol_whitelist": "file"}

# The files for which decord and FFmpeg return the same frames. For others decord was measured to return wrong frames
# after a seek (HEVC, MPEG-4, open GOPs) or wrong colours (10 bit), without an error.
_DECORD_CODECS = frozenset({"h264"})
_DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
# VP8 stores frames that are never shown in packets of their own; only decoding reveals which they are.
_HIDDEN_FRAME_CODECS = frozenset({"vp8"})


class MediaError(UserError):
    """A media file that cannot be used: its `path`, and the `reason` in one line. Can be pickled."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class MediaInfo:
    """Size as displayed, in pixels; number of frames that can be decoded; frames per second.

    `rotation` is the angle, in degrees counterclockwise, by which a video's stored frames are turned for display.
    An image has one frame and no fps, and its size already includes its orientation.
    """

    width: int
    height: int
    frames: int
    fps: float | None
    rotation: int = 0


@dataclass(frozen=True)
class Timeline:
    """Presentation times of a video's frames, ascending, in units of `time_base` seconds; none if the file has none.

    `suits_decord`: decord returns exact frames, because it decodes the codec correctly and all groups of pictures are
    closed.
    """

    frames: int
    times: tuple[int, ...]
    keyframes: tuple[int, ...]
    time_base: Fraction
    suits_decord: bool


def is_image(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `IMAGE_SUFFIXES`."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `VIDEO_SUFFIXES`."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def probe(path: Path) -> MediaInfo:
    """Size, frame count and frame rate of an image or a video, found by reading the whole file.

    Raises `MediaError` for a file that is missing, empty, not a regular file, cut short, or not in a known format.
    """
    if not is_image(path):
        return _probe_video(path)
    with open_image(path) as image:
        return MediaInfo(*ImageOps.exif_transpose(image).size, frames=1, fps=None)


def frame_times(path: Path) -> list[float]:
    """When each frame of a video is shown, in seconds after its first: by timestamps, or by frame rate without them.

    Raises `MediaError` for a file that cannot be read, or that has neither.
    """
    timeline = read_timeline(path)
    if timeline.times:
        return [float((time - timeline.times[0]) * timeline.time_base) for time in timeline.times]
    fps = probe(path).fps
    if fps is None:
        raise MediaError(path, "it has no timestamps and no frame rate")
    return [index / fps for index in range(timeline.frames)]


def read_timeline(path: Path) -> Timeline:
    """The timeline of a video, found by demuxing the whole file; remembered until the file changes.

    Raises `MediaError` for a file that cannot be read, or whose header promises frames that are missing.
    """
    status = _check_file(path)
    return _demux(path, status.st_mtime_ns, status.st_size)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A fully decoded image: `Image.verify` alone accepts a JPEG that was cut short. Raises `MediaError`."""
    _check_file(path)
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            image.load()
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a readable image: damaged, cut short, or neither JPEG, PNG, WebP nor BMP"
        raise MediaError(path, reason) from error


@contextlib.contextmanager
def open_video(path: Path, options: dict[str, str] | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container and its main video stream; what FFmpeg raises inside becomes a `MediaError`.

    Decoding uses one thread. With more, a thread that writes to the log waits for Python's lock, while Python, closing
    the decoder, waits for the thread. For windows of this length one thread is as fast.
    """
    _check_file(path)
    try:
        # Absolute, because FFmpeg takes what precedes a colon in a relative path for a protocol.
        with av.open(str(path.absolute()), options=(options or {}) | _FFMPEG_OPTIONS) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise MediaError(path, "it contains no video")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        formats = "neither MP4, MOV, MKV, WebM nor AVI"
        reason = f"not a readable video: damaged, cut short, or {formats} ({error.strerror})"
        raise MediaError(path, reason) from error


def _check_file(path: Path) -> os.stat_result:
    """The status of a regular file with content. Others are refused before they are opened: a pipe may never end."""
    try:
        status = path.stat()
    except (FileNotFoundError, ValueError):  # ValueError: a null character in the name
        raise MediaError(path, "there is no such file") from None
    except OSError as error:
        raise MediaError(path, f"the file cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "not a regular file, but a folder, a pipe or a device")
    if status.st_size == 0:
        raise MediaError(path, "the file is empty")
    return status


def _probe_video(path: Path) -> MediaInfo:
    timeline = read_timeline(path)
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or timeline.frames == 0:
            raise MediaError(path, "none of its frames can be decoded")
        fps = stream.average_rate or stream.guessed_rate
        sideways = frame.rotation % 180 == 90
    width, height = (frame.height, frame.width) if sideways else (frame.width, frame.height)
    return MediaInfo(width, height, timeline.frames, float(fps) if fps else None, frame.rotation % 360)


@functools.lru_cache(maxsize=2**16)
def _demux(path: Path, modified: int, size: int) -> Timeline:
    """The timeline of the file that was `modified` at this time with `size` bytes; both only distinguish versions."""
    with open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        codec, pixel_format, promised = stream.codec_context.name, stream.codec_context.pix_fmt, stream.frames
        time_base = stream.time_base or Fraction(0)
    whole = sum(not packet.is_corrupt for packet in packets)
    if whole < len(packets) or (promised > whole and promised > _count_stored(path)):
        raise MediaError(path, f"cut short: only {whole} of its {max(promised, len(packets))} frames are there")
    shown = _decode_times(path) if codec in _HIDDEN_FRAME_CODECS else [packet.pts for packet in packets]
    times = sorted({time for time in shown if time is not None})
    if len(times) < len(shown) or not time_base:
        return Timeline(len(shown), (), (), time_base, suits_decord=False)
    keyframes = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
    exact = codec in _DECORD_CODECS and pixel_format in _DECORD_PIXEL_FORMATS and _groups_are_closed(packets)
    return Timeline(len(times), tuple(times), tuple(keyframes), time_base, exact)


def _groups_are_closed(packets: Sequence[av.Packet]) -> bool:
    """Whether no frame is shown before the keyframe that precedes it in the file, so that none needs an older group."""
    keyframe_time: int | None = None
    for packet in packets:
        if packet.pts is None:
            return False
        if packet.is_keyframe:
            keyframe_time = packet.pts
        elif keyframe_time is None or packet.pts < keyframe_time:
            return False
    return True


def _count_stored(path: Path) -> int:
    """Frames in the file, including those that its edit list hides: a trimmed file rightly shows fewer than it has."""
    with open_video(path, options={"ignore_editlist": "1"}) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _decode_times(path: Path) -> list[int | None]:
    with open_video(path) as (container, stream):
        return [frame.pts for frame in container.decode(stream)]

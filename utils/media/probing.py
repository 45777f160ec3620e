"""Finds what a media file holds by reading it: what a header says is checked against the data that follows.

Imports no torch, so that child processes start fast.
"""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from utils.common.errors import UserError
from utils.common.files import file_stamp
from utils.common.formatting import counted as number_of
from utils.media.description import (
    FLAGGED,
    HDR_NOTE,
    IMAGE_SUFFIXES,
    VIDEO,
    VIDEO_SUFFIXES,
    WIDE_NOTE,
    Look,
    MediaError,
    MediaInfo,
    Timeline,
)
from utils.media.files import check_file
from utils.media.images import probe_image
from utils.media.jpeg import jpeg_damage
from utils.media.rendering import has_transparency, look_of, shown_size, to_pixels
from utils.media.stream import Listen, Packets, Progress, Stream, read_stream
from utils.media.video import Video, open_video

# The files for which decord and FFmpeg return the same frames. For others decord was measured to return wrong frames
# after a seek (HEVC, MPEG-4, AVI, open GOPs) or wrong colours (10 bit), without an error.
DECORD_CODECS = frozenset({"h264"})
DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
DECORD_CONTAINERS = ("mov", "matroska")  # in an AVI it returns the first frames after any seek
UNEVEN = 0.1  # share by which a frame rate may differ from that of the timestamps
TILTED = 1.0  # degrees


def is_image(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `IMAGE_SUFFIXES`."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    """Whether the suffix, in any case, is one of `VIDEO_SUFFIXES`."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def probe(
    path: Path,
    full: bool = False,
    threads: int = 1,
    listen: Listen = lambda: "",
    progress: Progress = lambda position: None,
) -> MediaInfo:
    """The description of an image or a video, found by reading the whole file; with `full` by decoding it.

    Without `full`, packets are trusted to hold a picture each, for the codecs whose packets do. Raises `MediaError` for
    a file that is missing, empty, not a regular file, cut short, or not in a known format, and with `full` for one that
    is damaged anywhere.
    """
    stamp = file_stamp(check_file(path))
    try:
        if is_image(path):
            info = _probe_image(path, full, listen, progress)
        else:
            info = _probe_video(path, full, threads, listen, progress)
    except UserError:
        raise
    except Exception as error:  # a decoder's, of any type: only here is it known which file it is about
        raise MediaError(path, f"it cannot be read: {type(error).__name__}: {error}") from error
    return replace(info, stamp=stamp)


def _probe_image(path: Path, full: bool, listen: Listen, progress: Progress) -> MediaInfo:
    info, damage = probe_image(path, progress), jpeg_damage(path, listen) if full else ""
    if damage:
        raise MediaError(path, f"damaged: {damage}")
    return info


def _probe_video(path: Path, full: bool, threads: int, listen: Listen, progress: Progress) -> MediaInfo:
    with open_video(path, threads) as video:
        # An AVI's header counts repeated frames too, which are not stored.
        promised = len(video.stream.index_entries) if _is_whole_avi(path) else video.stream.frames
        stream = read_stream(path, video, full, listen, progress)
        look, tilt = _look(stream, video)
        _check_colours(path, stream.first, look)
        suits_decord = _suits_decord(video, stream, look)
        timeline = Timeline(stream.times, stream.keyframes, video.stream.time_base or Fraction(0), suits_decord)
        rate = _frame_rate(video.stream.average_rate or video.stream.guessed_rate, timeline)
        renumbered = _is_renumbered(video, stream, look)
    _check_whole(path, stream.packets, promised)
    notes = tuple(_notes(look, stream, tilt))
    return MediaInfo(
        *shown_size(stream.first, look), stream.count, rate, VIDEO, look, timeline, notes, full, renumbered
    )


def _check_colours(path: Path, frame: VideoFrame, look: Look) -> None:
    """Raises `MediaError` for colours that FFmpeg decodes, but does not convert: YCgCo is one of them."""
    try:
        to_pixels(frame, look, VideoReformatter())
    except av.FFmpegError:
        raise MediaError(path, "its colours cannot be converted to RGB: convert it to BT.709") from None


def _check_whole(path: Path, packets: Packets, promised: int) -> None:
    """Raises `MediaError` for packets that are incomplete, or fewer than the file promises."""
    stored, corrupt = len(packets.times) + packets.empty, len(packets.corrupt)
    if corrupt and not packets.is_cut:
        raise MediaError(path, f"damaged: {corrupt} of its {stored} frames are incomplete")
    if corrupt or (promised > stored and promised > _count_stored(path)):
        whole = len(packets.times) - corrupt
        raise MediaError(path, f"cut short: only {whole} of its {max(promised, stored)} frames are there")


def _look(stream: Stream, video: Video) -> tuple[Look, float]:
    """How the frames are to be shown, and by how many degrees they are tilted, which is not applied."""
    look, tilt = look_of(stream.first, video)
    if len(stream.frames.sizes) > 1 and look.scaled is None:
        look = replace(look, scaled=(stream.first.width, stream.first.height))
    if stream.frames.flagged and not look.interlaced:
        look = replace(look, interlaced=FLAGGED)
    return look, tilt


def _is_renumbered(video: Video, stream: Stream, look: Look) -> bool:
    """Whether frames have other numbers than in versions up to 0.2.

    These counted packets, of VP8 decoded frames, and read wrong frames of H.264 in AVI and with intra refresh.
    """
    codec = video.decoder.name
    if codec == "h264" and video.container.format.name == "avi":
        return True
    if _is_plain(video, stream, look) and stream.packets.is_refreshed:
        return True
    packets, times = stream.packets.times, stream.times
    before = tuple(sorted({time for time in packets if time is not None}))
    differs = times != before if times and len(before) == len(packets) else stream.count != len(packets)
    return differs and codec not in ("vp8", "libvpx")


def _suits_decord(video: Video, stream: Stream, look: Look) -> bool:
    return _is_plain(video, stream, look) and not stream.packets.is_refreshed


def _is_plain(video: Video, stream: Stream, look: Look) -> bool:
    container, codec = video.container.format.name, video.decoder
    is_known = len(video.container.streams.video) == 1  # of several decord may take another
    is_known &= any(name in container for name in DECORD_CONTAINERS) and codec.name in DECORD_CODECS
    is_known &= codec.pix_fmt in DECORD_PIXEL_FORMATS and look == Look()
    return is_known and stream.packets.has_closed_groups and bool(stream.times)


def _frame_rate(rate: Fraction | None, timeline: Timeline) -> float | None:
    """Frames per second: as stated, or by the timestamps where these say something else."""
    seconds = timeline.seconds() if len(timeline.times) > 1 else [0.0]
    real = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else None
    if rate and (real is None or abs(float(rate) / real - 1) <= UNEVEN):
        return float(rate)
    return real


def _notes(look: Look, stream: Stream, tilt: float) -> Iterator[str]:
    if look.transfer:
        yield HDR_NOTE
    elif look.primaries:
        yield WIDE_NOTE
    if len(stream.frames.sizes) > 1:
        yield "frames of several sizes, scaled to that of the first"
    elif look.scaled:
        yield "pixels made square"
    if look.interlaced:
        yield "deinterlaced"
    elif stream.frames.combing.is_combed:
        yield "looks interlaced, though it does not say so: deinterlace it"
    if look.transparent and has_transparency(stream.first):
        yield "transparent areas on white"
    if tilt >= TILTED:
        yield f"its tilt of {tilt:.0f} degrees is not applied"
    if stream.ends_early:
        yield "its end is missing"
    if stream.missing > 0:
        yield f"without {number_of(stream.missing, 'frame')} at its start that cannot be decoded"


def _is_whole_avi(path: Path) -> bool:
    """Whether the file is an AVI as long as its header says, so that it has its index."""
    with path.open("rb") as file:
        header = file.read(12)
    is_avi = header[:4] == b"RIFF" and header[8:] == b"AVI "
    return is_avi and path.stat().st_size >= 8 + int.from_bytes(header[4:8], "little")


def _count_stored(path: Path) -> int:
    """Packets in the file, including those that its edit list hides: a trimmed file rightly shows fewer than it has."""
    with open_video(path, options={"ignore_editlist": "1"}) as video:
        return sum(1 for _ in video.packets())

"""Finds what a media file holds by reading it: what a header says is checked against the data that follows.

Imports no torch, so that child processes start fast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import av
from av.packet import Packet
from av.video.frame import VideoFrame

from utils.common.errors import UserError
from utils.common.files import file_stamp
from utils.common.formatting import counted as number_of
from utils.media.combing import Combing
from utils.media.description import (
    HDR_NOTE,
    IMAGE_SUFFIXES,
    VIDEO,
    VIDEO_SUFFIXES,
    Look,
    MediaError,
    MediaInfo,
    Timeline,
)
from utils.media.files import check_file
from utils.media.images import probe_image
from utils.media.rendering import is_see_through, look_of, shown_size
from utils.media.video import Video, open_video

# The files for which decord and FFmpeg return the same frames. For others decord was measured to return wrong frames
# after a seek (HEVC, MPEG-4, AVI, open GOPs) or wrong colours (10 bit), without an error.
DECORD_CODECS = frozenset({"h264"})
DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
DECORD_CONTAINERS = ("mov", "matroska")  # in an AVI it returns the first frames after any seek
# Their packets hold one picture each. Others hide pictures, repeat them, or put several in a packet.
PLAIN_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg", "prores", "dnxhd", "ffv1"})
# What FFmpeg reports as an error though no picture changes.
HARMLESS = (
    *("mmco: unref", "co located pocs", "number of reference frames", "illegal short term buffer", "sei type"),
    *("decode app fields", "ended prematurely", "timecode", "icc profile", "unsupported side data"),
)
UNEVEN = 0.1  # share by which a frame rate may differ from that of the timestamps
TILTED = 1.0  # degrees

Listen = Callable[[], str]  # what FFmpeg has reported as errors since the last call
Progress = Callable[[int], None]  # called with the number of bytes of the file that have been decoded so far


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
        info = probe_image(path) if is_image(path) else _probe_video(path, full, threads, listen, progress)
    except UserError:
        raise
    except Exception as error:  # a decoder's, of any type: only here is it known which file it is about
        raise MediaError(path, f"it cannot be read: {type(error).__name__}: {error}") from error
    return replace(info, stamp=stamp)


@dataclass
class _Packets:
    """What the packets of a stream say, in their order in the file. Packets that an edit list hides are not counted."""

    times: list[int | None] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    corrupt: list[int | None] = field(default_factory=list)  # times of those that were cut or lost
    empty: int = 0  # these repeat a picture
    is_ragged: bool = False  # pictures come before the first keyframe, in the file or when shown
    is_closed: bool = True  # no frame is shown before the keyframe that precedes it, so that none needs an older group

    @property
    def first_key(self) -> int | None:
        return self.keyframes[0] if self.keyframes else None

    def add(self, packet: Packet) -> None:
        if packet.is_discard:
            return
        if not packet.size:
            self.empty += 1
            return
        time = packet.pts
        self.times.append(time)
        if packet.is_keyframe and time is not None:
            self.keyframes.append(time)
        if packet.is_corrupt:
            self.corrupt.append(time)
        self.is_closed &= time is not None and bool(self.keyframes) and time >= self.keyframes[-1]
        self.is_ragged |= time is not None and (not self.keyframes or time < self.keyframes[0])


@dataclass
class _Frames:
    """What decoded frames say, in the order in which they are shown."""

    times: list[int | None] = field(default_factory=list)
    keyframes: set[int | None] = field(default_factory=set)
    flagged: int = 0  # of two fields, by the decoder
    combing: Combing = field(default_factory=Combing)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    first: VideoFrame | None = None

    def add(self, frame: VideoFrame) -> None:
        self.first = self.first or frame
        self.times.append(time_of(frame))
        if frame.key_frame:
            self.keyframes.add(time_of(frame))
        self.flagged += frame.interlaced_frame
        self.combing.add(frame)
        self.sizes.add((frame.width, frame.height))

    def have_reached(self, time: int | None) -> bool:
        """Whether a frame of this time, or a later one, is among them."""
        last = self.times[-1] if self.times else None
        return time is not None and last is not None and last >= time


def time_of(frame: VideoFrame) -> int | None:
    """When a frame is shown; where the file says only when it is decoded, that."""
    return frame.dts if frame.pts is None else frame.pts


def _probe_video(path: Path, full: bool, threads: int, listen: Listen, progress: Progress) -> MediaInfo:
    with open_video(path, threads) as video:
        stream, promised, codec = video.stream, video.stream.frames, video.decoder.name
        # An AVI does not say when pictures that are stored in another order are shown.
        is_unordered = video.container.format.name == "avi" and stream.codec_context.has_b_frames
        decodes_all = full or codec not in PLAIN_CODECS or bool(is_unordered)
        if _is_whole_avi(path):
            promised = len(stream.index_entries)  # its header also counts repeated frames, which are not stored
        packets, frames = _read_through(path, video, decodes_all, listen, progress)
        if frames.first is None:
            raise MediaError(path, "none of its frames can be decoded")
        look, tilt = look_of(frames.first, video)
        several_sizes = len(frames.sizes) > 1
        if several_sizes and look.scaled is None:
            look = replace(look, scaled=(frames.first.width, frames.first.height))
        if frames.flagged and not look.combed:
            look = replace(look, combed="some")
        rate = stream.average_rate or stream.guessed_rate
        if decodes_all and len(packets.keyframes) == len(packets.times) and not _is_intra_only(video):
            # Containers without a list of keyframes take all pictures for such.
            packets.keyframes = [time for time in packets.keyframes if time in frames.keyframes]
        times, keyframes = _shown_times(packets, frames, decodes_all)
        suits_decord = _suits_decord(video, packets, look) and bool(times)
        timeline = Timeline(times, keyframes, stream.time_base or Fraction(0), suits_decord)
        count = len(frames.times) if decodes_all else len(times) or len(packets.times)
        counted = _counts_anew(video, packets, times, count)
    stored = len(packets.times) + packets.empty
    if packets.corrupt or (promised > stored and promised > _count_stored(path)):
        whole = len(packets.times) - len(packets.corrupt)
        raise MediaError(path, f"cut short: only {whole} of its {max(promised, stored)} frames are there")
    missing = len(packets.times) - count if packets.is_ragged else 0
    notes = (*_look_notes(look, frames, several_sizes), *_notes(tilt, missing))
    size = shown_size(frames.first, look)
    return MediaInfo(*size, count, _frame_rate(rate, timeline), VIDEO, look, timeline, notes, full, counted)


def _read_through(
    path: Path, video: Video, decodes_all: bool, listen: Listen, progress: Progress
) -> tuple[_Packets, _Frames]:
    """All packets, with all frames or only the first ones: up to the first keyframe.

    What goes wrong before that is shown is no damage: a file that was cut there lacks what these frames need.
    """
    packets, frames = _Packets(), _Frames()
    listen()  # what opening the file reported is about all of its streams
    for packet in chain(video.packets(), (None,)):
        if packet is not None:
            packets.add(packet)
            if packet.is_corrupt:
                continue
        is_leading = packets.is_ragged and not frames.have_reached(packets.first_key)
        if not decodes_all and frames.first is not None and not is_leading:
            continue
        error = _decode(video, packet, frames, packets.first_key if is_leading else None)
        error = _harmful(listen()) or error
        if error and not is_leading:
            raise MediaError(path, f"damaged {_place(frames, video)}: {error}")
        progress(packet.pos or 0 if packet is not None else 0)
    return packets, frames


def _decode(video: Video, packet: Packet | None, frames: _Frames, first_key: int | None) -> str:
    """Adds the frames that are complete with a packet; returns what is wrong with them, if anything.

    Incomplete frames before `first_key` are left out.
    """
    try:
        decoded = video.decode(packet)
    except av.FFmpegError as error:
        return str(error.strerror)
    for frame in decoded:
        if frame.is_corrupt:
            time = time_of(frame)
            if first_key is None or time is None or time >= first_key:
                return "a picture is incomplete"
        else:
            frames.add(frame)
    return ""


def _harmful(reported: str) -> str:
    """The first line of FFmpeg's reports that is about pictures, without its prefix; nothing if there is none."""
    for line in reported.splitlines():
        text = "".join(character for character in line.partition("] ")[2] if character.isprintable())
        if text and not any(word in line.lower() for word in HARMLESS):
            return text[:80]
    return ""


def _place(frames: _Frames, video: Video) -> str:
    first, last = (frames.times[0], frames.times[-1]) if frames.times else (None, None)
    if first is None or last is None or not video.stream.time_base:
        return f"after frame {len(frames.times)}"
    return f"after {float((last - first) * video.stream.time_base):.2f} s"


def _shown_times(packets: _Packets, frames: _Frames, decodes_all: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """When the frames are shown, and which of these times are keyframes; nothing where the file does not say it."""
    times = list(frames.times)
    if not decodes_all:
        first_key = packets.first_key
        leading = [time for time in frames.times if time is not None and first_key is not None and time < first_key]
        later = (time for time in packets.times if time is None or first_key is None or time >= first_key)
        times = [*leading, *sorted(later, key=lambda time: -1 if time is None else time)]
    known = [time for time in times if time is not None]
    if len(known) < len(times) or any(one >= next for one, next in pairwise(known)):
        return (), ()
    return tuple(known), tuple(sorted(set(packets.keyframes) & set(known)))


def _counts_anew(video: Video, packets: _Packets, times: tuple[int, ...], count: int) -> bool:
    """Whether frames have other numbers than in versions up to 0.2.

    These counted packets, of VP8 decoded frames, and read the wrong frames of H.264 in AVI.
    """
    codec = video.decoder.name
    if codec == "h264" and video.container.format.name == "avi":
        return True
    before = tuple(sorted({time for time in packets.times if time is not None}))
    had_times = len(before) == len(packets.times)
    return codec not in ("vp8", "libvpx") and (times != before if times and had_times else count != len(packets.times))


def _suits_decord(video: Video, packets: _Packets, look: Look) -> bool:
    container, codec = video.container.format.name, video.decoder
    is_known = len(video.container.streams.video) == 1  # of several it may take another
    is_known &= any(name in container for name in DECORD_CONTAINERS) and codec.name in DECORD_CODECS
    return is_known and codec.pix_fmt in DECORD_PIXEL_FORMATS and packets.is_closed and look == Look()


def _is_intra_only(video: Video) -> bool:
    return video.decoder.codec.intra_only or video.decoder.name == "cfhd"  # FFmpeg does not say it of CineForm


def _frame_rate(rate: Fraction | None, timeline: Timeline) -> float | None:
    """Frames per second: as stated, or by the timestamps where these say something else."""
    seconds = timeline.seconds() if len(timeline.times) > 1 else [0.0]
    real = (len(seconds) - 1) / seconds[-1] if seconds[-1] > 0 else None
    if rate and (real is None or abs(float(rate) / real - 1) <= UNEVEN):
        return float(rate)
    return real


def _look_notes(look: Look, frames: _Frames, several_sizes: bool) -> Iterator[str]:
    if look.curve:
        yield HDR_NOTE
    elif look.primaries:
        yield "wide colours converted"
    if several_sizes:
        yield "frames of several sizes, scaled to that of the first"
    elif look.scaled:
        yield "pixels made square"
    if look.combed:
        yield "deinterlaced"
    elif frames.combing.is_combed:
        yield "looks interlaced, though it does not say so: deinterlace it"
    if look.transparent and frames.first is not None and is_see_through(frames.first):
        yield "transparent areas on white"


def _notes(tilt: float, missing: int) -> Iterator[str]:
    if tilt >= TILTED:
        yield f"its tilt of {tilt:.0f} degrees is not applied"
    if missing > 0:
        yield f"without {number_of(missing, 'frame')} at its start that cannot be decoded"


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

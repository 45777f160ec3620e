"""Reads a video stream through: what its packets and its frames say, and where it is damaged. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import av
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame

from utils.media.combing import Combing
from utils.media.description import MediaError
from utils.media.video import Video

# Their packets hold one picture each. Others hide pictures, repeat them, or put several in a packet.
PLAIN_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg", "prores", "dnxhd", "ffv1"})
REFRESHED = ("h264", "hevc")  # whose encoders can renew pictures bit by bit instead of all at once
ENDED = "ended prematurely"  # FFmpeg's words for a file without its end
# What FFmpeg reports as an error though no picture changes.
HARMLESS = (
    *("mmco: unref", "co located pocs", "number of reference frames", "illegal short term buffer", "sei type"),
    *("decode app fields", ENDED, "timecode", "icc profile", "unsupported side data"),
)

Listen = Callable[[], str]  # what FFmpeg has reported as errors since the last call
Progress = Callable[[int], None]  # called with the number of bytes of the file that have been decoded so far


@dataclass
class Packets:
    """What the packets of a stream say, in their order in the file. Packets that an edit list hides are not counted."""

    times: list[int | None] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    corrupt: list[int | None] = field(default_factory=list)  # times of those that were cut or lost
    is_refreshed: bool = False  # some keyframes are not coded alone: pictures are renewed bit by bit
    is_cut: bool = False  # the last one was
    empty: int = 0  # these repeat a picture
    starts_mid_group: bool = False  # pictures come before the first keyframe, in the file or when shown
    has_closed_groups: bool = (
        True  # no frame is shown before the keyframe that precedes it, so that none needs an older group
    )

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
        self.is_cut = packet.is_corrupt
        if packet.is_corrupt:
            self.corrupt.append(time)
        self.has_closed_groups &= time is not None and bool(self.keyframes) and time >= self.keyframes[-1]
        self.starts_mid_group |= time is not None and (not self.keyframes or time < self.keyframes[0])


@dataclass
class Frames:
    """What decoded frames say, in the order in which they are shown."""

    times: list[int | None] = field(default_factory=list)
    keyframes: set[int | None] = field(default_factory=set)
    intra: set[int | None] = field(default_factory=set)  # those that are coded without others
    flagged: int = 0  # of two fields, by the decoder
    combing: Combing = field(default_factory=Combing)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    first: VideoFrame | None = None

    def add(self, frame: VideoFrame) -> None:
        self.first = self.first or frame
        self.times.append(time_of(frame))
        if frame.key_frame:
            self.keyframes.add(time_of(frame))
        if frame.pict_type == PictureType.I:
            self.intra.add(time_of(frame))
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


@dataclass(frozen=True)
class Stream:
    """What was read: all packets, and all frames where the stream `is_decoded`, else the first ones."""

    packets: Packets
    frames: Frames
    first: VideoFrame
    is_decoded: bool
    ends_early: bool = False

    @cached_property
    def times(self) -> tuple[int, ...]:
        """When its frames are shown, ascending; nothing where the file does not say it."""
        times = list(self.frames.times)
        if not self.is_decoded:
            first_key = self.packets.first_key
            leading = [time for time in times if time is not None and first_key is not None and time < first_key]
            later = (time for time in self.packets.times if time is None or first_key is None or time >= first_key)
            times = [*leading, *sorted(later, key=lambda time: -1 if time is None else time)]
        known = [time for time in times if time is not None]
        if len(known) < len(times) or any(one >= next for one, next in pairwise(known)):
            return ()
        return tuple(known)

    @property
    def keyframes(self) -> tuple[int, ...]:
        """The times from which it can be decoded."""
        return tuple(sorted(set(self.packets.keyframes) & set(self.times)))

    @property
    def count(self) -> int:
        """How many frames it has."""
        return len(self.frames.times) if self.is_decoded else len(self.times) or len(self.packets.times)

    @property
    def missing(self) -> int:
        """How many frames at its start cannot be decoded: they need others that were cut off."""
        return len(self.packets.times) - self.count if self.packets.starts_mid_group else 0


def read_stream(path: Path, video: Video, full: bool, listen: Listen, progress: Progress) -> Stream:
    """Reads all packets of a video, and decodes all frames, or where its packets hold one each only the first ones.

    What goes wrong before the first keyframe is shown is no damage: a file that was cut there lacks what these frames
    need. Raises `MediaError` for damage anywhere else that is decoded, and if no frame can be.
    """
    # An AVI does not say when pictures that are stored in another order are shown.
    is_unordered = video.container.format.name == "avi" and video.stream.codec_context.has_b_frames
    decodes_all = full or video.decoder.name not in PLAIN_CODECS or bool(is_unordered)
    packets, frames, ends_early = Packets(), Frames(), False
    listen()  # what opening the file reported is about all of its streams
    for packet in chain(video.packets(), (None,)):
        if packet is not None:
            packets.add(packet)
            if packet.is_corrupt:
                continue
        is_leading = packets.starts_mid_group and not frames.have_reached(packets.first_key)
        if not decodes_all and frames.first is not None and not is_leading:
            continue
        error = _decode(video, packet, frames, packets.first_key if is_leading else None)
        reported = listen()
        ends_early |= ENDED in reported
        error = harmful(reported) or error
        if error and not is_leading:
            raise MediaError(path, f"damaged {_place(frames, video)}: {error}")
        progress(packet.pos or 0 if packet is not None else 0)
    if frames.first is None:
        raise MediaError(path, "none of its frames can be decoded")
    if decodes_all and len(packets.keyframes) == len(packets.times) and not video.is_intra_only:
        # Containers without a list of keyframes take all pictures for such.
        packets.keyframes = [time for time in packets.keyframes if time in frames.keyframes]
    if decodes_all and video.decoder.name in REFRESHED:
        packets.is_refreshed = not frames.intra.issuperset(packets.keyframes)
        packets.keyframes = [time for time in packets.keyframes if time in frames.intra]
    return Stream(packets, frames, frames.first, decodes_all, ends_early)


def _decode(video: Video, packet: Packet | None, frames: Frames, first_key: int | None) -> str:
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


def harmful(reported: str) -> str:
    """The first line of FFmpeg's reports that is about pictures, without its prefix; nothing if there is none."""
    for line in reported.splitlines():
        text = "".join(character for character in line.partition("] ")[2] if character.isprintable())
        if text and not any(word in line.lower() for word in HARMLESS):
            return text[:80]
    return ""


def _place(frames: Frames, video: Video) -> str:
    first, last = (frames.times[0], frames.times[-1]) if frames.times else (None, None)
    if first is None or last is None or not video.stream.time_base:
        return f"after frame {len(frames.times)}"
    return f"after {float((last - first) * video.stream.time_base):.2f} s"

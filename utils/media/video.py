"""Opens video files. Imports no torch, so that child processes start fast.

Demuxers come from a fixed list: the content of a file never makes another program run or another file open.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from utils.media.description import MediaError
from utils.media.files import check_file

# FFmpeg's names. It knows more formats, but some are scripts and playlists that make it read other files and
# addresses. Codecs need no list: they only see the packets of their own stream.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,dv"
KNOWN = "none of MP4, MOV, MKV, WebM, AVI, MPEG, TS, WMV, FLV, OGG, MXF and DV"
FFMPEG_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}

MAX_PIXELS = (2**31 - 1) // 8  # of a picture, FFmpeg's limit
# FFmpeg's own decoders of these ignore transparency.
_DECODERS_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Video:
    """An open container, its main video stream, and the decoder of that stream.

    `primaries` and `transfer` are the container's, by the numbers of ITU-T H.273: decoders forget them.
    """

    container: InputContainer
    stream: VideoStream
    decoder: VideoCodecContext
    primaries: int
    transfer: int

    @property
    def is_intra_only(self) -> bool:
        """Whether every frame can be decoded alone; FFmpeg does not say it of CineForm."""
        return self.decoder.codec.intra_only or self.decoder.name == "cfhd"

    def packets(self) -> Iterator[Packet]:
        """The packets of the stream from here on. Empty ones repeat a picture."""
        return (packet for packet in self.container.demux(self.stream) if packet.dts is not None or packet.size)

    def decode(self, packet: Packet | None) -> list[VideoFrame]:
        """The frames that are complete with this packet; with None those that are left."""
        return self.decoder.decode(packet) if packet is None or packet.size else []


@contextlib.contextmanager
def open_video(path: Path, threads: int = 1, options: dict[str, str] | None = None) -> Iterator[Video]:
    """An open video; what FFmpeg raises inside becomes a `MediaError`.

    With more than one thread, one that writes to PyAV's log waits for Python's lock, while Python, closing the decoder,
    waits for the thread: restore FFmpeg's own log first. For short windows one thread is as fast.
    """
    check_file(path)
    is_open = False
    try:
        # Absolute, because FFmpeg takes what precedes a colon in a relative path for a protocol.
        with av.open(str(path.absolute()), options=(options or {}) | FFMPEG_OPTIONS) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
                raise MediaError(path, "it contains no video")
            _check_size(path, stream)
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            decoder = _decoder(stream)
            decoder.thread_count, decoder.thread_type = threads, "AUTO"
            stated, is_open = stream.codec_context, True
            yield Video(container, stream, decoder, stated.color_primaries, stated.color_trc)
    except av.FFmpegError as error:
        kind = "damaged" if is_open else f"not a readable video: damaged, cut short, or {KNOWN}"
        raise MediaError(path, f"{kind} ({error.strerror})") from error


def _check_size(path: Path, stream: VideoStream) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise MediaError(path, f"its pictures have {width}x{height} pixels, more than FFmpeg decodes: scale it down")


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """The stream's own decoder, or one that also decodes its transparency."""
    own = stream.codec_context
    name = _DECODERS_WITH_ALPHA.get(own.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return own
    decoder = av.CodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.extradata = own.extradata
    return decoder

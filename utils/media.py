"""Media files to pixels and back: probe, decode, crop, resize, write. Knows no model.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8 RGB everywhere.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.atomic import replacing
from utils.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".avi", ".webm"})

# Where decord's frames equal FFmpeg's. Elsewhere it was measured to return other frames after a seek (HEVC, MPEG-4,
# open GOPs) or other colours (10 bit), without an error.
_DECORD_CODECS = frozenset({"h264"})
_DECORD_PIXELS = frozenset({"yuv420p", "yuvj420p"})
# VP8 keeps frames that are never shown in packets of their own: only decoding tells them apart.
_HIDDEN_FRAME_CODECS = frozenset({"vp8"})

_SHEET_CELL = 240
_SHEET_GAP = 6
_SHEET_TEXT = 18


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
class _Timeline:
    """When each frame is shown, in display order and the stream's time base; no times where the file gives none.

    `suits_decord` says that decord is exact here: a codec it decodes faithfully, in closed groups of pictures.
    """

    frames: int
    times: tuple[int, ...]
    keyframes: tuple[int, ...]
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
    with _opened_image(path) as image:
        return MediaInfo(*ImageOps.exif_transpose(image).size, frames=1, fps=None)


def read_frames(path: Path, indices: Sequence[int], info: MediaInfo | None = None) -> Tensor:
    """Frames `indices` (strictly ascending) of a video, or (0,) of an image, upright.

    `info` is what `probe` said of this file, where that is known already. Returns uint8 (F, 3, H, W).
    Raises `MediaError` for a file that cannot be read or has no such frame, and `ValueError` for indices in another
    order.
    """
    indices = list(indices)
    if not indices or indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
        raise ValueError(f"frame indices must be ascending and not negative, not {indices}")
    info = info or probe(path)
    available = 1 if is_image(path) else _timeline(path).frames
    if indices[-1] >= available:
        raise MediaError(path, f"frame {indices[-1]} was asked for, but only frames 0 to {available - 1} are there")
    if is_image(path):
        pixels = np.asarray(_open_rgb(path))[None].copy()
    else:
        pixels = _read_with_decord(path, indices, info)
        pixels = _read_with_pyav(path, indices) if pixels is None else pixels
    frames = rearrange(torch.from_numpy(pixels), "f h w c -> f c h w")
    return torch.rot90(frames, info.rotation // 90, (2, 3)) if info.rotation else frames


def crop_and_resize(
    frames: Tensor,
    width: int,
    height: int,
    position: tuple[float, float] = (0.5, 0.5),
    like: tuple[int, int] | None = None,
) -> Tensor:
    """Cut the largest region of the target's aspect ratio out of uint8 (F, 3, H, W), then resize it.

    `position` places the region: fractions 0..1 of the free room, x then y. `like` is the (width, height) on which
    the region is decided when `frames` are another rendering of the same picture; it is cut at the same fractions.
    Returns contiguous uint8 (F, 3, height, width).

    Bicubic with antialiasing: on real frames made 1.5 to 2 times smaller it lies 4 to 5 dB nearer to the ideal
    low-pass than bilinear does, which blurs.
    """
    own_height, own_width = frames.shape[-2:]
    like_width, like_height = like or (own_width, own_height)
    scale = min(like_width / width, like_height / height)
    left, right = _span(like_width, round(width * scale), position[0], own_width)
    top, bottom = _span(like_height, round(height * scale), position[1], own_height)
    region = frames[..., top:bottom, left:right]
    if region.shape[-2:] != (height, width):
        region = functional.resize(region, [height, width], InterpolationMode.BICUBIC, antialias=True)
    return region.contiguous()


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Write uint8 (F, 3, H, W) as H.264 in an mp4 file that every player opens (yuv420p, BT.709, CRF 17).

    An odd side gets its last row or column twice, because 4:2:0 colour needs even sides. The file appears under its
    name only when it is complete. Raises `OSError` when the folder cannot be written.
    """
    height, width = frames.shape[-2:]
    padded = functional.pad(frames, [0, 0, width % 2, height % 2], padding_mode="edge")
    with replacing(path) as unfinished, av.open(str(unfinished), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "17"})
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for pixels in rearrange(padded, "f c h w -> f h w c").contiguous().numpy(force=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def save_image(path: Path, image: Image.Image) -> None:
    """Write a PNG that appears under its name only when it is complete."""
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG")


def contact_sheet(rows: list[tuple[str, Tensor]], columns: int = 8) -> Image.Image:
    """One labelled strip per video: up to `columns` evenly spaced frames of each uint8 (F, 3, H, W), in order."""
    strips = [(label, thumbnails(frames, columns, _SHEET_CELL)) for label, frames in rows]
    label_height = _SHEET_TEXT + 2 * _SHEET_GAP
    width = max(len(cells) for _, cells in strips) * (_SHEET_CELL + _SHEET_GAP) + _SHEET_GAP
    height = sum(label_height + cells[0].height + _SHEET_GAP for _, cells in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_SHEET_TEXT)
    y = 0
    for label, cells in strips:
        draw.text((_SHEET_GAP, y + _SHEET_GAP), _shortened(label, font, width - 2 * _SHEET_GAP), "black", font)
        y += label_height
        for column, cell in enumerate(cells):
            sheet.paste(cell, (_SHEET_GAP + column * (_SHEET_CELL + _SHEET_GAP), y))
        y += cells[0].height + _SHEET_GAP
    return sheet


def thumbnails(frames: Tensor, count: int, width: int) -> list[Image.Image]:
    """At most `count` evenly spaced frames of uint8 (F, 3, H, W), in order, each `width` pixels wide."""
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    size = (width, max(1, round(width * frames.shape[-2] / frames.shape[-1])))
    pixels = rearrange(frames[chosen], "f c h w -> f h w c").contiguous().numpy(force=True)
    return [Image.fromarray(cell).resize(size, Image.Resampling.BICUBIC) for cell in pixels]


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise MediaError(path, "there is no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "the file is empty")


@contextlib.contextmanager
def _opened_image(path: Path) -> Iterator[Image.Image]:
    """A fully decoded image: `Image.verify` alone lets a JPEG that was cut short through."""
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(path, "not a readable image: damaged, cut short or of another kind") from error


def _open_rgb(path: Path) -> Image.Image:
    """An upright 8-bit RGB image: 16-bit values are scaled, and what is transparent shows white."""
    with _opened_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            return Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8)).convert("RGB")
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return upright.convert("RGB")


@contextlib.contextmanager
def _opened_video(path: Path, options: dict[str, str] | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
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


def _probe_video(path: Path) -> MediaInfo:
    timeline = _timeline(path)
    with _opened_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or timeline.frames == 0:
            raise MediaError(path, "not a single frame of it can be decoded")
        fps = stream.average_rate or stream.guessed_rate
        sideways = frame.rotation % 180 == 90
    width, height = (frame.height, frame.width) if sideways else (frame.width, frame.height)
    return MediaInfo(width, height, timeline.frames, float(fps) if fps else None, frame.rotation % 360)


def _timeline(path: Path) -> _Timeline:
    """Demux the whole file. Raises `MediaError` where its header promises frames that are not there."""
    _require_content(path)
    status = path.stat()
    return _demuxed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2**16)
def _demuxed(path: Path, modified: int, size: int) -> _Timeline:
    """`_timeline` of the file as it was at `modified` with `size` bytes: two keys that outdate a remembered answer."""
    with _opened_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        codec, pixel_format, promised = stream.codec_context.name, stream.codec_context.pix_fmt, stream.frames
    whole = sum(not packet.is_corrupt for packet in packets)
    if whole < len(packets) or (promised > whole and promised > _stored(path)):
        raise MediaError(path, f"cut short: only {whole} of its {max(promised, len(packets))} frames are there")
    times = _shown_times(path) if codec in _HIDDEN_FRAME_CODECS else [packet.pts for packet in packets]
    if None in times or len(set(times)) < len(times):
        return _Timeline(len(times), (), (), suits_decord=False)
    keyframes = tuple(sorted(packet.pts for packet in packets if packet.is_keyframe))
    faithful = codec in _DECORD_CODECS and pixel_format in _DECORD_PIXELS
    return _Timeline(len(times), tuple(sorted(times)), keyframes, faithful and _groups_are_closed(packets))


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
    with _opened_video(path, options={"ignore_editlist": "1"}) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _shown_times(path: Path) -> list[int | None]:
    with _opened_video(path) as (container, stream):
        return [frame.pts for frame in container.decode(stream)]


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
    if decord is None or info.rotation or not _timeline(path).suits_decord:
        return None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        return reader.get_batch(indices).asnumpy() if len(reader) == info.frames else None
    except (decord.DECORDError, RuntimeError):
        return None


def _read_with_pyav(path: Path, indices: list[int]) -> np.ndarray:
    """Frames `indices` (ascending) as stored, (F, H, W, 3). Seeks by presentation time, or counts from the start."""
    timeline = _timeline(path)
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
    with _opened_video(path) as (container, stream):
        if entry is not None:
            container.seek(entry, stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            label = count if entry is None else frame.pts
            if label in sought:
                found.append(to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray())
            if label is not None and label >= wanted[-1]:
                break
    return found


def _span(available: int, size: int, position: float, own: int) -> tuple[int, int]:
    """Start and end of `size` out of `available`, placed at `position`, in the pixels of an axis of length `own`."""
    size = min(max(size, 1), available)
    start = round(position * (available - size))
    first, last = round(start * own / available), round((start + size) * own / available)
    first = min(first, own - 1)
    return first, max(last, first + 1)


def _shortened(label: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """`label` on one line, cut with dots where it is wider than `room` pixels."""
    shown = label = " ".join(label.split())[: round(room)]
    while label and font.getlength(shown) > room:
        label = label[:-1]
        shown = label + "..."
    return shown

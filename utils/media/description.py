"""What a media file holds: found once by reading it, then handed on to planning and decoding.

A description can be pickled, and travels as JSON from the process that made it and in the cache.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from utils.common.errors import UserError

# Read by Pillow: pictures, and animations of at least as many pictures as a video needs.
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .avifs .mpo".split())
# Read by FFmpeg.
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .qt .3gp .3g2 .mkv .webm .avi .divx .ts .mts .m2ts .m2t .mpg .mpeg .mpe .m2p .m2v .m1v .vob"
    " .mod .tod .wmv .asf .flv .f4v .ogv .ogm .mxf .dv".split()
)
# Known, but no decoder of ours reads them: they are listed, so that nobody believes they were trained on.
UNREAD_SUFFIXES = frozenset(
    ".heic .heif .hif .jxl .jp2 .j2k .jpx .psd .psb .xcf .kra .svg .tga .exr .hdr .ico .ppm .pgm .pnm .dds .raw .dng"
    " .cr2 .cr3 .nef .arw .orf .rw2 .raf .rm .rmvb .swf .y4m .braw .r3d .insv .264 .265 .h264 .h265 .hevc .ivf".split()
)
MIN_VIDEO_FRAMES = 5

IMAGE, ANIMATION, VIDEO = "image", "animation", "video"
HDR_NOTE, WIDE_NOTE = "HDR, tone-mapped", "wide colours converted"
FLAGGED, ALL = "flagged", "all"  # which frames are interlaced
OPACITY, LABELS, COLOURS, BRIGHTNESS = "opacity", "labels", "colours", "brightness"  # by which a mask is read
TURNED = (1, 3, 6, 8)  # orientations that are not mirrored


class MediaError(UserError):
    """A media file that cannot be used: its `path`, and the `reason` in one line. Can be pickled."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Look:
    """What stored pictures need to become those that a player shows. By default nothing.

    `orientation` counts as EXIF does: 1 upright, 3 turned by 180 degrees, 6 and 8 by 90, the others mirrored.
    `scaled` is the (width, height) that stored pictures get before they are turned: their pixels are not square, or
    their size changes within the file. `transfer` is "pq" or "hlg" for HDR, `primaries` "bt2020" or "p3" for colours
    that BT.709 does not have. `interlaced` is FLAGGED where the decoder says which frames are of two fields each, or
    ALL. `icc`: colours are converted from an ICC profile to sRGB.
    """

    orientation: int = 1
    scaled: tuple[int, int] | None = None
    transfer: str = ""
    primaries: str = ""
    interlaced: str = ""
    transparent: bool = False
    icc: bool = False

    @property
    def reaches_back(self) -> int:
        """How many frames before one must be decoded with it."""
        return 1 if self.interlaced else 0

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from pictures that are shown as stored, or turned: versions up to 0.2 knew nothing else."""
        own = {name: value for name, value in asdict(self).items() if value != getattr(Look, name)}
        if self.orientation in TURNED:
            own.pop("orientation", None)
        return own


@dataclass(frozen=True)
class Timeline:
    """When a video's frames are shown, ascending, in units of `time_base` seconds; no `times` if the file says nothing.

    `keyframes` are the times from which decoding can start. `suits_decord`: decord returns exact frames, because it
    decodes the codec correctly and all groups of pictures are closed.
    """

    times: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    time_base: Fraction = Fraction(0)
    suits_decord: bool = False

    def seconds(self) -> list[float]:
        """The times in seconds after the first frame."""
        return [float((time - self.times[0]) * self.time_base) for time in self.times]


@dataclass(frozen=True)
class Coverage:
    """How a mask is read, by a name of `utils.media.masks`, and its values: their mean in 0..1, the ends of 255."""

    rule: str
    share: float
    least: int
    most: int
    is_new: bool = False  # its values are other ones than in versions up to 0.2


@dataclass(frozen=True)
class MediaInfo:
    """Size as shown, in pixels; number of frames that can be decoded; frames per second, None for a single picture.

    `kind` is IMAGE, ANIMATION (several pictures in an image format) or VIDEO. `notes` say in a few words what is done
    to show it as players do, and what is not. `is_whole`: every frame has been decoded without an error.
    `renumbered`: the frames are numbered as they decode, where packets would number them in another way. `mask` is
    there where the file was described as a mask. `stamp` is the `file_stamp` of the file that was
    read, and `digest` the SHA-256 of its content, if it was hashed.
    """

    width: int
    height: int
    frames: int
    fps: float | None
    kind: str = VIDEO
    look: Look = Look()
    timeline: Timeline = Timeline()
    notes: tuple[str, ...] = ()
    is_whole: bool = False
    renumbered: bool = False
    mask: Coverage | None = None
    stamp: tuple[int, ...] = field(default=(), compare=False)
    digest: str = field(default="", compare=False)

    @property
    def is_image(self) -> bool:
        """Whether it is a single picture."""
        return self.kind == IMAGE

    @property
    def reading(self) -> dict[str, Any]:
        """How its pictures are read, where versions up to 0.2 read other ones; empty for most files."""
        own = {
            "renumbered": self.renumbered,
            "mask": self.mask.rule if self.mask and self.mask.rule != BRIGHTNESS else "",
        }
        return self.look.changes | {name: value for name, value in own.items() if value}

    def frame_times(self) -> list[float]:
        """When each frame is shown, in seconds after the first: by timestamps, or by frame rate without them.

        Raises ValueError for a file that has neither.
        """
        if self.timeline.times:
            return self.timeline.seconds()
        if self.fps is None:
            raise ValueError("it has no timestamps and no frame rate")
        return [index / self.fps for index in range(self.frames)]


def to_json(info: MediaInfo) -> dict[str, Any]:
    """A description as JSON values."""
    values = asdict(info)
    values["timeline"]["time_base"] = str(info.timeline.time_base)
    return values


def from_json(values: Mapping[str, Any]) -> MediaInfo:
    """The description that `to_json` gave.

    Raises ValueError, or KeyError, TypeError or ArithmeticError, for one that no file can have.
    """
    if set(values) != {part.name for part in fields(MediaInfo)}:
        raise KeyError("a field is missing or unknown")
    look, timeline = values["look"], values["timeline"]
    times, keyframes = (tuple(timeline[name]) for name in ("times", "keyframes"))
    whole = {
        "look": Look(**{**look, "scaled": look["scaled"] and tuple(look["scaled"])}),
        "timeline": Timeline(times, keyframes, _fraction(timeline["time_base"]), timeline["suits_decord"]),
        "notes": tuple(values["notes"]),
        "mask": values["mask"] and Coverage(**values["mask"]),
        "stamp": tuple(values["stamp"]),
    }
    info = MediaInfo(**{**values, **whole})
    if not _is_possible(info):
        raise ValueError("no file has such a description")
    return info


def _fraction(text: str) -> Fraction:
    """A fraction written as two whole numbers; other notations could stand for numbers of any length."""
    if not re.fullmatch(r"[0-9]{1,18}(/[0-9]{1,18})?", text):
        raise ValueError("not a fraction")
    return Fraction(text)


def _is_possible(info: MediaInfo) -> bool:
    """Whether all values have the types and bounds that those of files have."""
    look, timeline, mask = info.look, info.timeline, info.mask
    counts = [info.width, info.height, info.frames, *(look.scaled or ())]
    texts = [*info.notes, info.digest]
    switches = [look.transparent, look.icc, timeline.suits_decord, info.is_whole, info.renumbered]
    return (
        all(type(count) is int and 0 < count < 2**31 for count in counts)
        and all(type(number) is int for number in (*timeline.times, *timeline.keyframes, *info.stamp))
        and all(type(text) is str and text.isprintable() for text in texts)
        and all(type(switch) is bool for switch in switches)
        and (info.fps is None or (type(info.fps) is float and 0 < info.fps < 1e9))
        and info.kind in (IMAGE, ANIMATION, VIDEO)
        and look.orientation in range(1, 9)
        and (look.scaled is None or len(look.scaled) == 2)
        and look.transfer in ("", "pq", "hlg")
        and look.primaries in ("", "bt2020", "p3")
        and look.interlaced in ("", FLAGGED, ALL)
        and len(timeline.times) in (0, info.frames)
        and all(one < later for one, later in pairwise(timeline.times))
        and (mask is None or _is_possible_mask(mask))
    )


def _is_possible_mask(mask: Coverage) -> bool:
    is_known = mask.rule in (OPACITY, LABELS, COLOURS, BRIGHTNESS) and type(mask.is_new) is bool
    return is_known and type(mask.share) is float and 0 <= mask.share <= 1 and 0 <= mask.least <= mask.most <= 255

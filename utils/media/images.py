"""Pictures and animations, read by Pillow: upright, in 8-bit sRGB, on white. Imports no torch.

Letters in shapes: `F` frames, `H` height, `W` width.
"""

import contextlib
import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from utils.media.colour import HDR_TRANSFERS, WIDE_PRIMARIES, to_sdr
from utils.media.description import (
    ANIMATION,
    HDR_NOTE,
    IMAGE,
    MIN_VIDEO_FRAMES,
    WIDE_NOTE,
    Look,
    MediaError,
    MediaInfo,
    Timeline,
)
from utils.media.files import check_file

# Any of these may stand behind any suffix: a WebP named .jpg is common. Pillow knows more formats, but it starts
# Ghostscript for PostScript. JPEG includes the MPO photographs of phones and stereo cameras.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
KNOWN = "neither JPEG, PNG, WebP, BMP, GIF, TIFF nor AVIF"
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # the further pictures of others are pages, or what another eye sees

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # where Pillow refuses; from half of that on it would warn
Image.MAX_IMAGE_PIXELS = None
# Tools that make pictures store their whole workflow in a PNG, which takes more than Pillow's 1 MiB of text.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26

SHORTEST, BROWSERS = 11, 100  # milliseconds: what browsers show for less time than the first, they show for the second
SAME_COLOUR = 2  # of 255: profiles that change no colour by more are sRGB
# Pillow's mode of the values that a profile is about, by its name of them, and modes that are converted to it.
PROFILED = {"RGB": ("RGB", "RGBA", "P", "PA", "L", "LA", "1"), "GRAY": ("L", "LA", "1"), "CMYK": ("CMYK",)}
META = 2**20  # bytes of an AVIF's meta box that are read


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A decoded image: `Image.verify` alone accepts a JPEG that was cut short. Raises `MediaError`."""
    check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = f"the {MAX_PIXELS // 10**6} million that are read"
                raise MediaError(path, f"it has {image.width}x{image.height} pixels, more than {limit}: reduce it")
            image.load()
            yield image
    except MemoryError:
        raise MediaError(path, "main memory is too small to read it: reduce it") from None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error) as error:
        limit = f" (Pillow: {error})" if "MAX_TEXT" in str(error) else ""
        raise MediaError(path, f"not a readable image: damaged, cut short, or {KNOWN}{limit}") from error


def probe_image(path: Path, progress: Callable[[int], None] = lambda position: None) -> MediaInfo:
    """The description of a picture, or of an animation that has as many pictures as a video needs.

    Every picture is decoded; `progress` is called with the share of the file, in bytes. Raises `MediaError`.
    """
    with open_image(path) as image:
        if image.mode == "F":
            raise MediaError(path, "its values are fractions: save it with 8 or 16 bits")
        shown, look = _shown(image), _look(path)
        profile, notes = _profile(image)
        if look.transfer or look.primaries:  # what the format itself states comes before a profile
            profile, notes = None, (HDR_NOTE if look.transfer else WIDE_NOTE,)
        look = replace(look, icc=profile is not None)
        if len(shown) < MIN_VIDEO_FRAMES:
            width, height = ImageOps.exif_transpose(image).size
            count = getattr(image, "n_frames", 1) if image.format == "TIFF" else len(shown)
            notes += (f"the first of its {count} pictures",) * (count > 1)
            return MediaInfo(width, height, 1, None, IMAGE, look, notes=notes, is_whole=True)
        durations: list[int] = []
        for number in shown:
            image.seek(number)
            image.load()
            progress(path.stat().st_size * len(durations) // len(shown))
            milliseconds = round(image.info.get("duration") or 0)
            durations.append(milliseconds if milliseconds >= SHORTEST else BROWSERS)
        times = tuple(sum(durations[:number]) for number in range(len(shown)))
        timeline, fps = Timeline(times, times[:1], Fraction(1, 1000)), 1000 * len(shown) / sum(durations)
        notes = ("an animation", *notes)
        return MediaInfo(*image.size, len(shown), fps, ANIMATION, look, timeline, notes, is_whole=True)


def read_images(path: Path, indices: Sequence[int], look: Look, alpha: bool = False) -> np.ndarray:
    """Pictures `indices` of an animation, or (0,) of an image: uint8 (F, H, W, 3), with `alpha` RGBA (F, H, W, 4).

    Raises `MediaError`.
    """
    pictures = []
    with open_image(path) as image:
        shown, profile = _shown(image), _profile(image)[0] if look.icc else None
        for index in indices:
            image.seek(shown[index])
            picture = image if len(shown) >= MIN_VIDEO_FRAMES else ImageOps.exif_transpose(image)
            if alpha:
                pictures.append(np.array(picture.convert("RGBA")))
                continue
            pixels = np.array(_to_rgb(picture, profile))
            is_wide = look.transfer or look.primaries
            pictures.append(to_sdr(pixels.astype(np.uint16) * 257, look) if is_wide else pixels)
    return np.stack(pictures)


def read_raw(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The stored values (H, W) or (H, W, 3) of an upright picture, and its opacity (H, W), None where all is opaque.

    Colours of a palette are looked up; numbers of 16 bits stay such. Raises `MediaError`.
    """
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image)
        opacity = np.array(upright.convert("RGBA"))[..., 3] if upright.has_transparency_data else None
        is_plain = upright.mode == "L" or upright.mode.startswith("I")
        return np.array(upright if is_plain else upright.convert("RGB")), opacity


def _shown(image: Image.Image) -> list[int]:
    """The numbers of the pictures that belong together: all of an animation, the first one of others.

    The first picture of an animated PNG can be one for programs that show no animations.
    """
    count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
    return list(range(1 if count > 1 and getattr(image, "default_image", False) else 0, count))


def _to_rgb(picture: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """8-bit sRGB: larger values are scaled, colours of a profile converted, and transparent areas become white."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        scale = 1 if picture.mode == "I" and values.max() <= 255 else 257  # 32 bits may hold 8, 16 always mean 16
        shown = np.rint(values / scale).clip(0, 255).astype(np.uint8)
        shown[values == picture.info.get("transparency", -1)] = 255
        return Image.fromarray(shown).convert("RGB")
    if not picture.has_transparency_data:
        return _to_srgb(picture, profile)
    rgba = picture.convert("RGBA")
    colours = _to_srgb(rgba.convert("RGB"), profile).convert("RGBA")
    colours.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), colours).convert("RGB")


def _to_srgb(picture: Image.Image, profile: ImageCms.ImageCmsProfile | None) -> Image.Image:
    """RGB, with the colours of a profile converted: relative to white, black stays black."""
    if profile is None:
        return picture.convert("RGB")
    converted = ImageCms.profileToProfile(
        picture.convert(PROFILED[profile.profile.xcolor_space.strip()][0]),
        profile,
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        "RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # it is only where the picture is converted in place
    return converted


def _profile(image: Image.Image) -> tuple[ImageCms.ImageCmsProfile | None, tuple[str, ...]]:
    """The profile from which colours have to be converted, if there is one, and what the user should know of it."""
    data = image.info.get("icc_profile")
    if not data:
        return None, ()
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        own, *others = PROFILED[profile.profile.xcolor_space.strip()]
        is_srgb = own == "RGB" and _is_srgb(profile)
        name = " ".join(ImageCms.getProfileDescription(profile).split())[:30]
    except (OSError, KeyError, ImageCms.PyCMSError):
        return None, ("its colour profile is damaged and not used",)
    if image.mode not in (own, *others):
        return None, ("its colour profile is for other pictures and not used",)
    if is_srgb:
        return None, ()
    return profile, (f"colours converted from {name}" if name.isprintable() and name else "colours converted to sRGB",)


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether converting RGB changes no colour of a grid by more than rounding does."""
    steps = np.linspace(0, 255, 6).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    converted = np.asarray(_to_srgb(Image.fromarray(colours), profile))
    return bool(np.abs(converted.astype(int) - colours).max() <= SAME_COLOUR)


def _look(path: Path) -> Look:
    """HDR as a PNG's cICP chunk or an AVIF's colr box states it, by the numbers of ITU-T H.273."""
    with path.open("rb") as file:
        head = file.read(8)
        primaries, transfer = _png_codes(file) if head.startswith(b"\x89PNG") else _avif_codes(file, head)
    name = HDR_TRANSFERS.get(transfer, "")
    return Look(transfer=name, primaries=WIDE_PRIMARIES.get(primaries, "bt2020" if name else ""))


def _png_codes(file: BinaryIO) -> tuple[int, int]:
    """Primaries and transfer of the cICP chunk, which stands before the pixels; zeros without one."""
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"cICP" and size == 4:
            primaries, transfer, _, _ = file.read(4)
            return primaries, transfer
        if kind == b"IDAT":
            break
        file.seek(size + 4, os.SEEK_CUR)  # and a checksum
    return 0, 0


def _avif_codes(file: BinaryIO, head: bytes) -> tuple[int, int]:
    """Primaries and transfer in the meta box of a file that begins with `head`; zeros without them."""
    size, kind = struct.unpack(">I4s", head.ljust(8, b"\0"))
    while kind != b"meta" and size >= 8 and kind.isalnum():
        file.seek(size - 8, os.SEEK_CUR)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
    meta = file.read(min(size, META)) if kind == b"meta" else b""
    at = meta.find(b"colrnclx")
    return struct.unpack(">HH", meta[at + 8 : at + 12]) if 0 <= at <= len(meta) - 12 else (0, 0)

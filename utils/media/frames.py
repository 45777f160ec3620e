"""Pixels as tensors: read, crop, resize, write. Knows no model.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8 RGB everywhere.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.common.files import replacing
from utils.media.decoding import read_pixels
from utils.media.probing import MediaInfo

_SHEET_CELL = 240
_SHEET_GAP = 6
_SHEET_TEXT = 18


def read_frames(path: Path, indices: Sequence[int], info: MediaInfo | None = None) -> Tensor:
    """`read_pixels` as a tensor: uint8 (F, 3, H, W). Raises as it does."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(read_pixels(path, indices, info))), "f h w c -> f c h w")


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
    Returns uint8 (F, 3, height, width), channels last in memory.

    Bicubic with antialiasing: on real frames made 1.5 to 2 times smaller it lies 4 to 5 dB nearer to the ideal
    low-pass than bilinear does, which blurs.
    """
    own_height, own_width = frames.shape[-2:]
    like_width, like_height = like or (own_width, own_height)
    scale = min(like_width / width, like_height / height)
    left, right = _span(like_width, round(width * scale), position[0], own_width)
    top, bottom = _span(like_height, round(height * scale), position[1], own_height)
    # In rows of pixels, as decoders give them, and one frame at a time through one buffer: large new ones cost as much
    # time as resizing does.
    rows = rearrange(frames, "f c h w -> f h w c")[:, top:bottom, left:right]
    done = torch.empty(len(rows), height, width, 3, dtype=torch.uint8)
    cut = torch.empty(rows.shape[1:], dtype=torch.uint8)
    for frame, place in zip(rows, done, strict=True):
        cut.copy_(frame)
        resized = rearrange(cut, "h w c -> 1 c h w")
        if rows.shape[1:3] != (height, width):
            resized = functional.resize(resized, [height, width], InterpolationMode.BICUBIC, antialias=True)
        place.copy_(rearrange(resized, "1 c h w -> h w c"))
    return rearrange(done, "f h w c -> f c h w")


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

"""Overviews of videos as images: thumbnails, and labelled sheets of them. Knows no model.

Letters in shapes: `F` frames, `H` height, `W` width. Pixels are uint8 RGB.
"""

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, TEXT = 240, 6, 18  # pixels: width of a thumbnail, space around it, size of the font


def contact_sheet(rows: list[tuple[str, Tensor]], columns: int = 8) -> Image.Image:
    """One labelled strip per video, uint8 (F, 3, H, W): up to `columns` evenly spaced frames, in order."""
    strips = [(label, thumbnails(frames, columns, CELL)) for label, frames in rows]
    label_height = TEXT + 2 * GAP
    width = max(len(cells) for _, cells in strips) * (CELL + GAP) + GAP
    height = sum(label_height + cells[0].height + GAP for _, cells in strips)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT)
    y = 0
    for label, cells in strips:
        draw.text((GAP, y + GAP), _shorten(label, font, width - 2 * GAP), "black", font)
        y += label_height
        for column, cell in enumerate(cells):
            sheet.paste(cell, (GAP + column * (CELL + GAP), y))
        y += cells[0].height + GAP
    return sheet


def column_sheet(columns: list[tuple[str, Tensor]], rows: int = 8) -> Image.Image:
    """One labelled column per video, uint8 (F, 3, H, W), all of one shape: the same up to `rows` frames of each."""
    strips = [(label, thumbnails(frames, rows, CELL)) for label, frames in columns]
    (_, first), *_ = strips
    step, top = first[0].height + GAP, TEXT + 2 * GAP
    sheet = Image.new("RGB", (len(columns) * (CELL + GAP) + GAP, top + len(first) * step), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT)
    for column, (label, cells) in enumerate(strips):
        left = GAP + column * (CELL + GAP)
        draw.text((left, GAP), _shorten(label, font, CELL), "black", font)
        for row, cell in enumerate(cells):
            sheet.paste(cell, (left, top + row * step))
    return sheet


def thumbnails(frames: Tensor, count: int, width: int) -> list[Image.Image]:
    """At most `count` evenly spaced frames of uint8 (F, 3, H, W), in order, each `width` pixels wide."""
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    size = (width, max(1, round(width * frames.shape[-2] / frames.shape[-1])))
    pixels = rearrange(frames[chosen], "f c h w -> f h w c").contiguous().numpy(force=True)
    return [Image.fromarray(cell).resize(size, Image.Resampling.BICUBIC) for cell in pixels]


def _shorten(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`label` on one line, truncated with dots if it is wider than `width` pixels."""
    shown = label = " ".join(label.split())[:width]
    while label and font.getlength(shown) > width:
        label = label[:-1]
        shown = label + "..."
    return shown

"""The demo's picture: a row per prompt, a column without the LoRA and one with it."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.media.contact_sheet import thumbnails

CELL, GAP, FRAMES_SHOWN = 96, 6, 4
TEXT_WIDTH, TEXT_SIZE, TEXT_COLUMNS, LINE = 250, 15, 32, 19
HEADER = 34


def comparison(rows: Sequence[tuple[str, Sequence[Tensor]]], titles: Sequence[str]) -> Image.Image:
    """A row per prompt with a strip of frames per title. `rows` holds each prompt and its videos (F, 3, H, W) uint8."""
    strip = FRAMES_SHOWN * (CELL + GAP)
    size = (TEXT_WIDTH + len(titles) * (strip + 2 * GAP), HEADER + len(rows) * (CELL + 2 * GAP))
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    for column, title in enumerate(titles):
        draw.text((_left(column), GAP), title, "black", font)
    for number, (prompt, videos) in enumerate(rows):
        top = HEADER + number * (CELL + 2 * GAP)
        for line, text in enumerate(textwrap.wrap(prompt, TEXT_COLUMNS)):
            draw.text((GAP, top + line * LINE), text, "black", font)
        for column, frames in enumerate(videos):
            for place, cell in enumerate(thumbnails(frames, FRAMES_SHOWN, CELL)):
                picture.paste(cell, (_left(column) + place * (CELL + GAP), top))
    return picture


def _left(column: int) -> int:
    return TEXT_WIDTH + column * (FRAMES_SHOWN * (CELL + GAP) + 2 * GAP)

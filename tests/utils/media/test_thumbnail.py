"""Pictures of videos as text."""

import base64
from io import BytesIO

import pytest
import torch
from PIL import Image

from utils.media.thumbnail import thumbnail


def opened(text: str) -> Image.Image:
    kind, _, content = text.partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(BytesIO(base64.b64decode(content, validate=True)))
    picture.load()
    assert picture.format == "JPEG" and picture.mode == "RGB"
    return picture


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(832, 480, (256, 148)), (480, 832, (148, 256)), (256, 256, (256, 256)), (64, 48, (64, 48)), (1664, 64, (256, 10))],
)
def test_a_picture_keeps_its_shape_within_256_pixels_and_is_never_enlarged(width, height, size):
    assert opened(thumbnail(torch.zeros(1, 3, height, width, dtype=torch.uint8))).size == size


@pytest.mark.parametrize(("frames", "middle"), [(1, 0), (5, 2), (4, 2)])
def test_the_middle_frame_is_shown_in_its_colours(frames, middle):
    video = torch.zeros(frames, 3, 32, 48, dtype=torch.uint8)
    video[middle] = torch.tensor([250, 120, 10], dtype=torch.uint8)[:, None, None]
    red, green, blue = opened(thumbnail(video)).getpixel((20, 10))
    assert abs(red - 250) <= 3 and abs(green - 120) <= 3 and abs(blue - 10) <= 3

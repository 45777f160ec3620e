"""A small picture of a video as text, as the metadata of files holds it. Knows no model."""

import base64
from io import BytesIO

from PIL import Image
from torch import Tensor

SIDE = 256  # pixels of the longer side, as ModelSpec 1.0 recommends
QUALITY = 85
PREFIX = "data:image/jpeg;base64,"


def thumbnail(frames: Tensor) -> str:
    """A data URI with the middle frame of uint8 RGB (F, 3, H, W) as JPEG, whose sides are at most SIDE pixels.

    The middle one, because the first may be a picture that the model was given.
    """
    middle = frames[len(frames) // 2].permute(1, 2, 0).contiguous().numpy(force=True)
    picture = Image.fromarray(middle)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    content = BytesIO()
    picture.save(content, format="JPEG", quality=QUALITY)
    return PREFIX + base64.b64encode(content.getvalue()).decode("ascii")

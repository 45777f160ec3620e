"""Frames as tensors: read, crop, resize, write. Knows no model.

Letters in shapes: `F` frames, `C` channels, `H` height, `W` width. Pixels are uint8 RGB, masks have one channel.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.common.files import replacing
from utils.media.decoding import read_pixels
from utils.media.description import MediaInfo
from utils.media.masks import read_mask


def read_frames(path: Path, indices: Sequence[int], info: MediaInfo | None = None) -> Tensor:
    """The frames of `read_pixels` as a tensor: uint8 (F, 3, H, W). Raises the same errors."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(read_pixels(path, indices, info))), "f h w c -> f c h w")


def read_mask_frames(path: Path, indices: Sequence[int], info: MediaInfo) -> Tensor:
    """The masks of `read_mask` as a tensor: uint8 (F, 1, H, W). Raises the same errors."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(read_mask(path, indices, info))), "f h w -> f 1 h w")


def crop_and_resize(
    frames: Tensor,
    width: int,
    height: int,
    position: tuple[float, float] = (0.5, 0.5),
    like: tuple[int, int] | None = None,
) -> Tensor:
    """Crop uint8 (F, C, H, W) to the target's aspect ratio, as large as possible, then resize.

    `position` places the crop: fractions 0..1 of the free space, x then y. `like` is the (width, height) for which
    the crop is computed, if `frames` are another rendering of the same picture; they are cropped at the same fractions.
    Returns uint8 (F, C, height, width), channels last in memory.

    Bicubic with antialiasing: when real frames are reduced by 1.5 to 2, it is 4 to 5 dB closer to the ideal low-pass
    filter than bilinear, which blurs.
    """
    own_height, own_width = frames.shape[-2:]
    like_width, like_height = like or (own_width, own_height)
    scale = min(like_width / width, like_height / height)
    left, right = _span(like_width, round(width * scale), position[0], own_width)
    top, bottom = _span(like_height, round(height * scale), position[1], own_height)
    # Channels last, the layout of decoded frames, and one frame at a time through one buffer: allocating large new
    # buffers takes as long as resizing.
    rows = rearrange(frames, "f c h w -> f h w c")[:, top:bottom, left:right]
    result = torch.empty(len(rows), height, width, rows.shape[-1], dtype=torch.uint8)
    cropped = torch.empty(rows.shape[1:], dtype=torch.uint8)
    for frame, target in zip(rows, result, strict=True):
        cropped.copy_(frame)
        resized = rearrange(cropped, "h w c -> 1 c h w")
        if rows.shape[1:3] != (height, width):
            resized = functional.resize(resized, [height, width], InterpolationMode.BICUBIC, antialias=True)
        target.copy_(rearrange(resized, "1 c h w -> h w c"))
    return rearrange(result, "f h w c -> f c h w")


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Write uint8 (F, 3, H, W) as H.264 in an MP4 file that every player opens (yuv420p, BT.709, CRF 17).

    If a side is odd, its last row or column is repeated, because 4:2:0 colour requires even sides. The file appears
    under its name only when it is complete. Raises `OSError` if the folder cannot be written.
    """
    height, width = frames.shape[-2:]
    padded = functional.pad(frames, [0, 0, width % 2, height % 2], padding_mode="edge")
    # Absolute, because FFmpeg takes what precedes a colon in a relative path for a protocol.
    with replacing(path.absolute()) as unfinished, av.open(str(unfinished), "w", format="mp4") as container:
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
    """Write a PNG file, which appears under its name only when it is complete. Raises `OSError`."""
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG")


def _span(available: int, size: int, position: float, own: int) -> tuple[int, int]:
    """Start and end of a span of `size` in `available`, placed at `position`, scaled to an axis of `own` pixels."""
    size = min(max(size, 1), available)
    start = round(position * (available - size))
    first, last = round(start * own / available), round((start + size) * own / available)
    first = min(first, own - 1)
    return first, max(last, first + 1)

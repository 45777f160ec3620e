"""Control signals made from a clip's own pixels."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as T

CONTROL_TYPES = ("tile",)
FROM_FILE = "file"
TILE_FACTOR = 4
BLUR_SIZE, BLUR_SIGMA = 15, 3.0


@dataclass(frozen=True)
class ControlSignal:
    """What a control LoRA is trained to follow: a type of control, which is made of clips that come without one.

    With `keeps_first` the first frame of a control is that of the clip itself.
    """

    kind: str
    keeps_first: bool = False


def tile(video: Tensor) -> Tensor:
    """Remove detail: downscale by 4, upscale again and blur. (3, F, H, W) float -> the same shape.

    A LoRA trained with this control learns to restore the detail (an upscaler).
    """
    frames = video.transpose(0, 1)
    small = F.interpolate(frames, scale_factor=1 / TILE_FACTOR, mode="bilinear", antialias=True)
    large = F.interpolate(small, size=frames.shape[-2:], mode="bilinear")
    return T.gaussian_blur(large, [BLUR_SIZE, BLUR_SIZE], [BLUR_SIGMA, BLUR_SIGMA]).transpose(0, 1)


def make_control(video: Tensor, control_type: str) -> Tensor:
    """The control of this type for a video (3, F, H, W) in -1..1, same shape and range; "file": the video itself.

    Raises `ValueError` for an unknown type.
    """
    if control_type == FROM_FILE:
        return video
    if control_type == "tile":
        return tile(video)
    raise ValueError(f"unknown control type {control_type!r}; known: {', '.join((*CONTROL_TYPES, FROM_FILE))}")

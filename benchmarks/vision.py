"""How far a picture changes for the vision encoder when it is first cut to the size of the training clips.

    python benchmarks/vision.py --clip FILE         a video; its first frame is the picture

Wan's own code shows the encoder the whole picture at its original size. Training and sampling here show it the frame
after the cut to the bucket, so that both see the same. Compared are the pixels that the encoder reads, and its features
with random weights at the released size; beside them stand the pixels of CLIP's image processor, and the clip's last
frame. Prints a table for benchmarks/RECORDS.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.weights import random_vision_encoder
from utils.common.errors import UserError
from utils.common.formatting import format_table
from utils.common.options import option, parse_options, run_script
from utils.media.frames import crop_and_resize, read_frames
from utils.media.probing import probe
from wan.modules.clip import STD, preprocess

SIZES = ((1280, 704), (832, 480), (624, 624), (480, 832))  # of buckets: width and height in pixels


@dataclass(frozen=True)
class Options:
    """Measure how far the cut to a bucket changes what the vision encoder sees."""

    clip: Path | None = option(None, "video whose first frame is encoded")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    if opts.clip is None:
        raise UserError("--clip is missing: a video whose first frame is encoded")
    info = probe(opts.clip)
    if info.frames < 2:
        raise UserError(f"{opts.clip} has a single frame: a video is needed")
    first, last = read_frames(opts.clip, [0, info.frames - 1], info).split(1)
    encoder = random_vision_encoder()
    size = encoder.shape.image_size
    pixels = {"whole": preprocess(to_signed(first), size)}
    for width, height in SIZES:
        pixels[f"cut to {width}x{height}"] = preprocess(to_signed(crop_and_resize(first, width, height)), size)
    pixels["resized to 832x480, not cropped"] = preprocess(to_signed(resized(first)), size)
    pixels["whole, by CLIP's image processor"] = processed(first)
    pixels["whole, last frame"] = preprocess(to_signed(last), size)
    features = {name: encoder.visual(value).last_hidden_state for name, value in pixels.items()}
    rows = [
        (
            name,
            round(levels(pixels[name] - pixels["whole"]), 2),
            round(relative(pixels[name], pixels["whole"]), 4),
            round(relative(features[name], features["whole"]), 4),
        )
        for name in list(pixels)[1:]
    ]
    print(f"{opts.clip.name}, {info.width}x{info.height}, compared with the whole first frame")
    print(format_table(("shown", "pixels, mean, of 255", "pixels, relative", "features, relative"), rows))


def to_signed(frames: Tensor) -> Tensor:
    """uint8 -> -1..1 fp32."""
    return frames.float() / 127.5 - 1


def resized(frames: Tensor) -> Tensor:
    """The whole picture at 832x480, squeezed a little: what the cut changes beside the crop."""
    return functional.resize(frames, [480, 832], functional.InterpolationMode.BICUBIC, antialias=True)


def processed(frames: Tensor) -> Tensor:
    """The pixels of transformers' processor: the shorter side resized to 224 with antialiasing, the centre cropped."""
    from transformers import CLIPImageProcessor

    return torch.as_tensor(CLIPImageProcessor()(frames[0], return_tensors="pt").pixel_values)


def levels(difference: Tensor) -> float:
    """The mean size of a difference between normalised pixels, in levels of 0..255."""
    return (difference * torch.tensor(STD).view(3, 1, 1)).abs().mean().item() * 255


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of what was expected."""
    return ((actual - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    sys.exit(run_script(main))

"""Sizes to train at, and what they cost in tokens. Of the model only its `Grid` is known here."""

import math
from dataclasses import dataclass

from utils.common.errors import UserError
from utils.media.description import MediaInfo
from wan.configs.grid import Grid

SIZE_STEP = 16  # of --base_res: a convention of the released sizes, whatever a token covers
BUCKETS = ("wan", "fine")
NUM_FINE = 9

# (threshold, shape): a picture gets the first shape whose threshold its width / height exceeds.
_SHAPES = ((1.528, (16, 9)), (1.15, (4, 3)), (0.884, (1, 1)), (0.669, (3, 4)), (0.0, (9, 16)))
ASPECTS = tuple(f"{across}:{down}" for _, (across, down) in _SHAPES)
_RELEASED_SIZES = {
    624: {(16, 9): (832, 480), (4, 3): (704, 544), (1, 1): (624, 624)},
    960: {(16, 9): (1280, 720), (4, 3): (1088, 832), (1, 1): (960, 960)},
    1024: {(16, 9): (1344, 768), (4, 3): (1184, 896), (1, 1): (1024, 1024)},
}


@dataclass(frozen=True)
class Shapes:
    """The aspect ratios to crop to, and whether pictures smaller than their bucket are upscaled."""

    buckets: str = "wan"
    min_ar: float = 0.5
    max_ar: float = 2.0
    enlarge: bool = False


DEFAULT_SHAPES = Shapes()


def bucket_size(width: int, height: int, base_res: int, grid: Grid, shapes: Shapes = DEFAULT_SHAPES) -> tuple[int, int]:
    """(width, height) in pixels to train a picture at: the nearest shape with an area of about base_res squared.

    Each side is a multiple of `grid.side`. A picture smaller than that gets the largest size of that shape that fits
    inside it, unless `shapes.enlarge`. Raises UserError if `base_res` is not a positive multiple of 16.
    """
    if base_res <= 0 or base_res % SIZE_STEP:
        below = max(base_res // SIZE_STEP, 1) * SIZE_STEP
        raise UserError(f"base_res {base_res} is not a positive multiple of {SIZE_STEP}: try {below}")
    size = (
        _wan_size(width, height, base_res, grid)
        if shapes.buckets == "wan"
        else _fine_size(width, height, base_res, grid, shapes)
    )
    scale = min(width / size[0], height / size[1])
    if shapes.enlarge or scale >= 1:
        return size
    columns = min(round(size[0] * scale / grid.side), width // grid.side)
    rows = min(round(size[1] * scale / grid.side), height // grid.side)
    return max(columns, 1) * grid.side, max(rows, 1) * grid.side


def seen_share(width: int, height: int, size: tuple[int, int]) -> float:
    """How much of a picture's area is left, of 1, where it is cropped to the shape of `size`, (width, height)."""
    ratio = width * size[1] / (height * size[0])
    return min(ratio, 1 / ratio)


def picture_size(info: MediaInfo, area: int, grid: Grid) -> tuple[int, int]:
    """(width, height) of a video that starts from a picture: its shape, and at most this area in pixels.

    As in the official code of the I2V models, each side is rounded down to the grid. That of TI2V-5B may take one
    step more on one side.
    """
    columns = math.sqrt(area * info.width / info.height) / grid.side
    rows = math.sqrt(area * info.height / info.width) / grid.side
    return max(int(columns), 1) * grid.side, max(int(rows), 1) * grid.side


def count_tokens(width: int, height: int, frames: int, grid: Grid) -> int:
    """Length of the transformer's sequence for a video of this size; `frames` is a multiple of `grid.frame`, plus 1."""
    return (width // grid.side) * (height // grid.side) * ((frames - 1) // grid.frame + 1)


def round_up_frames(frames: int, grid: Grid) -> int:
    """The nearest number of frames, at least `frames`, that a model takes: a multiple of `grid.frame`, plus 1."""
    return -(-(frames - 1) // grid.frame) * grid.frame + 1


def max_frames(width: int, height: int, token_limit: int, grid: Grid) -> int:
    """The most frames, a multiple of `grid.frame` plus 1, whose tokens are at most `token_limit`.

    Raises UserError if the tokens of a single frame exceed the limit.
    """
    tokens = count_tokens(width, height, 1, grid)
    if tokens > token_limit:
        raise UserError(
            f"one frame of {width}x{height} takes {tokens} tokens, more than the token_limit of {token_limit}:\n"
            "raise --token_limit or lower --base_res"
        )
    return (token_limit // tokens - 1) * grid.frame + 1


def _wan_size(width: int, height: int, base_res: int, grid: Grid) -> tuple[int, int]:
    """The nearest of 16:9, 4:3, 1:1, 3:4 and 9:16; the released sizes where `base_res` has them and the grid allows."""
    across, down = next(shape for threshold, shape in _SHAPES if width / height > threshold)
    long, short = max(across, down), min(across, down)
    size = _RELEASED_SIZES.get(base_res, {}).get((long, short))
    if not size or any(length % grid.side for length in size):
        size = _size_of_area(long / short, base_res, grid)
    return size[::-1] if across < down else size


def _fine_size(width: int, height: int, base_res: int, grid: Grid, shapes: Shapes) -> tuple[int, int]:
    """The nearest of `NUM_FINE` aspect ratios, evenly spaced on a log scale."""
    low, high = math.log(shapes.min_ar), math.log(shapes.max_ar)
    ratios = [low + (high - low) * step / (NUM_FINE - 1) for step in range(NUM_FINE)]
    wanted = math.log(width / height)
    return _size_of_area(math.exp(min(ratios, key=lambda ratio: abs(ratio - wanted))), base_res, grid)


def _size_of_area(ratio: float, base_res: int, grid: Grid) -> tuple[int, int]:
    """(width, height) on the grid with about this width / height and the area of `base_res` squared."""
    columns = round(base_res * math.sqrt(ratio) / grid.side)
    rows = round(base_res / math.sqrt(ratio) / grid.side)
    return max(columns, 1) * grid.side, max(rows, 1) * grid.side

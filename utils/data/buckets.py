"""Sizes to train at, and what they cost in tokens. Knows the model only as a `Grid`."""

import math
from dataclasses import dataclass

from utils.common.errors import UserError
from wan.configs.grid import Grid

SIZE_STEP = 16
BUCKETS = ("wan", "fine")
NUM_FINE = 9

# A picture belongs to the first shape whose cut its width / height exceeds.
_SHAPES = ((1.528, (16, 9)), (1.15, (4, 3)), (0.884, (1, 1)), (0.669, (3, 4)), (0.0, (9, 16)))
_KNOWN_SIZES = {
    624: {(16, 9): (832, 480), (4, 3): (704, 544), (1, 1): (624, 624)},
    960: {(16, 9): (1280, 720), (4, 3): (1088, 832), (1, 1): (960, 960)},
    1024: {(16, 9): (1344, 768), (4, 3): (1184, 896), (1, 1): (1024, 1024)},
}


@dataclass(frozen=True)
class Shapes:
    """Which shapes there are to cut pictures to, and whether small pictures are enlarged for them."""

    buckets: str = "wan"
    min_ar: float = 0.5
    max_ar: float = 2.0
    enlarge: bool = False


WAN_GRID = Grid(frame=4, side=16)
WAN_SHAPES = Shapes()


def bucket_size(
    width: int, height: int, base_res: int, shapes: Shapes = WAN_SHAPES, grid: Grid = WAN_GRID
) -> tuple[int, int]:
    """(width, height) in pixels to train a picture of this size at: about base_res squared, in the nearest shape.

    Each side is a multiple of what a token covers. A picture that is smaller than that gets the largest such size that
    lies within it, unless `shapes` may enlarge it. Raises `UserError` when `base_res` is not a positive multiple of 16.
    """
    if base_res <= 0 or base_res % SIZE_STEP:
        below = max(base_res // SIZE_STEP, 1) * SIZE_STEP
        raise UserError(f"base_res {base_res} is not a positive multiple of {SIZE_STEP}: try {below}")
    size = (
        _wan_size(width, height, base_res, grid)
        if shapes.buckets == "wan"
        else _fine_size(width, height, base_res, shapes, grid)
    )
    scale = min(width / size[0], height / size[1])
    if shapes.enlarge or scale >= 1:
        return size
    return tuple(
        max(min(round(length * scale / grid.side), available // grid.side), 1) * grid.side
        for length, available in zip(size, (width, height), strict=True)
    )


def _wan_size(width: int, height: int, base_res: int, grid: Grid) -> tuple[int, int]:
    """The nearest of 16:9, 4:3, 1:1, 3:4 and 9:16, at the released resolutions for the known `base_res`."""
    across, down = next(shape for cut, shape in _SHAPES if width / height > cut)
    long, short = max(across, down), min(across, down)
    size = _KNOWN_SIZES.get(base_res, {}).get((long, short))
    if not size or any(length % grid.side for length in size):
        size = _of_area(long / short, base_res, grid)
    return size[::-1] if across < down else size


def _fine_size(width: int, height: int, base_res: int, shapes: Shapes, grid: Grid) -> tuple[int, int]:
    """The nearest of `NUM_FINE` ratios of width to height, evenly spaced on a log scale."""
    low, high = math.log(shapes.min_ar), math.log(shapes.max_ar)
    ratios = [low + (high - low) * step / (NUM_FINE - 1) for step in range(NUM_FINE)]
    wanted = math.log(width / height)
    return _of_area(math.exp(min(ratios, key=lambda ratio: abs(ratio - wanted))), base_res, grid)


def _of_area(ratio: float, base_res: int, grid: Grid) -> tuple[int, int]:
    ideal = base_res * math.sqrt(ratio), base_res / math.sqrt(ratio)
    return tuple(max(round(length / grid.side), 1) * grid.side for length in ideal)


def count_tokens(width: int, height: int, frames: int, grid: Grid = WAN_GRID) -> int:
    """Length of the transformer's sequence for `frames` = 4n+1 frames of this size."""
    return (width // grid.side) * (height // grid.side) * ((frames - 1) // grid.frame + 1)


def max_frames(width: int, height: int, token_limit: int, grid: Grid = WAN_GRID) -> int:
    """The largest 4n+1 frames whose tokens are at most `token_limit`. Raises `UserError` when one frame is too many."""
    tokens = count_tokens(width, height, 1, grid)
    if tokens > token_limit:
        raise UserError(
            f"one frame of {width}x{height} takes {tokens} tokens, more than the token_limit of {token_limit}:\n"
            "raise --token_limit or lower --base_res"
        )
    return (token_limit // tokens - 1) * grid.frame + 1

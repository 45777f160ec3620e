"""Recognises what a video of Wan-Nano's world shows: shape, colour, background, motion and style.

    python -m nano.probe FILE...          one line of JSON per file

An answer is a name from the world or of a lesson, or "unclear" if the video shows none of them well enough.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nano.world import (
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    SHAPES,
    SIDE,
    STYLES,
    Scene,
    Track,
    backdrop,
    coverage,
)
from utils.common.options import expand_home
from utils.media.frames import read_frames
from utils.media.probing import MediaError, probe

UNCLEAR = "unclear"
# Colours are compared by their distance on the 0..255 scale.
FAR = 60.0  # a colour farther than this from all of the world's colours has no name
MIN_CONTRAST = 40.0  # distance from the background at which a pixel belongs to the shape
MIN_AREA = 30.0  # pixels; anything smaller is noise
MIN_LIKENESS = 0.78  # intersection over union with the shape as the world draws it
MIN_SEEN = 0.8  # share of the frames that must show something
MIN_AGREED = 0.6  # share of those that must show the same shape
MIN_STYLED = 0.8  # share of the border's pixels that must show the style's background
NEAR = 50.0  # distance from a style's background at which a pixel still shows it
EDGE = 2  # width in pixels of the border, which is taken for background
RIM = F.pad(torch.zeros(SIDE - 2 * EDGE, SIDE - 2 * EDGE, dtype=torch.bool), [EDGE] * 4, value=True)
PLAIN = "plain"
STILL = 4.0  # pixels; a shape whose path is shorter along both axes does not move
GROWN = 1.25  # ratio of the radii at both ends from which a shape grows or shrinks
STRAY = 4.5  # pixels by which a straight motion may leave its line


@dataclass(frozen=True)
class Reading:
    """What a video shows, in the world's words or UNCLEAR; a video without a style is PLAIN."""

    shape: str
    colour: str
    background: str
    motion: str
    style: str

    @property
    def scene(self) -> Scene:
        return Scene(self.shape, self.colour, self.background, self.motion)


@dataclass(frozen=True)
class Seen:
    """The shape that was found in the frames, as numbers."""

    colour: Tensor  # (3,) on the 0..255 scale
    cover: Tensor  # (F, side, side) share of each pixel that the shape covers, in 0..1
    middle: Tensor  # (F, 2) its centroid as x, y in pixels
    area: Tensor  # (F,) in pixels


def read(frames: Tensor) -> Reading:
    """What the frames (F, 3, H, W) uint8 of a video show."""
    pixels = frames.float()
    if frames.shape[-2:] != (SIDE, SIDE):
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="area")
    style, background = find_style(pixels)
    seen = find_shape(pixels, background)
    if style != PLAIN and math.dist(seen.colour.tolist(), STYLES[style].look.shape) > FAR:
        style = PLAIN
    behind = nearest(background[:, 0, 0, 0], BACKGROUNDS)
    shown = seen.area > MIN_AREA
    if shown.float().mean() < MIN_SEEN:
        return Reading(UNCLEAR, UNCLEAR, behind, UNCLEAR, style)
    return Reading(name_shape(seen, shown), nearest(seen.colour, COLOURS), behind, name_motion(seen), style)


def adherence(videos: Sequence[Tensor], scenes: Sequence[Scene], style: str = PLAIN) -> dict[str, float]:
    """The share of videos that show what their scene asks for, by property and for "all" properties together.

    A style has its own colours, so with a style the colours of the scenes are not compared.
    """
    names = ("colour", "background", "motion", "shape", "style") if style == PLAIN else ("motion", "shape", "style")
    readings = [read(video) for video in videos]
    asked = [Reading(**asdict(scene), style=style) for scene in scenes]
    hits = [
        [getattr(reading, name) == getattr(wanted, name) for name in names]
        for reading, wanted in zip(readings, asked, strict=True)
    ]
    shares = {name: sum(column) / len(hits) for name, column in zip(names, zip(*hits, strict=True), strict=True)}
    return shares | {"all": sum(map(all, hits)) / len(hits)}


def find_style(pixels: Tensor) -> tuple[str, Tensor]:
    """The style of frames (F, 3, side, side), and their background (3, 1, side, side).

    A style is recognised by its backdrop along the border. The background is then measured from the two edges along
    which the backdrop changes; without a style it is the median of the border.
    """
    for name, style in STYLES.items():
        near = (pixels.transpose(0, 1) - backdrop(style.look)[:, :1]).norm(dim=0)[:, RIM] < NEAR
        if near.float().mean() > MIN_STYLED:
            turned = pixels.mT if style.look.sideways else pixels
            edges = torch.cat([turned[..., :EDGE], turned[..., -EDGE:]], dim=-1)  # (F, 3, side, 2 * EDGE)
            ramp = edges.permute(1, 2, 0, 3).flatten(2).median(dim=-1).values[:, None, :, None]
            seen = ramp.expand(3, 1, SIDE, SIDE)
            return name, seen.mT if style.look.sideways else seen
    plain = pixels.transpose(0, 1)[:, :, RIM].flatten(1).median(dim=1).values
    return PLAIN, plain.view(3, 1, 1, 1).expand(3, 1, SIDE, SIDE)


def find_shape(pixels: Tensor, background: Tensor) -> Seen:
    """Separates the shape in frames (F, 3, side, side) from the background (3, 1, side, side).

    Both are on the 0..255 scale. The shape's colour is that of the pixels that differ most from the background.
    """
    video = pixels.transpose(0, 1)
    difference = video - background
    distance = difference.norm(dim=0)
    painted = distance > MIN_CONTRAST
    if not painted.any():
        nothing = torch.zeros(len(pixels))
        return Seen(background[:, 0, 0, 0], torch.zeros_like(distance), torch.zeros(len(pixels), 2), nothing)
    strong = distance > distance[painted].median() * 0.8
    colour = video[:, strong].median(dim=1).values
    towards = colour.view(3, 1, 1, 1) - background
    # The position of each pixel between background (0) and colour (1). Antialiased edges count in part.
    cover = (difference * towards).sum(dim=0) / towards.square().sum(dim=0).clamp(min=1)
    cover = cover.clamp(0, 1) * (distance > MIN_CONTRAST / 2)
    area = cover.sum(dim=(1, 2))
    place = torch.arange(cover.shape[-1]) + 0.5
    weight = area.clamp(min=1e-6)
    x, y = (cover.sum(dim=1) @ place) / weight, (cover.sum(dim=2) @ place) / weight
    return Seen(colour, cover, torch.stack([x, y], dim=1), area)


def nearest(colour: Tensor, names: Mapping[str, Sequence[int]]) -> str:
    """The name of the colour nearest to `colour` (3,); UNCLEAR if none is near."""
    distances = {name: math.dist(colour.tolist(), value) for name, value in names.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < FAR else UNCLEAR


def name_shape(seen: Seen, shown: Tensor) -> str:
    """The shape on which most of the `shown` (F,) frames agree.

    Each frame is compared with every shape of the world, drawn at the same place with the same area.
    """
    likeness = torch.stack([_likeness(seen, shape) for shape in SHAPES])  # (shapes, F)
    best, which = likeness[:, shown].max(dim=0)
    answers = zip(which.tolist(), best.tolist(), strict=True)
    votes = Counter(SHAPES[index] for index, value in answers if value > MIN_LIKENESS)
    winner, count = votes.most_common(1)[0] if votes else (UNCLEAR, 0)
    return winner if count >= MIN_AGREED * int(shown.sum()) else UNCLEAR


def _likeness(seen: Seen, shape: str) -> Tensor:
    """Per frame (F,) the intersection over union with `shape`, drawn with the same centroid and area."""
    unit = Track(torch.full((1, 2), SIDE / 2), torch.full((1,), SIDE / 4))
    ideal = coverage(shape, unit)[0]
    scale = SIDE / 4 / ideal.sum().sqrt()
    place = torch.arange(SIDE) + 0.5
    centroid = torch.stack([ideal.sum(0) @ place, ideal.sum(1) @ place]) / ideal.sum() - SIDE / 2  # off the middle
    radius = seen.area.clamp(min=1).sqrt() * scale
    middle = seen.middle - centroid * (radius / (SIDE / 4))[:, None]
    drawn = coverage(shape, Track(middle, radius))
    return torch.minimum(drawn, seen.cover).sum((1, 2)) / torch.maximum(drawn, seen.cover).sum((1, 2)).clamp(min=1)


def name_motion(seen: Seen) -> str:
    """The motion, by the path of the centroid and the change of size."""
    size, path = seen.area.clamp(min=1).sqrt(), seen.middle
    growth = (size[-3:].mean() / size[:3].mean()).item()
    reach = (path.amax(0) - path.amin(0)).tolist()
    if max(reach) < 2 * STILL and not 1 / GROWN < growth < GROWN:
        return "growing" if growth > 1 else "shrinking"
    if not 1 / GROWN < growth < GROWN:
        return UNCLEAR
    if max(reach) < STILL:
        return "still"
    if _circles(path):
        return "orbiting"
    if _leaps(path):
        return "leaping"
    way = path[-1] - path[0]
    main, other = (0, 1) if way[0].abs() > way[1].abs() else (1, 0)
    if way[main].abs() < 2 * STILL or reach[other] > STRAY or not _steady(path[:, main] * way[main].sign()):
        return UNCLEAR
    names = (("left", "right"), ("up", "down"))[main]
    return names[int(way[main] > 0)]


def _circles(path: Tensor) -> bool:
    """Whether the path (F, 2) goes once around its middle, in one direction, at a steady distance."""
    around = path - path[:-1].mean(0)
    distance = around.norm(dim=1)
    angle = torch.atan2(around[:, 1], around[:, 0])
    steps = (angle.diff() + math.pi).remainder(2 * math.pi) - math.pi
    turned, moved = steps.sum().abs().item(), steps.abs().sum().item()
    once = 1.5 * math.pi < turned < 2.5 * math.pi and moved < 1.2 * turned
    return bool(once and distance.min() > 0.4 * distance.max() and distance.mean() > STILL)


def _leaps(path: Tensor) -> bool:
    """Whether the path (F, 2) goes straight up, and down again to where it began."""
    x, y = path.unbind(1)
    top = int(y.argmin())
    straight = (x.amax() - x.amin()).item() < STRAY and (y[-1] - y[0]).abs().item() < 2 * STILL
    high = (torch.minimum(y[0], y[-1]) - y[top]).item() > 2 * STILL
    middle = len(path) // 4 <= top < len(path) - len(path) // 4
    return straight and high and middle and _steady(-y[: top + 1]) and _steady(y[top:])


def _steady(position: Tensor) -> bool:
    """Whether a position (F,) that should increase never decreases by much."""
    return bool((position.cummax(0).values - position).max() < STRAY)


def probe_file(path: Path) -> Reading:
    """What the first 17 frames of a video file show. Raises MediaError, also for a video that is not square."""
    info = probe(path)
    if info.width != info.height:
        raise MediaError(path, f"{info.width}x{info.height} is not of Nano's world, whose videos are square")
    return read(read_frames(path, range(min(FRAMES, info.frames))))


def _matching(path: str) -> list[str]:
    """The files that match a pattern, which the Windows shell does not expand; the path itself if nothing matches."""
    path = expand_home(path)
    return [path] if Path(path).exists() else sorted(glob(path)) or [path]


def main(paths: Sequence[str]) -> int:
    if not paths or paths[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 0 if paths and paths[0] in ("-h", "--help") else 2
    failed = False
    for path in map(Path, chain.from_iterable(_matching(path) for path in paths)):
        try:
            print(json.dumps({"file": str(path)} | asdict(probe_file(path))), flush=True)
        except MediaError as error:
            print(error, file=sys.stderr)
            failed = True
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

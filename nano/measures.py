"""What videos show whatever their colours: motion and shape, how fast shapes move, and how much videos differ.

Speed and variety are what a model may lose in few steps. They are compared between two sets of videos of the same
scenes, such as a student's and its teacher's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from nano.probe import MIN_AREA, MIN_SEEN, RIM, UNCLEAR, Seen, find_shape, name_motion, name_shape
from nano.world import SIDE, Scene

STRAIGHT = ("left", "right", "up", "down")
MOVING = (*STRAIGHT, "orbiting")


@dataclass(frozen=True)
class Course:
    """Where the shape of one video is in each frame."""

    middle: Tensor  # (F, 2) its centroid as x, y in pixels
    size: Tensor  # (F,) in pixels, the root of its area


def look(video: Tensor) -> tuple[Seen, Tensor]:
    """The shape in frames (F, 3, side, side) uint8, and the background (3, 1, side, side) behind it.

    The background is the plane through the border: it may be of any colour, or change from one to another.
    """
    pixels, place = video.float(), torch.linspace(-1, 1, SIDE)
    grid = torch.stack([torch.ones(SIDE, SIDE), place.expand(SIDE, SIDE), place[:, None].expand(SIDE, SIDE)], dim=-1)
    border = pixels.median(dim=0).values[:, RIM].mT  # a shape covers a part of it for a while only
    plane = torch.linalg.lstsq(grid[RIM], border).solution
    background = (grid @ plane).permute(2, 0, 1)[:, None]
    return find_shape(pixels, background), background


def adherence_in_any_colours(videos: Sequence[Tensor], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of videos that show the motion, and the shape, of their scene."""
    found = [_read(video) for video in videos]
    motions = [motion == scene.motion for (motion, _), scene in zip(found, scenes, strict=True)]
    shapes = [shape == scene.shape for (_, shape), scene in zip(found, scenes, strict=True)]
    return {"motion": sum(motions) / len(motions), "shape": sum(shapes) / len(shapes)}


def _read(video: Tensor) -> tuple[str, str]:
    seen, _ = look(video)
    shown = seen.area > MIN_AREA
    if shown.float().mean() < MIN_SEEN:
        return UNCLEAR, UNCLEAR
    return name_motion(seen), name_shape(seen, shown)


def variety_of_colours(videos: Sequence[Tensor]) -> dict[str, float]:
    """The standard deviation among videos on the 0..255 scale, the root of the mean over the channels.

    Of the shape's colour, and of that of the background, in the mean over the picture.
    """
    looks = [look(video) for video in videos]
    shapes = torch.stack([seen.colour for seen, _ in looks])
    backgrounds = torch.stack([background.mean(dim=(1, 2, 3)) for _, background in looks])
    spreads = {"shape's colour": shapes, "background's colour": backgrounds}
    return {name: colours.var(dim=0).mean().sqrt().item() for name, colours in spreads.items()}


def course(video: Tensor) -> Course | None:
    """The course of the shape in frames (F, 3, side, side) uint8; None where some frame does not show it."""
    seen, _ = look(video)
    return None if (seen.area <= MIN_AREA).any() else Course(seen.middle, seen.area.sqrt())


def speed(videos: Sequence[Tensor], scenes: Sequence[Scene]) -> float:
    """The mean length of a path in pixels per frame, over the videos whose scene moves.

    A shape that is not seen does not move. Steps of two frames are measured, so that trembling counts less.
    """
    moving = [course(video) for video, scene in zip(videos, scenes, strict=True) if scene.motion in MOVING]
    return sum(0.0 if one is None else _path(one) for one in moving) / len(moving)


def _path(one: Course) -> float:
    return one.middle[::2].diff(dim=0).norm(dim=1).mean().item() / 2


def variety(videos: Sequence[Tensor], scenes: Sequence[Scene]) -> dict[str, float]:
    """The standard deviation among videos of the same motion and shape, in pixels, by property.

    place: of the middle of the path; size: of the root of the area, halfway. NaN where no two videos show one. The
    world's orbits all begin in the same place, so there is no variety of phases.
    """
    ordered = sorted(zip(scenes, videos, strict=True), key=lambda pair: _kind(pair[0]))
    spreads: dict[str, list[tuple[float, int]]] = {"place": [], "size": []}
    for (motion, _), members in groupby(ordered, key=lambda pair: _kind(pair[0])):
        courses = [one for one in (course(video) for _, video in members) if one is not None]
        if len(courses) < 2:
            continue
        for name, values in _properties(motion, courses).items():
            spreads[name].append((values.var(dim=0).mean().item(), len(courses) - 1))
    return {name: _pooled(parts) for name, parts in spreads.items()}


def _kind(scene: Scene) -> tuple[str, str]:
    return scene.motion, scene.shape


def _properties(motion: str, courses: Sequence[Course]) -> dict[str, Tensor]:
    """What is compared of videos of one kind: (N, 1), or (N, 2) for places."""
    halfway = len(courses[0].size) // 2
    return {
        "place": torch.stack([_centre(motion, one) for one in courses]),
        "size": torch.stack([one.size[halfway - 1 : halfway + 2].mean() for one in courses])[:, None],
    }


def _centre(motion: str, one: Course) -> Tensor:
    """The middle (2,) of the path. An orbit ends where it began."""
    return (one.middle[:-1] if motion == "orbiting" else one.middle).mean(dim=0)


def _pooled(parts: Sequence[tuple[float, int]]) -> float:
    """The deviation of several groups together, from their variances and degrees of freedom."""
    total = sum(freedom for _, freedom in parts)
    return math.sqrt(sum(variance * freedom for variance, freedom in parts) / total) if total else math.nan

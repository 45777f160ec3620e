"""How fast shapes move, and how much videos of the same scenes differ: what a model may lose in few steps.

Both are compared between two sets of videos of the same scenes, such as a student's and its teacher's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from nano.probe import MIN_AREA, find_shape, find_style
from nano.world import Scene

STRAIGHT = ("left", "right", "up", "down")
MOVING = (*STRAIGHT, "orbiting")


@dataclass(frozen=True)
class Course:
    """Where the shape of one video is in each frame."""

    middle: Tensor  # (F, 2) its centroid as x, y in pixels
    size: Tensor  # (F,) in pixels, the root of its area


def course(video: Tensor) -> Course | None:
    """The course of the shape in frames (F, 3, side, side) uint8; None where some frame does not show it."""
    pixels = video.float()
    _, background = find_style(pixels)
    seen = find_shape(pixels, background)
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

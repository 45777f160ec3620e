"""The measures of speed and variety, on clips that the world draws."""

import math
import random
from dataclasses import replace

import pytest
import torch

from nano.measures import course, speed, variety
from nano.world import Scene, render, scenes, to_frames

MOTIONS = ("left", "down", "orbiting", "still", "growing")
SCENES = [scene for scene in scenes() if scene.motion in MOTIONS and scene.background == "black"]


def clips(found, seed: int = 0) -> list[torch.Tensor]:
    rng = random.Random(seed)
    return [to_frames(render(scene, rng)) for scene in found]


def test_the_speed_of_a_drawn_path_is_measured_and_half_of_it_at_half_the_speed():
    moving = [scene for scene in SCENES if scene.motion in ("left", "down")][:12]
    whole = clips(moving)
    slow = [video[torch.arange(17) // 2] for video in whole]
    assert speed(slow, moving) == pytest.approx(speed(whole, moving) / 2, rel=0.1)
    paths = [course(video).middle for video in whole]
    drawn = sum((path[-1] - path[0]).norm().item() / 16 for path in paths) / len(paths)
    assert speed(whole, moving) == pytest.approx(drawn, rel=0.1)


def test_only_scenes_that_move_count_for_the_speed_and_a_shape_unseen_stands_still():
    still = Scene("circle", "red", "black", "still")
    left = replace(still, motion="left")
    (moves, _), nothing = clips([left, still]), torch.zeros(17, 3, 64, 64, dtype=torch.uint8)
    assert speed([moves, nothing], [left, still]) == speed([moves], [left])
    assert speed([moves, nothing], [left, left]) == speed([moves], [left]) / 2
    assert course(nothing) is None


def test_the_spread_of_places_is_that_with_which_the_world_draws_them():
    """Uniform within 3 pixels: a standard deviation of the root of 3."""
    still = [scene for scene in SCENES if scene.motion == "still"] * 4
    found = variety(clips(still), still)
    assert found["place"] == pytest.approx(math.sqrt(3), rel=0.15) and 0.3 < found["size"] < 2


def test_videos_that_are_all_alike_have_no_variety_and_half_the_spread_is_half():
    scene = Scene("square", "red", "black", "still")
    alike = clips([scene]) * 5
    assert variety(alike, [scene] * 5)["place"] == 0
    drawn = clips([scene] * 12)
    half = drawn[:1] * 12
    mixed = variety(drawn + half, [scene] * 24)["place"]
    assert 0 < mixed < variety(drawn, [scene] * 12)["place"]
    assert math.isnan(variety(drawn[:1], [scene])["place"])

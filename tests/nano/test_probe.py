import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nano.probe import UNCLEAR, _matching, main, probe_file, read
from nano.world import FPS, Scene, Track, coverage, paint, render, scenes, to_frames
from utils.media.frames import write_video


def frames_of(scene: Scene, seed: int, style: str | None = None, from_middle: bool = False) -> torch.Tensor:
    return to_frames(render(scene, random.Random(seed), style, from_middle))


# Both steps go through all shapes, colours, backgrounds and motions.
@pytest.mark.parametrize("step", [25, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("style", [None, "sunset"])
def test_the_worlds_own_clips_are_recognised_in_video_files(tmp_path, style, step):
    shown = scenes()[::step]
    right = 0
    for number, scene in enumerate(shown):
        write_video(tmp_path / "clip.mp4", frames_of(scene, number, style), FPS)
        seen = probe_file(tmp_path / "clip.mp4")
        wanted = (scene, "plain") if style is None else (replace(scene, colour=UNCLEAR, background=UNCLEAR), style)
        right += (seen.scene, seen.style) == wanted
    assert right >= 0.98 * len(shown)


def test_clips_from_the_middle_and_the_motion_of_a_lesson_are_recognised():
    shown = [*scenes()[::13], *(replace(scene, motion="leaping") for scene in scenes()[::40])]
    assert all(read(frames_of(scene, n, from_middle=True)).scene == scene for n, scene in enumerate(shown))
    leap = frames_of(Scene("square", "red", "black", "leaping"), 0)
    assert read(leap).motion == "leaping"
    assert read(leap.flip(2)).motion == UNCLEAR  # down and up again
    assert read(leap[:9].repeat_interleave(2, 0)[:17]).motion == "up"


def test_growth_is_recognised_with_a_margin():
    """A shape that grows from the middle ends at 1.53 times its size, where the video follows it exactly."""
    still = torch.full((17,), 12.0)
    for ratio, motion in ((1.0, "still"), (1.12, "still"), (1.4, "growing"), (1 / 1.4, "shrinking")):
        radius = still * ratio ** torch.linspace(0, 1, 17)
        cover = coverage("square", Track(torch.full((17, 2), 32.0), radius))
        assert read(to_frames(paint(cover, (224, 44, 44), torch.full((3, 17, 64, 64), 18.0)))).motion == motion


def test_noise_and_small_errors_of_colour_change_nothing():
    generator = torch.Generator().manual_seed(0)
    shown = scenes()[::9]
    for number, scene in enumerate(shown):
        noisy = frames_of(scene, number).float() + 8 * torch.randn(17, 3, 64, 64, generator=generator) + 6
        assert read(noisy.clamp(0, 255).to(torch.uint8)).scene == scene


def test_a_larger_video_is_recognised_too():
    scene = Scene("triangle", "green", "white", "growing")
    assert read(F.interpolate(frames_of(scene, 0), (128, 128))).scene == scene


def test_a_video_without_a_shape_of_the_world_is_unclear():
    blank = torch.full((17, 3, 64, 64), 128, dtype=torch.uint8)
    seen = read(blank)
    assert (seen.background, seen.shape, seen.motion) == ("gray", UNCLEAR, UNCLEAR)
    noise = torch.randint(0, 256, (17, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert read(noise).shape == UNCLEAR


def test_a_shape_that_changes_is_unclear_and_so_are_two_shapes_at_once():
    circle, cross = (frames_of(Scene(shape, "red", "black", "still"), 0) for shape in ("circle", "cross"))
    assert read(torch.cat([circle[:8], cross[8:]])).shape == UNCLEAR
    assert read(torch.maximum(circle, cross.roll(24, dims=3))).shape == UNCLEAR


def test_a_motion_that_the_world_does_not_have_is_unclear():
    still = frames_of(Scene("circle", "red", "black", "still"), 0)
    zigzag = torch.stack([frame.roll((n - 8, 8 * (-1) ** (n // 3)), dims=(2, 1)) for n, frame in enumerate(still)])
    assert read(zigzag).motion == UNCLEAR
    there_and_back = torch.stack([frame.roll(12 - abs(3 * (n - 8)), dims=2) for n, frame in enumerate(still)])
    assert read(there_and_back).motion == UNCLEAR


def test_orbiting_is_one_turn_in_one_direction():
    turns = {"once": torch.linspace(0, 1, 17), "twice": torch.linspace(0, 2, 17)}
    turns["and back"] = torch.cat([torch.linspace(0, 1.1, 12), torch.linspace(1, 0.7, 5)])
    motions = {}
    for name, angle in turns.items():
        around = 2 * math.pi * angle
        path = Track(32 + 8 * torch.stack([around.sin(), around.cos()], dim=1), torch.full((17,), 12.0))
        frames = paint(coverage("circle", path), (224, 44, 44), torch.full((3, 17, 64, 64), 18.0))
        motions[name] = read(to_frames(frames)).motion
    assert motions == {"once": "orbiting", "twice": UNCLEAR, "and back": UNCLEAR}


def test_a_style_needs_both_its_background_and_its_shape_colour():
    scene = Scene("square", "cyan", "brown", "up")
    sunset, plain = frames_of(scene, 0, "sunset"), frames_of(scene, 0)
    assert (read(sunset).style, read(plain).style) == ("sunset", "plain")
    half = torch.cat([sunset[..., :32], plain[..., 32:]], dim=3)
    assert read(half).style == "plain"
    assert read(sunset.flip(2)).style == "plain"
    dark = (sunset < 100).all(dim=1, keepdim=True)
    assert (
        read(torch.where(dark, torch.tensor([64, 206, 222], dtype=torch.uint8).view(3, 1, 1), sunset)).style == "plain"
    )


def test_the_command_prints_a_line_of_json_per_file(tmp_path, capsys):
    scene = Scene("cross", "yellow", "gray", "orbiting")
    write_video(tmp_path / "a.mp4", frames_of(scene, 0), FPS)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert main([str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "file": str(tmp_path / "a.mp4"),
        "shape": "cross",
        "colour": "yellow",
        "background": "gray",
        "motion": "orbiting",
        "style": "plain",
    }
    assert "b.mp4" in printed.err and "Traceback" not in printed.err
    assert main([str(tmp_path / "a.mp4")]) == 0
    assert main([]) == 2


def test_the_command_expands_patterns_and_refuses_videos_that_are_not_square(tmp_path, capsys):
    scene = Scene("cross", "yellow", "gray", "up")
    for name in ("a", "b", "[1]", "1"):
        write_video(tmp_path / f"{name}.mp4", frames_of(scene, 0), FPS)
    assert main([str(tmp_path / "[ab].mp4"), str(tmp_path / "[1].mp4")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(tmp_path / f"{name}.mp4") for name in ("a", "b", "[1]")]
    write_video(tmp_path / "wide.mp4", frames_of(scene, 0)[..., :32, :], FPS)
    assert main([str(tmp_path / "wide.mp4")]) == 2
    assert "wide.mp4: 64x32 is not of Nano's world" in capsys.readouterr().err


def test_files_may_be_named_from_the_home_folder(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "a.mp4").touch()
    assert _matching("~/a.mp4") == _matching("~/*.mp4") == [str(tmp_path / "a.mp4")]
    assert _matching("~/b.mp4") == [str(tmp_path / "b.mp4")]

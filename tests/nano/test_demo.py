"""The parts of the demo, without its training, which `make nano-check` runs."""

import json
import random
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from nano import demo
from nano.demo import Trial, make_trials, measure, newest_lora, print_table, write
from nano.picture import CELL, HEADER, TEXT_WIDTH, comparison
from nano.world import Scene, render, split, to_frames
from utils.common.errors import RunError
from utils.common.options import run_script

SCENE = Scene("circle", "red", "black", "left")


def video(scene: Scene, style: str | None = None) -> torch.Tensor:
    return to_frames(render(scene, random.Random(0), style))


def test_trials_use_withheld_scenes_and_only_styled_prompts_have_the_trigger_word():
    trials = make_trials(160, seed=3)
    assert {trial.scene for trial in trials} == set(split()[1])
    assert len({trial.seed for trial in trials}) == 160
    for trial in trials:
        assert trial.scene.colour in trial.plain and "kelo" not in trial.plain
        assert trial.scene.shape in trial.styled and trial.styled.endswith(", kelo style")
    assert make_trials(5, seed=3) == trials[:5] != make_trials(5, seed=4)


def test_the_style_counts_for_prompts_with_the_trigger_word_and_against_those_without(capsys):
    other = replace(SCENE, motion="up")
    trials = [Trial(SCENE, "plain", "styled", 0)] * 2
    plain, sunset, wrong = video(SCENE), video(SCENE, "sunset"), video(other)
    styled, seen = measure(
        trials,
        {"styled": [plain, plain], "plain": [plain, plain]},
        {"styled": [sunset, plain], "plain": [sunset, wrong]},
    )
    assert [shares["style"] for shares in styled] == [0.0, 0.5]
    assert [shares["all"] for shares in seen] == [1.0, 0.0]
    print_table(styled, seen)
    table = capsys.readouterr().out
    assert "without it: style" in table and "50%" in table


def test_the_picture_has_a_row_per_prompt_and_a_strip_per_title():
    strips = [torch.full((17, 3, 64, 64), value, dtype=torch.uint8) for value in (40, 80, 120, 160)]
    picture = comparison([("first", strips[:2]), ("second", strips[2:])], ("without", "with")).convert("L")
    middle = (TEXT_WIDTH + picture.width) // 2
    left, right = picture.crop((TEXT_WIDTH, 0, middle, picture.height)), picture.crop((middle, 0, *picture.size))
    for side, first, second in ((left, 40, 120), (right, 80, 160)):
        upper, lower = side.crop((0, HEADER, side.width, HEADER + CELL)), side.crop((0, HEADER + CELL, *side.size))
        assert most_common_gray(upper) == first and most_common_gray(lower) == second


def most_common_gray(picture: Image.Image) -> int:
    return max((count, value) for count, value in picture.getcolors() if value < 200)[1]


def test_the_picture_and_two_videos_per_prompt_are_written(tmp_path):
    trials = make_trials(3, seed=0)
    videos = {kind: [video(SCENE)] * 3 for kind in ("styled", "plain")}
    write(tmp_path, trials, videos, videos)
    assert (tmp_path / "demo.png").is_file()
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == [f"{n}-{side}.mp4" for n in (1, 2, 3) for side in ("with", "without")]


def test_the_newest_lora_has_the_highest_step_and_averages_do_not_count(tmp_path):
    folder = tmp_path / "2026-11-25_12-00-00" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("wan-lora-00000150", "wan-lora-00000300", "wan-lora-00000450-ema", "wan-lora-comfy", "state-00000400"):
        (folder / f"{name}.safetensors").touch()
    assert newest_lora(tmp_path) == folder / "wan-lora-00000300.safetensors"


def test_a_script_that_fails_ends_the_demo_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 2))
    assert run_script(partial(demo.main, ["--output_dir", str(tmp_path)])) == 1
    assert "train_wan_lora.py ended with an error, see above" in capsys.readouterr().err
    with pytest.raises(RunError):
        demo.run("convert_lora_to_comfy.py")


def test_every_printed_path_exists_and_the_last_line_holds_the_figures(tmp_path, monkeypatch, capsys):
    def train(folder, seed):
        (folder / "runs").mkdir(parents=True)
        return folder / "lora.safetensors"

    videos = {kind: [video(SCENE)] * 4 for kind in ("styled", "plain")}
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "show", lambda trials, lora: (videos, videos))
    monkeypatch.setattr(demo, "run", lambda script, *arguments: arguments[-1].touch())
    demo.main(["--output_dir", str(tmp_path), "--samples", "4"])
    *lines, last = capsys.readouterr().out.splitlines()
    printed = [Path(line.split()[-1]) for line in lines if str(tmp_path) in line]
    assert len(printed) == 5 and all(path.exists() for path in printed if path.name != "lora.safetensors")
    assert set(json.loads(last)) == {"concept_before", "concept_after", "adherence_before", "adherence_after"}

"""What LoRAs teach the small image-to-video Wan and the small Wan with two experts. Each test takes minutes."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nano.demo import CLIPS, STYLE, make_trials
from nano.pretrain_families import kept
from nano.probe import adherence
from nano.world import LESSONS, render, split, write_dataset
from tests.experiments import (
    PAIR,
    Figures,
    Stage,
    enter_experiment,
    image_to_video,
    once,
    trained,
    write_sheet,
)
from utils.encoding.conditioning import encode_video, to_pixels, to_unit_range
from utils.media.controls import tile

TESTED = split()[1][:64]
(MOTION, WORD) = next(iter(LESSONS.items()))
pytestmark = pytest.mark.nano_families


@pytest.fixture(autouse=True)
def folder(request, tmp_path, monkeypatch) -> Path:
    """The working folder of the test's experiment."""
    return enter_experiment(request.node.name, tmp_path, monkeypatch)


def frames_kept(videos: Sequence[Tensor], pictures: Sequence[Tensor]) -> dict[str, float]:
    frames = kept(videos, pictures)
    return {"mean dB": sum(frames) / len(frames), "least dB": min(frames)}


def base() -> Figures:
    stage = Stage(image_to_video(), TESTED, "i2v base")
    videos = stage.film({})
    given = [to_pixels(picture) for picture in stage.pictures]
    write_sheet(stage.prompts, {"the given frame": given, "image to video": videos})
    return {"image to video": adherence(videos, TESTED), "given frame": frames_kept(videos, stage.pictures)}


def test_the_image_to_video_model_keeps_the_given_frame_and_follows_the_prompt():
    figures = once(base)
    shares = figures["image to video"]
    assert figures["given frame"]["mean dB"] >= 28
    assert min(shares["colour"], shares["background"], shares["motion"]) >= 0.9 and shares["shape"] >= 0.8


def teach_motion() -> Figures:
    parts = image_to_video()
    write_dataset(Path("clips"), CLIPS, seed=1, motion=MOTION, from_middle=True)
    loras = trained("--max_train_steps 250 --learning_rate 2e-3 --lora_rank 16", parts)
    lesson = [replace(scene, motion=MOTION) for scene in TESTED]
    new, old = Stage(parts, lesson, "lesson"), Stage(parts, TESTED, "i2v base")
    before, after = new.film({}), new.film(loras)
    write_sheet(new.prompts, {"without the LoRA": before, "with the LoRA": after})
    return {
        f"{WORD}, before": adherence(before, lesson),
        f"{WORD}, after": adherence(after, lesson),
        "other prompts, before": adherence(old.film({}), TESTED),
        "other prompts, after": adherence(old.film(loras), TESTED),
        "given frame, after": frames_kept(after, new.pictures),
    }


def test_a_lora_teaches_the_image_to_video_model_a_motion_and_it_keeps_all_it_could():
    figures = once(teach_motion)
    assert figures[f"{WORD}, before"]["motion"] <= 0.1 and figures[f"{WORD}, after"]["motion"] >= 0.8
    assert figures["given frame, after"]["mean dB"] >= 28
    assert figures["other prompts, before"]["all"] - figures["other prompts, after"]["all"] < 0.1


def clips_of(seed: str) -> list[Tensor]:
    """A clip of each tested scene: with the seed of a stage, those that begin with its given frames."""
    rng = random.Random(seed)
    return [to_unit_range(render(scene, rng, from_middle=True)) for scene in TESTED]


def control() -> Figures:
    parts = image_to_video()
    write_dataset(Path("clips"), 64, seed=1, from_middle=True)
    loras = trained("--control_lora --caption_dropout 0.8 --max_train_steps 400 --learning_rate 2e-3", parts)
    stage = Stage(parts, TESTED, "i2v base")
    controls = [encode_video(tile(clip).to(stage.device), stage.vae) for clip in clips_of("i2v base")]
    free, followed = stage.film_unprompted({}), stage.film_unprompted(loras, controls)
    write_sheet(stage.prompts, {"without the LoRA, no prompt": free, "with the LoRA, no prompt": followed})
    return {
        "free": adherence(free, TESTED),
        "followed": adherence(followed, TESTED),
        "given frame, followed": frames_kept(followed, stage.pictures),
    }


def test_a_control_lora_makes_the_image_to_video_model_follow_a_video():
    figures = once(control)
    assert figures["free"]["motion"] <= 0.3 and figures["followed"]["motion"] >= 0.8
    assert figures["given frame, followed"]["mean dB"] >= 26  # without guidance


def control_from_a_picture() -> Figures:
    write_dataset(Path("clips"), 64, seed=1, from_middle=True)
    loras = trained("--control_lora --control_i2v --caption_dropout 0.8 --max_train_steps 500 --learning_rate 2e-3", {})
    stage, clips = Stage({}, TESTED, "control"), clips_of("control")
    pictures = [clip[:, :1] for clip in clips]
    shown = [torch.cat([clip[:, :1], tile(clip)[:, 1:]], dim=1) for clip in clips]
    controls = [encode_video(each.to(stage.device), stage.vae) for each in shown]
    free, followed = stage.film_unprompted({}), stage.film_unprompted(loras, controls)
    write_sheet(stage.prompts, {"the picture": [to_pixels(each) for each in pictures], "with the LoRA": followed})
    return {
        "free": adherence(free, TESTED),
        "followed": adherence(followed, TESTED),
        "first frame, followed": frames_kept(followed, pictures),
    }


def test_a_control_lora_makes_the_text_to_video_model_start_from_a_picture():
    figures = once(control_from_a_picture)
    assert figures["free"]["motion"] <= 0.3 and figures["followed"]["motion"] >= 0.8
    assert figures["first frame, followed"]["mean dB"] >= 22


def teach_style() -> Figures:
    write_dataset(Path("clips"), CLIPS, seed=0, style=STYLE)
    loras = trained("--max_train_steps 400 --learning_rate 2e-3 --lora_rank 8", PAIR)
    assert loras.keys() == PAIR.keys()
    trials = make_trials(len(TESTED), 0)
    stage, styled = Stage(PAIR, [trial.scene for trial in trials], "pair"), [trial.styled for trial in trials]
    before, after = stage.film({}, styled), stage.film(loras, styled)
    write_sheet(styled, {"without the LoRAs": before, "with the LoRAs": after})
    return {
        "with the word, before": adherence(before, stage.scenes, STYLE),
        "with the word, after": adherence(after, stage.scenes, STYLE),
        "without the word, before": adherence(stage.film({}), stage.scenes),
        "without the word, after": adherence(stage.film(loras), stage.scenes),
    }


def test_a_pair_of_loras_teaches_the_model_with_two_experts_the_style_of_the_demo():
    figures = once(teach_style)
    assert figures["with the word, before"]["style"] <= 0.05 and figures["with the word, after"]["style"] >= 0.8
    assert figures["without the word, before"]["all"] - figures["without the word, after"]["all"] < 0.1

"""What LoRAs teach the small image-to-video Wan and the small Wan with two experts. Each test takes minutes."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_wan_lora
from nano.demo import CLIPS, MODEL, STYLE, make_trials
from nano.pretrain_families import NANO, channels_of, first_frames, kept, sampler_of
from nano.probe import adherence
from nano.sampling import generate, noise_of
from nano.world import LESSONS, Scene, caption, render, split, write_dataset
from tests.checkout import copy_prompts
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.common.checkpoint_names import list_checkpoints
from utils.common.device import pick_device
from utils.encoding.conditioning import encode_video, to_unit_range
from utils.media.controls import tile
from wan.checkpoints import ModelFiles, load_text_encoder, load_transformer, load_vae, open_model
from wan.modules.model import WanModel

TESTED = split()[1][:100]
(MOTION, WORD) = next(iter(LESSONS.items()))
PAIR = {"high_noise": NANO / "high_noise", "low_noise": MODEL}
ARE_TRAINED = all(path.exists() for path in (*PAIR.values(), NANO / "i2v"))
pytestmark = [
    pytest.mark.nano_families,
    pytest.mark.skipif(not ARE_TRAINED, reason="needs the models that python -m nano.pretrain_families trains"),
]
SETTINGS = "--output_dir runs --base_res 64 --batch_size 4 --cache_latents 1 --lr_scheduler linear --val_samples 0"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working folder with a copy of the negative prompts, beside which their embeddings are written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    return tmp_path


@pytest.fixture
def pictures(tmp_path) -> dict[str, Path]:
    """The experts of the image-to-video model: its one transformer and a copy."""
    return {"high_noise": NANO / "i2v", "low_noise": shutil.copytree(NANO / "i2v", tmp_path / "copy")}


class Stage:
    """A small model with two experts, and what is sampled from it: one video for each scene, always the same noise."""

    def __init__(self, parts: dict[str, Path], scenes: Sequence[Scene], seed: str) -> None:
        self.files: ModelFiles = open_model(MODEL, **parts)
        self.scenes, self.device = scenes, pick_device()
        self.vae = load_vae(self.files, self.device)
        self.encoder = load_text_encoder(self.files, torch.float32, self.device)
        rng = random.Random(seed)
        self.texts = self.encoder.encode([caption(scene, rng) for scene in scenes])
        (self.negative,) = self.encoder.encode([""])
        self.noise = noise_of(self.vae, range(len(scenes)))
        self.pictures = first_frames(scenes, seed) if self.files.family.given else []
        self.given = channels_of(self.pictures, self.vae) if self.pictures else None

    def models(self, loras: dict[str, Path]) -> list[WanModel]:
        """The experts from high noise to low, each with its LoRA, if there are any."""
        found = []
        for name, transformer in self.files.transformers.items():
            model = load_transformer(transformer, torch.float32, self.device)
            if loras:
                fuse_lora(model, read_lora(loras[name]))
            found.append(model)
        return found

    def film(self, loras: dict[str, Path], controls: Sequence[Tensor] = (), prompted: bool = True) -> list[Tensor]:
        """Videos (F, 3, H, W) uint8, guided by their prompts, or without any."""
        channels = self.given
        if controls and self.given is not None:
            channels = [torch.cat([given, control]) for given, control in zip(self.given, controls, strict=True)]
        sampler = sampler_of(self.files.family)
        if not prompted:
            texts, sampler = [self.negative] * len(self.scenes), replace(sampler, guidance=(1.0, 1.0))
        else:
            texts = self.texts
        return generate(self.models(loras), self.vae, texts, self.noise, self.negative, channels, sampler)


def trained(flags: str, parts: dict[str, Path]) -> dict[str, Path]:
    """The LoRA of each expert, trained with the command line on ./clips."""
    files = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    model = ["--dataset", "clips", "--pretrained_model_name_or_path", str(MODEL), *files]
    train_wan_lora.main([*model, *SETTINGS.split(), *flags.split()])
    found = {
        checkpoint.trainable: (checkpoint.step, path)
        for folder in Path("runs").glob("*/checkpoints")
        for path, checkpoint in sorted(list_checkpoints(folder).items(), key=lambda item: item[1].step)
        if checkpoint.trainable in parts
    }
    return {name: path for name, (_, path) in found.items()}


def test_the_image_to_video_model_keeps_the_given_frame_and_follows_the_prompt(pictures):
    stage = Stage(pictures, TESTED, "i2v base")
    videos = stage.film({})
    shares, frames = adherence(videos, TESTED), kept(videos, stage.pictures)
    print(
        f"\nimage-to-video base: {shares}; given frame {sum(frames) / len(frames):.1f} dB, {min(frames):.1f} at least"
    )
    assert min(frames) >= 28
    assert shares["colour"] >= 0.9 and shares["background"] >= 0.9 and shares["motion"] >= 0.9


def test_a_lora_teaches_the_image_to_video_model_a_motion_and_it_keeps_all_it_could(work, pictures):
    write_dataset(work / "clips", CLIPS, seed=1, motion=MOTION, from_middle=True)
    loras = trained("--max_train_steps 250 --learning_rate 2e-3 --lora_rank 16", pictures)
    lesson = [replace(scene, motion=MOTION) for scene in TESTED]
    new, old = Stage(pictures, lesson, "lesson"), Stage(pictures, TESTED, "i2v base")
    before, after, others = new.film({}), new.film(loras), old.film(loras)
    concept = [adherence(videos, lesson)["motion"] for videos in (before, after)]
    shares, frames = adherence(others, TESTED), kept(after, new.pictures)
    print(f"\n{WORD}: {concept}; other prompts: {shares}; given frame {min(frames):.1f} dB at least")
    assert concept[0] <= 0.1 and concept[1] >= 0.8
    assert shares["motion"] >= 0.8 and min(frames) >= 28


def test_a_control_lora_makes_the_image_to_video_model_follow_a_video(work, pictures):
    write_dataset(work / "clips", 64, seed=1, from_middle=True)
    loras = trained("--control_lora --caption_dropout 0.8 --max_train_steps 400 --learning_rate 2e-3", pictures)
    stage, rng = Stage(pictures, TESTED, "i2v base"), random.Random("i2v base")
    clips = [to_unit_range(render(scene, rng, from_middle=True)) for scene in TESTED]
    controls = [encode_video(tile(clip).to(stage.device), stage.vae) for clip in clips]
    free = adherence(stage.film({}, prompted=False), TESTED)
    videos = stage.film(loras, controls, prompted=False)
    followed, frames = adherence(videos, TESTED), kept(videos, stage.pictures)
    print(f"\ncontrol (tile), no prompt: free {free}; followed {followed}; given frame {min(frames):.1f} dB at least")
    assert free["motion"] <= 0.3 and followed["motion"] >= 0.8 and min(frames) >= 28


def test_a_pair_of_loras_teaches_the_model_with_two_experts_the_style_of_the_demo(work):
    write_dataset(work / "clips", CLIPS, seed=0, style=STYLE)
    loras = trained("--max_train_steps 150 --learning_rate 2e-3 --lora_rank 8", PAIR)
    assert loras.keys() == PAIR.keys()
    trials = make_trials(100, 0)
    stage = Stage(PAIR, [trial.scene for trial in trials], "pair")
    plain_before, plain_after = (adherence(stage.film(each), stage.scenes) for each in ({}, loras))
    stage.texts = stage.encoder.encode([trial.styled for trial in trials])
    before, after = (adherence(stage.film(each), stage.scenes, STYLE)["style"] for each in ({}, loras))
    print(f"\npair: style {before} -> {after}; without the word {plain_before['all']} -> {plain_after['all']}")
    assert before <= 0.05 and after >= 0.8 and plain_before["all"] - plain_after["all"] < 0.1

"""Every way of giving frames to a model, from clips to a converted file: one release for each, in one process."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert_lora_to_comfy
import test_wan_control_lora
import train_wan_lora
from tests.checkout import copy_prompts
from tests.families import common_name, lora_files, picture_flags, trainables, turns
from tests.loras import metadata_of
from tests.media import image, moving
from tests.runs import scalars
from tests.tiny import write_model
from utils.adapters.lora_file import delta
from utils.adapters.lora_reader import read_lora
from utils.common.tensor_files import read_tensors
from utils.media.frames import write_video
from utils.media.probing import probe
from wan.configs import FAMILIES, Family

# Of each family the steps, those after which a resumed run begins, and whose turn each step is.
ROWS = {
    "wan2.1-i2v-14B-480P": (4, 2, ["lora"] * 4),
    "wan2.2-i2v-A14B": (3, 3, "high_noise high_noise low_noise low_noise high_noise low_noise".split()),
    "wan2.2-ti2v-5B": (4, 2, ["lora"] * 4),
}
# All clips have the size and the frames of their bucket, and share a batch: fresh windows are the cached ones then.
# 80 is no multiple of 32, as the sizes of the 5B are.
FLAGS = (
    "--base_res 80 --token_limit 80 --batch_size 3 --num_workers 0 --learning_rate 1e-3 --lora_rank 2 "
    "--lora_target all-linear --checkpointing_steps 1 --keep_checkpoints 9 --val_steps 2"
).split()
SIZE, FRAMES = (96, 64), 9


@dataclass(frozen=True)
class Story:
    """A small model of a family, its clips, and its runs: from the cache, from fresh clips, with start pictures."""

    folder: Path
    family: Family
    steps: int  # of each trainable
    cut: int  # the steps of the run after which a resumed one begins
    turns: list[str]

    def train(self, name: str, *more: str) -> Path:
        """The folder of a run with these options besides FLAGS."""
        places = ["--dataset", self.folder / "clips", "--pretrained_model_name_or_path", self.folder / "model"]
        steps = ["--max_train_steps", self.steps, "--output_dir", self.folder / name]
        train_wan_lora.main([*FLAGS, *turns(self.family, 2), *map(str, places), *map(str, steps), *more])
        return self.run(name)

    def run(self, name: str) -> Path:
        (folder,) = (self.folder / name).iterdir()
        return folder

    def loras(self, name: str, step: int | None = None) -> dict[str, dict[str, Tensor]]:
        """The tensors of a run's LoRA files at a step, the last one by default, by what is trained."""
        files = lora_files(self.run(name), self.family, len(self.turns) if step is None else step)
        return {part: read_tensors(file)[0] for part, file in zip(trainables(self.family), files, strict=True)}

    def losses(self, name: str) -> dict[str, dict[int, float]]:
        """Every loss of training and validation: tag -> step -> value."""
        return {tag: values for tag, values in scalars(self.run(name)).items() if "/loss" in tag}


def write_story_clips(folder: Path) -> None:
    for index, name in enumerate(("train/a", "train/b", "train/c", "val/d", "val/e")):
        path = (folder / name).with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving(FRAMES, SIZE[1], SIZE[0]).roll(20 * index, dims=3), 16)
        path.with_suffix(".txt").write_text(f"clip {index}", encoding="utf-8")
    image(folder / "train" / "a_first.png", caption=None, size=SIZE)


@pytest.fixture(scope="module", params=ROWS)
def story(request, tmp_path_factory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("story")
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(folder / "embeddings"))
        write_model(folder / "model", family)
        write_story_clips(folder / "clips")
        told = Story(folder, family, *ROWS[request.param])
        told.train("cached", "--cache_latents", "1", *"--sample_prompts fox --sample_every 9 --sample_steps 2".split())
        yield told


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_changes_the_lora_of_its_phase_alone_and_files_say_which_that_is(story):
    before = story.loras("cached", 1)
    for step, turn in enumerate(story.turns[1:], 2):
        after = story.loras("cached", step)
        assert [part for part in after if not equal(before[part], after[part])] == [turn]
        before = after
    for part, file in zip(trainables(story.family), lora_files(story.run("cached"), story.family, 1), strict=True):
        assert metadata_of(file).get("expert", "lora") == part


def test_each_trained_expert_is_validated_at_its_own_noise_levels(story):
    losses, last = story.losses("cached"), len(story.turns)
    for expert, part in zip(story.family.experts, trainables(story.family), strict=True):
        train, val = ("train", "val") if part == "lora" else (part, f"val/{part}")
        assert list(losses[f"{train}/loss"]) == [step for step, turn in enumerate(story.turns, 1) if turn == part]
        assert list(losses[f"{val}/loss"]) == [*range(0, last, 2), last]
        assert losses[f"{val}/loss"][last] < losses[f"{val}/loss"][0]
        low, high = expert.sigmas
        levels = [low + (high - low) * quantile for quantile in (0.1, 0.3, 0.5, 0.7, 0.9)]
        assert {f"{val}/loss_sigma_{level:g}" for level in levels} <= losses.keys()
    assert len([tag for tag in losses if tag.endswith("/loss")]) == 2 * len(trainables(story.family))


def test_previews_start_from_validation_clips_and_change_with_the_lora(story):
    samples = story.run("cached") / "samples"
    first, last = (samples / f"{step:08d}.png" for step in (0, len(story.turns)))
    assert first.read_bytes() != last.read_bytes()
    info = probe(samples / f"{len(story.turns):08d}-01.mp4")
    assert ((info.width, info.height), info.frames, info.fps) == (SIZE, FRAMES, story.family.fps)


def test_fresh_clips_give_the_losses_and_the_lora_of_cached_ones_to_the_bit(story):
    story.train("fresh")
    assert story.losses("fresh") == story.losses("cached")
    cached, fresh = story.loras("cached"), story.loras("fresh")
    assert all(equal(cached[part], fresh[part]) for part in cached)


def test_another_first_frame_gives_another_loss(story):
    story.train("pictured", "--load_first_frame", "--cache_latents")
    own, pictured = story.losses("cached"), story.losses("pictured")
    assert own.keys() == pictured.keys()
    for tag in own:
        if tag.endswith("/loss") and not tag.startswith("val/"):
            assert own[tag] != pictured[tag]
    # The clips of validation have no start pictures, and before the first step no LoRA.
    assert all(own[tag][0] == pictured[tag][0] for tag in own if tag.startswith("val/"))


def test_a_run_that_is_resumed_inside_a_phase_ends_as_an_unbroken_one(story):
    shutil.copytree(story.folder / "cached", story.folder / "resumed")
    run = story.run("resumed")
    for path in (run / "checkpoints").iterdir():
        if not path.stem.endswith(f"{story.cut:08d}"):
            path.unlink()
    story.train("resumed", "--cache_latents", "1", "--resume_from_checkpoint", "latest")
    cached, resumed = story.loras("cached"), story.loras("resumed")
    assert all(equal(cached[part], resumed[part]) for part in cached)
    name = f"state-{len(story.turns):08d}.safetensors"
    states = (read_tensors(story.run(each) / "checkpoints" / name)[0] for each in ("cached", "resumed"))
    assert equal(*states)


def sampled(patch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Tensor]:
    """The videos that the test script would write, by their labels."""
    written: list[tuple] = []
    patch.setattr(test_wan_control_lora, "write", lambda *given: written.append(given))
    sizes = "--prompt fox --width 64 --height 64 --frames 5 --steps 2".split()
    test_wan_control_lora.main([*map(str, arguments), *sizes])
    ((_, _, videos, *_),) = written
    return videos


def converted(story: Story, layout: str) -> list[Path]:
    """The files of the last step in another layout, converted with one command."""
    run, step = story.run("cached"), len(story.turns)
    convert_lora_to_comfy.main(["--input_lora", str(common_name(run, step)), "--to", layout])
    return [file.with_stem(f"{file.stem}_{layout}") for file in lora_files(run, story.family, step)]


def test_converted_files_give_the_same_weights_and_the_same_video(story, monkeypatch):
    run, step = story.run("cached"), len(story.turns)
    files, others = lora_files(run, story.family, step), converted(story, "diffusers")
    for file, other in zip(files, others, strict=True):
        ours, theirs = read_lora(file).pairs, read_lora(other).pairs
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(delta(ours[name]), delta(theirs[name])) for name in ours)
    given = picture_flags(story.family, story.folder / "clips/train/a.mp4", story.folder / "clips/train/b.mp4")
    by_name = sampled(monkeypatch, "--lora_path", common_name(run, step), *given, "--compare")
    assert not torch.equal(by_name["without the LoRA"], by_name["with the LoRA"])
    by_files = sampled(monkeypatch, "--lora_path", *others, *given)
    assert torch.equal(by_files["with the LoRA"], by_name["with the LoRA"])
    if len(files) > 1:
        high = sampled(monkeypatch, "--lora_path", files[0], *given)
        assert not torch.equal(high["with the LoRA"], by_name["with the LoRA"])


def test_a_video_starts_from_its_picture(story, monkeypatch):
    lora = common_name(story.run("cached"), len(story.turns))
    clips = story.folder / "clips" / "train"
    first, second = (sampled(monkeypatch, "--lora_path", lora, "--image", clips / f"{name}.mp4") for name in "ab")
    assert not torch.equal(first["with the LoRA"], second["with the LoRA"])

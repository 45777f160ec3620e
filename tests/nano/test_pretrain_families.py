"""Small models of other families are trained from Wan-Nano, resume, and are sampled together with it."""

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from nano import pretrain_families, pretrain_transformer
from nano.demo import MODEL
from nano.pretrain_families import COURSES, I2V, T2V, channels_of, first_frames, kept, sampler_of, with_inputs
from nano.sampling import generate, load, noise_of
from nano.world import Scene, render, to_frames
from wan.checkpoints import load_transformer, open_model

CPU = torch.device("cpu")
SCENE = Scene("circle", "red", "white", "left")


@dataclass
class Seen:
    """What the training was shown: its noise levels, and whether its clips begin alike."""

    sigmas: list[tuple[float, float]] = field(default_factory=list)
    from_middle: list[bool] = field(default_factory=list)


SEEN = Seen()


def command(folder: Path) -> list[str]:
    return ["--output_dir", str(folder), "--work", str(folder / "states")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """The folder of a finished training, shortened to a step of two clips: high_noise/, i2v/ and states/."""
    folder = tmp_path_factory.mktemp("families")
    noisy, clips = pretrain_transformer.sample_noisy, pretrain_transformer.training_clips

    def sample_noisy(latents, shift, sigmas):
        SEEN.sigmas.append(sigmas)
        return noisy(latents, shift, sigmas)

    def training_clips(count, from_middle):
        SEEN.from_middle.append(from_middle)
        return clips(count, from_middle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_transformer, "sample_noisy", sample_noisy)
        patch.setattr(pretrain_transformer, "training_clips", training_clips)
        patch.setattr(pretrain_transformer, "CLIP_BATCH", 2)
        patch.setattr(pretrain_families, "NUM_TESTED", 1)
        short = {name: replace(course, clip_steps=1, num_clips=3) for name, course in COURSES.items()}
        patch.setattr(pretrain_families, "COURSES", short)
        pretrain_families.main(command(folder))
        yield folder


def test_each_is_trained_at_its_noise_levels_on_clips_that_begin_alike_where_a_frame_is_given(trained):
    assert SEEN.sigmas[:2] == [(0.875, 1.0), (0.0, 1.0)] and SEEN.from_middle[:2] == [False, True]


def test_a_finished_training_is_not_repeated(trained, monkeypatch):
    weights = {path: path.read_bytes() for path in trained.rglob("*.safetensors")}
    monkeypatch.setattr(pretrain_transformer, "draw", lambda *_: pytest.fail("a step was taken"))
    pretrain_families.main(command(trained))
    assert {path: path.read_bytes() for path in trained.rglob("*.safetensors")} == weights


def test_both_are_models_for_the_scripts_with_wan_nanos_other_parts(trained):
    pair = open_model(MODEL, high_noise=trained / "high_noise", low_noise=MODEL)
    assert pair.family is T2V and list(pair.transformers) == ["high_noise", "low_noise"]
    copy = shutil.copytree(trained / "i2v", trained / "i2v_copy", dirs_exist_ok=True)
    single = open_model(MODEL, high_noise=trained / "i2v", low_noise=copy)
    assert single.family is I2V and single.shape.in_dim == 36 and single.clip is None
    for files in (pair, single):
        model = load_transformer(files.transformers["high_noise"], torch.float32)
        base = load_transformer(open_model(MODEL).transformer, torch.float32)
        changed = [not torch.equal(new, old) for new, old in zip(model.parameters(), base.parameters(), strict=True)]
        assert sum(changed) > len(changed) / 2
    assert {path.name for path in (trained / "states").glob("*.pt")} == {"high_noise.pt", "i2v.pt"}


def test_more_inputs_change_nothing_until_they_are_trained():
    model, vae, encoder = load(MODEL, CPU)
    wide, texts, noise = with_inputs(model, 36), encoder.encode(["a red circle"]), noise_of(vae, [0], 5)
    sampler = replace(sampler_of(I2V), steps=2)
    channels = [torch.ones(20, *noise.shape[2:])]
    (expected,) = generate(model, vae, texts, noise, sampler=replace(sampler, boundaries=()))
    (found,) = generate([wide, wide], vae, texts, noise, channels=channels, sampler=sampler)
    assert (expected.float() - found.float()).abs().max() <= 1


def test_the_given_frame_is_measured_in_decibels():
    picture, clip = first_frames([SCENE], "a")[0], to_frames(render(SCENE, random.Random("a"), None, True))
    assert picture.shape == (3, 1, 64, 64) and kept([clip], [picture])[0] > 50
    assert kept([(clip.float() + 10).clamp(0, 255)], [picture])[0] < 30
    (channels,) = channels_of([picture], load(MODEL, CPU)[1])
    assert channels.shape == (20, 5, 8, 8) and channels[:4, 0].eq(1).all() and channels[:4, 1:].eq(0).all()

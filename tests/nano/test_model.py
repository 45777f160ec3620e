"""The published small Wan: its files, how well it follows prompts, and its VAE."""

import random

import pytest
import torch

from nano.demo import MODEL
from nano.pretrain_transformer import SHAPE
from nano.pretrain_vae import psnr, reconstruct
from nano.probe import adherence
from nano.sampling import generate, load, noise_of
from nano.world import caption, render, split
from utils.common.device import pick_device
from utils.encoding.conditioning import to_unit_range
from wan.checkpoints import load_vae, open_model

WITHHELD = split()[1]


def prompt_adherence(count: int) -> dict[str, float]:
    """The adherence to captions of withheld scenes, with 20 UniPC steps and guidance."""
    scenes, rng = WITHHELD[:count], random.Random("follow")
    model, vae, encoder = load(MODEL, pick_device())
    texts = encoder.encode([caption(scene, rng) for scene in scenes])
    videos = generate(model, vae, texts, noise_of(vae, range(len(scenes))), encoder.encode([""])[0])
    return adherence(videos, scenes)


def test_it_has_the_official_layout_and_takes_at_most_30_mb():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.relative_to(MODEL).as_posix() for path in files} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
        "google/umt5-xxl/tokenizer_config.json",
        "google/umt5-xxl/special_tokens_map.json",
    }
    files = open_model(MODEL)
    assert files.family.task == "t2v" and files.transformer.shape == SHAPE


def test_its_normalised_latents_have_mean_0_and_deviation_1():
    rng = random.Random(0)
    vae = load_vae(open_model(MODEL))
    clips = torch.stack([to_unit_range(render(scene, rng)) for scene in WITHHELD[:24]])
    latents = torch.cat([vae.encode(clip[None]) for clip in clips])
    assert latents.mean(dim=(0, 2, 3, 4)).abs().mean() < 0.3
    assert 0.7 < latents.std() < 1.3


def test_it_follows_prompts_of_eight_scenes_that_it_has_never_seen():
    shares = prompt_adherence(8)
    assert shares["colour"] >= 0.85 and shares["background"] >= 0.85
    assert shares["motion"] >= 0.7 and shares["shape"] >= 0.6


@pytest.mark.nano
def test_it_follows_prompts_of_all_scenes_that_it_has_never_seen():
    shares = prompt_adherence(len(WITHHELD))
    print(f"\nadherence on {len(WITHHELD)} withheld scenes: {shares}")
    assert len(WITHHELD) >= 150
    assert shares["colour"] >= 0.95 and shares["background"] >= 0.95
    assert shares["motion"] >= 0.90 and shares["shape"] >= 0.80


@pytest.mark.nano
def test_its_vae_reconstructs_unseen_clips_with_30_db():
    rng = random.Random(1)
    clips = torch.stack([to_unit_range(render(scene, rng)) for scene in WITHHELD])
    reached = psnr(reconstruct(load_vae(open_model(MODEL)), clips), clips)
    print(f"\nVAE: {reached:.2f} dB on {len(clips)} clips of withheld scenes")
    assert reached >= 30

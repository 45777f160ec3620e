"""Slower proofs: the released widths, and a run at the default resolution."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

import train_wan_lora
from tests.peers import diffusers_transformer, diffusers_vae22
from tests.tiny import initialise, write_clips, write_model
from tests.wan.modules.test_model import to_diffusers
from tests.wan.modules.test_vae import diffusers_name
from wan.modules.model import WanModel, WanShape
from wan.modules.vae import WanVAE
from wan.modules.vae2_2 import Wan22VAE

pytestmark = pytest.mark.slow


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_two_blocks_of_the_1_3b_model_equal_those_of_diffusers_at_a_thousand_tokens():
    shape = WanShape(num_layers=2)
    ours = WanModel(shape).eval()
    initialise(ours, seed=0)
    theirs = diffusers_transformer(shape)
    theirs.load_state_dict({to_diffusers(name): tensor for name, tensor in ours.state_dict().items()})
    latents, text = torch.randn(1, 16, 5, 26, 32), torch.randn(1, 512, 4096)
    timestep = torch.tensor([731.25])
    assert relative_error(ours(latents, timestep, text), theirs(latents, timestep, text).sample) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_the_full_size_vae_equals_that_of_diffusers(frames):
    ours = WanVAE().eval()
    initialise(ours, seed=0)
    theirs = AutoencoderKLWan().eval()
    theirs.load_state_dict({diffusers_name(name): tensor for name, tensor in ours.state_dict().items()})
    video = torch.rand(1, 3, frames, 64, 96) * 2 - 1
    mean, std = ours.latent_mean, ours.latent_std
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(ours.encode(video), expected) <= 1e-5
    latents = torch.randn_like(expected)
    assert relative_error(ours.decode(latents), theirs.decode(latents * std + mean).sample) <= 1e-5


@torch.no_grad()
def test_the_full_size_vae_of_wan_22_equals_that_of_diffusers():
    # In float64: on CPUs without AVX-512 sums of fp32 differ by more than 1e-5. diffusers upsamples in fp32 anyway.
    ours = Wan22VAE().eval()
    initialise(ours, seed=0)
    theirs = diffusers_vae22(ours).double()
    ours.double()
    video = torch.rand(1, 3, 5, 64, 96, dtype=torch.float64) * 2 - 1
    mean, std = ours.latent_mean.double(), ours.latent_std.double()
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert relative_error(ours.encode(video), expected) <= 1e-10
    latents = torch.randn_like(expected)
    assert relative_error(ours.decode(latents), theirs.decode(latents * std + mean).sample) <= 1e-6


def test_a_run_at_the_default_resolution_lowers_the_validation_loss(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", tmp_path)
    write_model(Path("model"))
    write_clips(Path("clips"))
    flags = "--dataset clips --pretrained_model_name_or_path model --token_limit 3200 --max_train_steps 8"
    train_wan_lora.main(f"{flags} --learning_rate 3e-3 --lora_target all-linear --val_samples 1".split())
    first, last = (float(loss) for loss in re.findall(r"validation loss (\S+)", capsys.readouterr().out))
    assert last < first
    (options,) = Path("outputs").glob("*/command_args.json")
    assert json.loads(options.read_text())["base_res"] == [624]

"""Generates many small videos at once, for the probe."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nano.world import FRAMES, SIDE
from utils.diffusion.flow import Predict, seeded_noise
from utils.encoding.conditioning import Cond, Encoded, collate, make_predict, replace_text, to_pixels
from wan.checkpoints import load_text_encoder, load_transformer, load_vae, open_model
from wan.modules.model import WanModel
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE
from wan.text2video import Sampler, part_at

SAMPLER = Sampler("unipc", steps=20, guidance=(2.5,), shift=5.0)
BATCH = 32


def load(folder: Path, device: torch.device) -> tuple[WanModel, WanVAE, TextEncoder]:
    """The transformer, the VAE and the text encoder of a small model, in fp32. Raises CheckpointError."""
    files = open_model(folder)
    encoder = load_text_encoder(files, torch.float32, device)
    return load_transformer(files.transformer, torch.float32, device), load_vae(files, device), encoder


def experts_predict(models: Sequence[WanModel], boundaries: Sequence[float]) -> Predict[Cond]:
    """`predict(latents, timestep, cond) -> velocity` of the expert that answers at a timestep."""
    answers = [make_predict(model) for model in models]

    def predict(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        return answers[part_at(boundaries, timestep)](latents, timestep, cond)

    return predict


def noise_of(vae: WanVAE, seeds: Sequence[int], frames: int = FRAMES) -> Tensor:
    """Noise (B, 16, f, h, w) for videos of the world's size, one sample per seed."""
    shape = vae.latent_shape(frames, SIDE, SIDE)
    return torch.stack([seeded_noise(shape, seed) for seed in seeds])


def generate(
    model: WanModel | Sequence[WanModel],
    vae: WanVAE,
    texts: Sequence[Tensor],
    noise: Tensor,
    negative: Tensor | None = None,
    channels: Sequence[Tensor] | None = None,
    sampler: Sampler = SAMPLER,
) -> list[Tensor]:
    """A video (F, 3, H, W) uint8 per text (T, E), from noise (B, 16, f, h, w). Computes on the VAE's device.

    Videos are guided away from the `negative` text (T, E), and follow what is shown in further input channels
    (K, f, h, w): control latents, or given frames. Several models are experts, from high noise to low, whose boundaries
    the sampler has.
    """
    device, predict = vae.device, experts_predict(model if isinstance(model, Sequence) else [model], sampler.boundaries)
    negative = None if negative is None else negative.to(device)
    samples = [
        Encoded(start, Cond(rows.cpu(), None if channels is None else channels[index].cpu()))
        for index, (start, rows) in enumerate(zip(noise, texts, strict=True))
    ]
    videos = []
    with torch.no_grad():
        for begin in tqdm(range(0, len(samples), BATCH), "generating", leave=False, unit="batch"):
            batch = collate(samples[begin : begin + BATCH]).to(device)
            uncond = None if negative is None else replace_text(batch.cond, negative)
            numbers = tuple(range(begin, begin + len(batch.latents)))  # the noise of a video is its own
            latents = replace(sampler, seeds=numbers).denoise(predict, batch.latents, batch.cond, uncond)
            videos += [to_pixels(vae.decode(one[None])[0]) for one in latents]
    return videos

"""Generates many small videos at once, for the probe."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nano.world import FRAMES, SIDE
from utils.diffusion.flow import seeded_noise
from utils.encoding.conditioning import Cond, Encoded, collate, make_predict, replace_text, to_pixels
from wan.checkpoints import load_text_encoder, load_transformer, load_vae, open_model
from wan.modules.model import WanModel
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE
from wan.text2video import Sampler

SAMPLER = Sampler("unipc", steps=20, guidance=(2.5,), shift=5.0)
BATCH = 32


def load(folder: Path, device: torch.device) -> tuple[WanModel, WanVAE, TextEncoder]:
    """The transformer, the VAE and the text encoder of a small model, in fp32. Raises CheckpointError."""
    files = open_model(folder)
    encoder = load_text_encoder(files, torch.float32, device)
    return load_transformer(files.transformer, torch.float32, device), load_vae(files, device), encoder


def noise_of(vae: WanVAE, seeds: Sequence[int], frames: int = FRAMES) -> Tensor:
    """Noise (B, 16, f, h, w) for videos of the world's size, one sample per seed."""
    shape = vae.latent_shape(frames, SIDE, SIDE)
    return torch.stack([seeded_noise(shape, seed) for seed in seeds])


def generate(
    model: WanModel,
    vae: WanVAE,
    texts: Sequence[Tensor],
    noise: Tensor,
    negative: Tensor | None = None,
    controls: Sequence[Tensor] | None = None,
    sampler: Sampler = SAMPLER,
) -> list[Tensor]:
    """A video (F, 3, H, W) uint8 per text (T, E), from noise (B, 16, f, h, w). Computes on the VAE's device.

    Videos are guided away from the `negative` text (T, E) and follow the control latents (16, f, h, w), if given.
    """
    device, predict = vae.device, make_predict(model)
    negative = None if negative is None else negative.to(device)
    samples = [
        Encoded(start, Cond(rows.cpu(), None if controls is None else controls[index].cpu()))
        for index, (start, rows) in enumerate(zip(noise, texts, strict=True))
    ]
    videos = []
    with torch.no_grad():
        for begin in tqdm(range(0, len(samples), BATCH), "generating", leave=False, unit="batch"):
            batch = collate(samples[begin : begin + BATCH]).to(device)
            uncond = None if negative is None else replace_text(batch.cond, negative)
            latents = sampler.denoise(predict, batch.latents, batch.cond, uncond)
            videos += [to_pixels(vae.decode(one[None])[0]) for one in latents]
    return videos

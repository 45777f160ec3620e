"""Many small videos at once: what the probe is asked about."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.conditioning import Cond, Encoded, collate, make_predict, to_pixels
from utils.sampling import Sampler
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE

SAMPLER = Sampler("unipc", steps=20, guidance=4.0, shift=5.0)
BATCH = 32


def noise_of(seeds: Sequence[int], frames: int, side: int) -> Tensor:
    """Noise (B, 16, f, h, w) for square videos, each sample's by its own seed."""
    shape = (16, (frames - 1) // 4 + 1, side // 8, side // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def generate(
    model: WanModel,
    vae: WanVAE,
    texts: Sequence[Tensor],
    negative: Tensor | None,
    noise: Tensor,
    channels: Tensor | None = None,
    sampler: Sampler = SAMPLER,
) -> list[Tensor]:
    """Videos (F, 3, H, W) uint8 for text rows (T, E) each, from noise (B, 16, f, h, w)."""
    device = vae.conv2.weight.device
    predict = make_predict(model)
    negative = None if negative is None else negative.to(device)
    videos = []
    for begin in range(0, len(texts), BATCH):
        here = slice(begin, begin + BATCH)
        batch = collate([Encoded(start, rows) for start, rows in zip(noise[here], texts[here], strict=True)]).to(device)
        cond = Cond(batch.cond.text, None if channels is None else channels[here].to(device))
        latents = sampler.denoise(predict, batch.latents, cond, negative)
        videos += [to_pixels(vae.decode(one[None])[0]) for one in latents]
    return videos

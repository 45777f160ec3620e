"""Encoding a clip with the video VAE: time, in two layouts of its weights, memory, and the loss of accuracy in bf16."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Clock, Row, Sizes, median_seconds, peak_bytes
from benchmarks.weights import SEED, random_vae
from utils.encoding.vae_layout import CHANNELS_LAST, PLAIN, use_layout

WARMUPS, REPEATS = 1, 3


@torch.no_grad()
def check(sizes: Sizes, device: torch.device, clock: Clock) -> Iterator[Row]:
    """In fp32, with TF32 convolutions if torch's defaults allow them, and in bf16."""
    frames, height, width = sizes.clip
    generator = torch.Generator(device).manual_seed(SEED)
    video = torch.rand(1, 3, *sizes.clip, device=device, generator=generator) * 2 - 1
    vae = random_vae(sizes.vae_dim, device)
    latents: dict[torch.dtype, Tensor] = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        vae, pixels = vae.to(dtype), video.to(dtype)
        encode = partial(vae.encode, pixels)
        use_layout(vae, CHANNELS_LAST)
        other = encode().double()
        peak = peak_bytes(encode, device)
        spent = median_seconds(encode, device, WARMUPS, REPEATS)
        use_layout(vae, PLAIN)
        latents[dtype] = encode().double()
        error = ((other - latents[dtype]).norm() / latents[dtype].norm()).item()
        yield Row(f"encode, {name}, channels last", spent, "s", f"relative difference of the latents {error:.1e}")
        if peak:
            yield Row(f"encode, {name}, channels last: peak of activations", peak / 1e9, "GB")
        peak = peak_bytes(encode, device)
        spent = median_seconds(encode, device, WARMUPS, REPEATS)
        yield Row(f"encode, {name}", spent, "s", f"{frames} frames of {width}x{height}")
        if peak:
            resident = sum(parameter.nbytes for parameter in vae.parameters())
            yield Row(f"encode, {name}: peak memory", (peak + resident + pixels.nbytes) / 1e9, "GB")
    exact, rounded = latents.values()
    error = ((rounded - exact).norm() / exact.norm()).item()
    yield Row("bf16: relative error of the latents", error, comparison="fp32 above, random weights")

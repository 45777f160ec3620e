"""Trains the small VAE from scratch: images first, then longer and longer pieces of clips."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.training import Stage, autocast, faster_attention, fingerprint, fit
from nano.world import FRAMES, SIDE, doodle, recoloured, render, split
from utils.encoding.conditioning import to_unit_range
from utils.media.controls import tile
from wan.modules.vae import CausalConv3d, Downsample, Upsample, WanVAE

WIDTH = 16
EDGE_WEIGHT, KL_WEIGHT = 0.5, 5e-4
START_LOG_VARIANCE = -6.0
DOODLE_SHARE, RECOLOURED_SHARE, TILE_SHARE = 0.1, 0.25, 0.1  # of the clips drawn
HALVED_SHARE = 0.1  # of the steps
NUM_TESTED, NUM_FOLDED = 16, 256  # clips for the printed figures, and for the statistics of the latents


@dataclass(frozen=True)
class Pieces:
    """What the VAE is trained on for `steps` steps: `count` pieces of clips per step, each (3, frames, side, side)."""

    steps: int
    frames: int
    side: int
    count: int


# Small pieces are cropped around an edge: most of a clip is plain background, which teaches little.
LESSONS = (Pieces(900, 1, 32, 16), Pieces(500, 5, 32, 8), Pieces(4500, 17, 32, 8), Pieces(700, 17, 64, 2))
MIN_EDGE = 20.0  # difference of neighbouring pixels, on the 0..255 scale
MIN_STEPS_COMPILED = 1000  # compilation takes minutes, which only a long lesson makes up for


def vae_stage(seed: int) -> Stage:
    """The whole training of the VAE."""
    steps = sum(pieces.steps for pieces in LESSONS)
    settings = LESSONS, EDGE_WEIGHT, KL_WEIGHT, DOODLE_SHARE, RECOLOURED_SHARE, TILE_SHARE, HALVED_SHARE
    data = fingerprint(str(settings), draw(LESSONS[-1], random.Random("sample")))
    return Stage("vae", seed, steps, 3e-3, 1e-3, ema_decay=0.995, evaluate_every=600, data=data)


def lesson(step: int) -> Pieces:
    """The pieces that a step of the training uses. Raises ValueError for a step after the last."""
    for pieces in LESSONS:
        if step < pieces.steps:
            return pieces
        step -= pieces.steps
    raise ValueError("the training has fewer steps")


@torch.no_grad()
def initialise(vae: WanVAE) -> WanVAE:
    """Changes the weights of a new VAE in place so that training does not collapse; returns the VAE.

    It starts as a VAE of single images: temporal kernels see the current frame alone, temporal downsampling averages
    frames, temporal upsampling repeats them. The posterior starts narrow, or the KL term would win before the VAE
    reconstructs anything.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.weight.shape[2:] == (3, 3, 3):
            module.weight[:, :, :2] = 0
            module.weight[:, :, 2] *= 3  # a third of the inputs are left
        elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            weight, bias = (module.time_conv.get_parameter(name) for name in ("weight", "bias"))
            same = torch.eye(weight.shape[1])[:, :, None, None]
            weight.zero_()
            bias.zero_()
            if isinstance(module, Downsample):
                weight[:, :, 1:] = same[:, :, None] / 2
            else:
                weight[:, :, 2] = torch.cat([same, same])
    weight, bias = (vae.conv1.get_parameter(name) for name in ("weight", "bias"))
    weight[vae.z_dim :] *= 0.1
    bias[vae.z_dim :] = START_LOG_VARIANCE
    return vae


def draw(pieces: Pieces, rng: random.Random) -> Tensor:
    """A batch (B, 3, frames, side, side) in -1..1, mostly from clips of the world. Withheld scenes are never shown."""
    known, _ = split()
    clips = []
    for _ in range(pieces.count):
        chance, scene = rng.random(), rng.choice(known)
        if chance < DOODLE_SHARE:
            clip = doodle(rng)
        elif chance < DOODLE_SHARE + RECOLOURED_SHARE:
            clip = recoloured(scene, rng)
        else:
            clip = render(scene, rng)
        clips.append(_piece(tile(clip) if rng.random() < TILE_SHARE else clip, pieces, rng))
    return to_unit_range(torch.stack(clips))


def _piece(clip: Tensor, pieces: Pieces, rng: random.Random) -> Tensor:
    begin, side = rng.randint(0, FRAMES - pieces.frames), pieces.side
    piece = clip[:, begin : begin + pieces.frames]
    edges = piece[:, rng.randrange(pieces.frames)].diff(dim=-1).abs().amax(dim=0) > MIN_EDGE
    places = edges.nonzero().tolist() or [[SIDE // 2, SIDE // 2]]
    top, left = (min(max(0, place - rng.randrange(side)), SIDE - side) for place in rng.choice(places))
    return piece[:, :, top : top + side, left : left + side]


def halved(video: Tensor) -> Tensor:
    """Averages 2x2 pixels: (B, C, F, H, W) -> (B, C, F, H/2, W/2)."""
    return F.avg_pool3d(video, (1, 2, 2))


def loss(vae: WanVAE, video: Tensor, smaller: bool) -> Tensor:
    """Absolute and squared error, absolute error of the edges, and KL to the normal distribution: a scalar.

    With `smaller`, the latents are halved before decoding, and the target is the halved clip. Latents that can be
    scaled like images are smooth, and easier for the transformer (EQ-VAE, Kouzelis et al., 2025).
    """
    mu, log_variance = (part.float() for part in vae.posterior(video))
    z = mu + (0.5 * log_variance).exp() * torch.randn_like(mu)
    kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).mean()
    if smaller:
        z, video = halved(z), halved(video)
    error = vae.generate(z).float() - video
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def psnr(video: Tensor, other: Tensor) -> float:
    """The peak signal-to-noise ratio in dB of two batches of videos in -1..1, over all values at once."""
    return -10 * math.log10(((video - other) / 2).square().mean().item())


@torch.no_grad()
def reconstruct(vae: WanVAE, video: Tensor) -> Tensor:
    """A batch of videos (B, 3, F, H, W) in -1..1, encoded and decoded one at a time."""
    return torch.cat([vae.decode(vae.encode(clip[None])) for clip in video])


def evaluate(vae: WanVAE, step: int) -> str:
    """The PSNR of clips of withheld scenes, of their first frames, and of doodles."""
    rng = random.Random("vae test")
    _, withheld = split()
    device = vae.device
    video = torch.stack([to_unit_range(render(scene, rng)) for scene in withheld[:NUM_TESTED]]).to(device)
    drawn = torch.stack([to_unit_range(doodle(rng)) for _ in range(8)]).to(device)
    image = video[:, :, :1]
    with autocast(device):
        tested = {"clips": video, "images": image, "doodles": drawn}
        figures = {name: psnr(reconstruct(vae, some).float(), some) for name, some in tested.items()}
    return ", ".join(f"{name} {value:.2f} dB" for name, value in figures.items())


@torch.no_grad()
def fold_statistics(vae: WanVAE, video: Tensor) -> WanVAE:
    """Changes conv1 and conv2 in place so that normalised latents of `video` have mean 0 and deviation 1 per channel.

    `video` is (B, 3, F, H, W) in -1..1. The normalisation uses the released statistics, which are part of the code. So
    conv1 (1x1x1) now produces latents with those statistics, and conv2 (1x1x1) undoes that: reconstructions stay the
    same. Returns the VAE.
    """
    mu = torch.cat([vae.posterior(clip[None])[0] for clip in video])
    mean, std = mu.mean(dim=(0, 2, 3, 4)), mu.std(dim=(0, 2, 3, 4))
    scale = vae.latent_std.flatten() / std
    offset = vae.latent_mean.flatten() - scale * mean
    weight, bias = (vae.conv2.get_parameter(name) for name in ("weight", "bias"))
    bias.add_(weight.flatten(1) @ (-offset / scale))
    weight.div_(scale[None, :, None, None, None])
    z = vae.z_dim
    weight, bias = (vae.conv1.get_parameter(name) for name in ("weight", "bias"))
    weight[:z] *= scale[:, None, None, None, None]
    bias[:z] = bias[:z] * scale + offset
    bias[z:] += 2 * scale.log()
    return vae


def train_vae(work: Path, device: torch.device, seed: int, compiled: bool) -> WanVAE:
    """Trains the VAE and folds the statistics of its latents in. Saves the state of the training in `work`.

    Raises UserError as `fit` does.
    """
    torch.manual_seed(seed)
    vae = initialise(WanVAE(WIDTH)).to(device)
    # Weights in the memory layout of the clips: a third faster.
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | CausalConv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    faster = torch.compile(loss, dynamic=False) if compiled else loss

    def loss_at(step: int) -> Tensor:
        rng, pieces = random.Random(f"vae {step}"), lesson(step)
        objective = faster if pieces.steps >= MIN_STEPS_COMPILED else loss
        video = draw(pieces, rng).to(device, memory_format=torch.channels_last_3d)
        with faster_attention(device), autocast(device):
            return objective(vae, video, rng.random() < HALVED_SHARE)

    average = fit(vae, vae_stage(seed), loss_at, evaluate, work)
    rng = random.Random("statistics")
    known, _ = split()
    video = torch.stack([to_unit_range(render(scene, rng)) for scene in known[:NUM_FOLDED]])
    return fold_statistics(average, video.to(device)).eval().requires_grad_(False)

"""The small VAE, from nothing: first pictures, then ever longer pieces of clips."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.training import Plan, faster_attention, fingerprint, fit
from nano.world import FRAMES, SIDE, doodle, recoloured, render, split
from utils.encoding.conditioning import to_unit_range
from utils.media.controls import tile
from wan.modules.vae import CausalConv3d, Downsample, Upsample, WanVAE

WIDTH = 16
EDGE_WEIGHT, KL_WEIGHT = 0.5, 5e-4
START_LOG_VARIANCE = -6.0
DOODLE_SHARE, RECOLOURED_SHARE, TILE_SHARE = 0.1, 0.25, 0.1  # of the clips drawn
HALVED_SHARE = 0.1  # of the steps
NUM_TESTED, NUM_FOLDED = 16, 256


@dataclass(frozen=True)
class Pieces:
    """What the VAE sees for a while: so many pieces of clips per step, each (3, frames, side, side)."""

    steps: int
    frames: int
    side: int
    count: int


# Pictures first, then ever longer pieces. Small ones are cut out around an edge: most of a clip is plain background,
# from which there is little to learn.
LESSONS = (Pieces(900, 1, 32, 16), Pieces(500, 5, 32, 8), Pieces(4500, 17, 32, 8), Pieces(700, 17, 64, 2))
MIN_EDGE = 20.0  # between neighbouring pixels, on the 0..255 scale
MIN_STEPS_COMPILED = 1000  # compiling takes minutes, which only many steps repay


def plan(seed: int) -> Plan:
    steps = sum(pieces.steps for pieces in LESSONS)
    settings = LESSONS, EDGE_WEIGHT, KL_WEIGHT, DOODLE_SHARE, RECOLOURED_SHARE, TILE_SHARE, HALVED_SHARE
    data = fingerprint(str(settings), draw(LESSONS[-1], random.Random("sample")))
    return Plan("vae", seed, steps, 3e-3, 1e-3, ema_decay=0.995, evaluate_every=600, data=data)


def lesson(step: int) -> Pieces:
    """What a step of the training sees."""
    for pieces in LESSONS:
        if step < pieces.steps:
            return pieces
        step -= pieces.steps
    raise ValueError("the training has fewer steps")


def start(vae: WanVAE) -> WanVAE:
    """Gives a new VAE a start that does not collapse.

    In time it begins as a VAE of single pictures: temporal kernels look at the current frame alone, halving averages
    frames, doubling repeats them. The posterior begins narrow, or KL would win before anything is drawn.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.weight.shape[2:] == (3, 3, 3):
                module.weight[:, :, :2] = 0
                module.weight[:, :, 2] *= 3  # as many inputs fewer
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                same = torch.eye(module.time_conv.weight.shape[1])[:, :, None, None]
                module.time_conv.weight.zero_()
                module.time_conv.bias.zero_()
                if isinstance(module, Downsample):
                    module.time_conv.weight[:, :, 1:] = same[:, :, None] / 2
                else:
                    module.time_conv.weight[:, :, 2] = torch.cat([same, same])
        vae.conv1.weight[vae.z_dim :] *= 0.1
        vae.conv1.bias[vae.z_dim :] = START_LOG_VARIANCE
    return vae


def draw(pieces: Pieces, rng: random.Random) -> Tensor:
    """A batch (B, 3, frames, side, side) in -1..1: mostly clips of scenes that are not withheld."""
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
    """Half the height and width: (B, C, F, H, W) -> (B, C, F, H/2, W/2)."""
    return F.avg_pool3d(video, (1, 2, 2))


def loss(vae: WanVAE, video: Tensor, smaller: bool) -> Tensor:
    """Absolute and squared error, that of edges, and KL to the normal distribution.

    With `smaller` the latents are halved before decoding and must give the halved clip: latents that may be scaled
    like pictures are smooth, and easier for the transformer (EQ-VAE, Kouzelis et al., 2025).
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
    """Of videos in -1..1, in dB, over all values at once."""
    return -10 * math.log10(((video - other) / 2).square().mean().item())


@torch.no_grad()
def reconstruct(vae: nn.Module, video: Tensor) -> Tensor:
    """Through latents and back, a clip at a time."""
    return torch.cat([vae.decode(vae.encode(clip[None])) for clip in video])


def evaluate(vae: nn.Module, step: int) -> str:
    """PSNR on clips of scenes that were withheld."""
    rng = random.Random("vae test")
    _, withheld = split()
    device = vae.device
    video = torch.stack([to_unit_range(render(scene, rng)) for scene in withheld[:NUM_TESTED]]).to(device)
    drawn = torch.stack([to_unit_range(doodle(rng)) for _ in range(8)]).to(device)
    image = video[:, :, :1]
    with torch.autocast(device.type, torch.bfloat16):
        names = {"clips": video, "pictures": image, "doodles": drawn}
        return ", ".join(f"{name} {psnr(reconstruct(vae, some).float(), some):.2f} dB" for name, some in names.items())


@torch.no_grad()
def fold_statistics(vae: WanVAE, video: Tensor) -> WanVAE:
    """Moves the latents of `video` (B, 3, F, H, W) to mean 0 and deviation 1 per channel after normalisation.

    The released statistics are part of the code, so conv1 and conv2 (1x1x1) change instead: conv1 gives latents of
    those statistics, conv2 takes them back. What is decoded stays the same.
    """
    mu = torch.cat([vae.posterior(clip[None])[0] for clip in video])
    mean, std = mu.mean(dim=(0, 2, 3, 4)), mu.std(dim=(0, 2, 3, 4))
    scale = vae.latent_std.flatten() / std
    offset = vae.latent_mean.flatten() - scale * mean
    z = vae.z_dim
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ (-offset / scale)
    vae.conv2.weight /= scale[None, :, None, None, None]
    vae.conv1.weight[:z] *= scale[:, None, None, None, None]
    vae.conv1.bias[:z] = vae.conv1.bias[:z] * scale + offset
    vae.conv1.bias[z:] += 2 * scale.log()
    return vae


def train_vae(work: Path, device: torch.device, seed: int, compiled: bool) -> WanVAE:
    """The trained VAE with its statistics folded in."""
    torch.manual_seed(seed)
    vae = start(WanVAE(WIDTH)).to(device)
    # As the clips are laid out: a third faster.
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
        with faster_attention(device), torch.autocast(device.type, torch.bfloat16):
            return objective(vae, video, rng.random() < HALVED_SHARE)

    average = fit(vae, plan(seed), loss_at, evaluate, work)
    rng = random.Random("statistics")
    known, _ = split()
    video = torch.stack([to_unit_range(render(scene, rng)) for scene in known[:NUM_FOLDED]])
    return fold_statistics(average, video.to(device)).eval().requires_grad_(False)

"""The small VAE, from nothing: first pictures, then ever longer and larger pieces of clips."""

import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nano.training import Plan, fit
from nano.world import FRAMES, SIDE, doodle, recoloured, render, split
from utils.atomic import replacing
from utils.conditioning import to_unit_range
from utils.preprocess import tile
from wan.modules.vae import CausalConv3d, Downsample, Upsample, WanVAE

WIDTH = 16
EDGE_WEIGHT = 0.5
START_LOG_VARIANCE = -6.0
TILE_SHARE, HALVED_SHARE = 0.1, 0.2
LATENT_NOISE = 0.05  # of a latent's deviation, under which the decoder is sharpened
NUM_TESTED, NUM_FOLDED = 16, 256


@dataclass(frozen=True)
class Pieces:
    """What the VAE sees for a while: so many pieces of clips per step, each (3, frames, side, side)."""

    steps: int
    frames: int
    side: int
    count: int


@dataclass(frozen=True)
class Course:
    """A part of the training with a learning rate that rises and falls; the shares are of the clips drawn."""

    name: str
    pieces: tuple[Pieces, ...]
    recoloured_share: float
    doodle_share: float
    learning_rate: float
    kl_weight: float = 0.0
    compiled: bool = False  # a minute per kind of step, which many steps repay

    def plan(self, seed: int) -> Plan:
        steps, rate = sum(pieces.steps for pieces in self.pieces), self.learning_rate
        return Plan(self.name, seed, steps, rate, rate / 3, ema_decay=0.995, evaluate_every=450)

    def at(self, step: int) -> Pieces:
        for pieces in self.pieces:
            if step < pieces.steps:
                return pieces
            step -= pieces.steps
        return self.pieces[-1]


COURSES = (
    Course(
        "vae-draft",
        (Pieces(900, 1, 32, 16), Pieces(500, 5, 32, 8), Pieces(500, 17, 32, 4), Pieces(450, 17, 64, 2)),
        recoloured_share=0.0,
        doodle_share=0.35,
        kl_weight=3e-4,
        learning_rate=3e-3,
    ),
    # More KL than a picture needs: a decoder that forgives small errors of latents draws what a small transformer
    # means, not what it says. The learning rate is low because two clips a step are few.
    Course(
        "vae",
        (Pieces(2400, 17, 64, 2),),
        recoloured_share=0.2,
        doodle_share=0.1,
        kl_weight=1e-3,
        learning_rate=1e-3,
        compiled=True,
    ),
)
# The decoder alone, once the latents stay as they are: without the posterior's noise it can be sharper.
SHARPENING = Course(
    "vae-decoder",
    (Pieces(3000, 17, 64, 2),),
    recoloured_share=0.25,
    doodle_share=0.1,
    learning_rate=1e-3,
    compiled=True,
)


def start(vae: WanVAE) -> WanVAE:
    """Gives a new VAE a start that does not collapse.

    In time it begins as a VAE of single pictures: temporal kernels look at the current frame alone, halving averages
    frames, doubling repeats them. The posterior begins narrow, or KL would win before anything is drawn.
    """
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, CausalConv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, :2] = 0
                module.weight[:, :, 2] *= 3  # as many inputs fewer
            elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                same = torch.eye(module.time_conv.in_channels)[:, :, None, None]
                module.time_conv.weight.zero_()
                module.time_conv.bias.zero_()
                if isinstance(module, Downsample):
                    module.time_conv.weight[:, :, 1:] = same[:, :, None] / 2
                else:
                    module.time_conv.weight[:, :, 2] = torch.cat([same, same])
        vae.conv1.weight[vae.z_dim :] *= 0.1
        vae.conv1.bias[vae.z_dim :] = START_LOG_VARIANCE
    return vae


def draw(course: Course, pieces: Pieces, rng: random.Random) -> Tensor:
    """A batch (B, 3, frames, side, side) in -1..1: mostly clips of scenes that are not withheld."""
    known, _ = split()
    clips = []
    for _ in range(pieces.count):
        chance = rng.random()
        if chance < course.doodle_share:
            clip = doodle(rng)
        elif chance < course.doodle_share + course.recoloured_share:
            clip = recoloured(rng)
        else:
            clip = render(rng.choice(known), rng)
        clips.append(_piece(tile(clip) if rng.random() < TILE_SHARE else clip, pieces, rng))
    return to_unit_range(torch.stack(clips))


def _piece(clip: Tensor, pieces: Pieces, rng: random.Random) -> Tensor:
    begin = rng.randint(0, FRAMES - pieces.frames)
    top, left = (rng.randint(0, SIDE - pieces.side) for _ in range(2))
    return clip[:, begin : begin + pieces.frames, top : top + pieces.side, left : left + pieces.side]


def halved(video: Tensor) -> Tensor:
    """Half the height and width: (B, C, F, H, W) -> (B, C, F, H/2, W/2)."""
    return F.avg_pool3d(video, (1, 2, 2))


def loss(vae: WanVAE, video: Tensor, kl_weight: float, smaller: bool) -> Tensor:
    """The distance after latents and back, and KL to the normal distribution.

    With `smaller` the latents are halved before decoding and must give the halved clip: latents that may be scaled
    like pictures are smooth, and easier for the transformer (EQ-VAE, Kouzelis et al., 2025).
    """
    mu, log_variance = (part.float() for part in vae.posterior(video))
    z = mu + (0.5 * log_variance).exp() * torch.randn_like(mu)
    kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).mean()
    if smaller:
        z, video = halved(z), halved(video)
    return distance(vae.generate(z).float(), video) + kl_weight * kl


def decoder_loss(vae: WanVAE, mu: Tensor, video: Tensor) -> Tensor:
    """How far from `video` its latents' mean is decoded, under a little noise."""
    z = mu + LATENT_NOISE * vae.latent_std * torch.randn_like(mu)
    return distance(vae.generate(z).float(), video)


def distance(video: Tensor, other: Tensor) -> Tensor:
    """Absolute and squared error, and that of edges."""
    error = video - other
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges


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
    device = vae.conv2.weight.device
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
    """The trained VAE with its statistics folded in, kept in `work/vae-done.pt`."""
    path, plans = work / "vae-done.pt", [asdict(course.plan(seed)) for course in (*COURSES, SHARPENING)]
    done = torch.load(path, map_location=device, weights_only=True) if path.exists() else {}
    torch.manual_seed(seed)
    vae = start(WanVAE(WIDTH)).to(device)
    if done.get("plans") == plans:
        vae.load_state_dict(done["vae"])
        return vae.eval().requires_grad_(False)
    # As the clips are laid out: a third faster.
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    for course in COURSES:
        vae = run_course(vae, course, seed, work, compiled and course.compiled)
    rng = random.Random("statistics")
    known, _ = split()
    video = torch.stack([to_unit_range(render(scene, rng)) for scene in known[:NUM_FOLDED]])
    vae = sharpen(fold_statistics(vae, video.to(device)), seed, work, compiled)
    with replacing(path) as unfinished:
        torch.save({"plans": plans, "vae": vae.state_dict()}, unfinished)
    return vae.eval().requires_grad_(False)


def run_course(vae: WanVAE, course: Course, seed: int, work: Path, compiled: bool) -> WanVAE:
    """Trains `vae` for one course and returns the average of its weights."""
    device = vae.conv2.weight.device
    objective = torch.compile(loss, dynamic=False) if compiled else loss

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{course.name} {step}")
        video = draw(course, course.at(step), rng).to(device, memory_format=torch.channels_last_3d)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            return objective(vae, video, course.kl_weight, rng.random() < HALVED_SHARE)

    return fit(vae, course.plan(seed), loss_at, evaluate, work)


def sharpen(vae: WanVAE, seed: int, work: Path, compiled: bool) -> WanVAE:
    """Trains what turns latents into pictures, and leaves what makes them."""
    device = vae.conv2.weight.device
    objective = torch.compile(decoder_loss, dynamic=False) if compiled else decoder_loss
    vae.encoder.requires_grad_(False)
    vae.conv1.requires_grad_(False)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{SHARPENING.name} {step}")
        video = draw(SHARPENING, SHARPENING.at(step), rng).to(device, memory_format=torch.channels_last_3d)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                mu, _ = vae.posterior(video)
            return objective(vae, mu, video)

    return fit(vae, SHARPENING.plan(seed), loss_at, evaluate, work)

"""The small transformer, from nothing: first pictures, then clips and pictures, all parameters."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from nano.probe import adherence
from nano.sampling import generate, noise_of
from nano.training import Plan, fit
from nano.world import FRAMES, Scene, caption, made_up_word, render, split
from utils.atomic import replacing
from utils.conditioning import Batch, Encoded, collate, make_predict, to_unit_range
from utils.flow import add_noise, sample_sigma
from utils.objectives import Predict, squared_error
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE

SHAPE = WanShape(dim=192, ffn_dim=768, num_heads=6, num_layers=8, text_dim=64, text_len=32, freq_dim=256)
CLIPS = 3072
PICTURES_EVERY = 8  # steps, while clips are learnt
PICTURE_BATCH, CLIP_BATCH = 96, 32
UNCONDITIONAL_SHARE, MADE_UP_SHARE = 0.1, 0.05
NUM_TESTED = 32


@dataclass(frozen=True)
class Course:
    """A part of the training with a learning rate that rises and falls: pictures, then mostly clips."""

    name: str
    picture_steps: int
    clip_steps: int
    learning_rate: float
    shift: float

    def plan(self, seed: int) -> Plan:
        steps, rate = self.picture_steps + self.clip_steps, self.learning_rate
        return Plan(self.name, seed, steps, rate, rate / 2, ema_decay=0.998, evaluate_every=800)


# The second looks more at low noise, where outlines become sharp.
COURSES = (
    Course("transformer", picture_steps=700, clip_steps=2500, learning_rate=2e-3, shift=3.0),
    Course("transformer-outlines", picture_steps=0, clip_steps=2400, learning_rate=1.5e-3, shift=1.5),
)


def start(model: WanModel) -> WanModel:
    """Xavier's start everywhere, the last layer at zero.

    Wan's own start for the text embedding (deviation 0.02) is for its width: at this one the text would whisper.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.bias)
        if name == "head.head":
            nn.init.zeros_(module.weight)
    return model


@dataclass
class Captions:
    """Text rows (T, E) of captions, each encoded once and padded to the length that the transformer reads."""

    encoder: TextEncoder
    negative: str  # the default negative prompt of the scripts: guidance against it must work too

    def __post_init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def rows(self, text: str) -> Tensor:
        if text not in self._rows:
            self._rows[text] = self._encode(text)
        return self._rows[text]

    def training_rows(self, scene: Scene, rng: random.Random) -> Tensor:
        """Of one of the scene's captions; now and then of none, or of one with a word that means nothing."""
        chance = rng.random()
        if chance < UNCONDITIONAL_SHARE:
            return self.rows(rng.choice(("", self.negative)))
        text = caption(scene, rng)
        if chance < UNCONDITIONAL_SHARE + MADE_UP_SHARE:
            word = made_up_word(rng)
            return self._encode(rng.choice((f"{word} {text}", f"{text}, {word} style")))
        return self.rows(text)

    def _encode(self, text: str) -> Tensor:
        rows = self.encoder.encode([text])[0].cpu()
        return F.pad(rows, (0, 0, 0, SHAPE.text_len - len(rows)))


def encode_clips(work: Path, vae: WanVAE) -> tuple[list[Scene], Tensor]:
    """Scenes of the training part and their latents (N, 16, f, h, w), kept in `work` under the name of this VAE."""
    known, _ = split()
    shown = [known[index % len(known)] for index in range(CLIPS)]
    path = work / f"latents-{fingerprint(vae)}.safetensors"
    if path.exists():
        return shown, load_file(path)["latents"]
    device = vae.conv2.weight.device
    latents = []
    for index in tqdm(range(0, CLIPS, 8), "encoding clips"):
        here = enumerate(shown[index : index + 8], index)
        clips = to_unit_range(torch.stack([render(scene, random.Random(f"clip {n}")) for n, scene in here]))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            mu, _ = vae.posterior(clips.to(device))
        latents.append(((mu.float() - vae.latent_mean) / vae.latent_std).cpu())
    latents = torch.cat(latents).contiguous()
    with replacing(path) as unfinished:
        save_file({"latents": latents}, unfinished)
    return shown, latents


def fingerprint(vae: WanVAE) -> str:
    """Of the weights that encode, and of how many clips are encoded with them."""
    digest = hashlib.sha256(str(CLIPS).encode())
    for parameter in (*vae.encoder.parameters(), *vae.conv1.parameters()):
        digest.update(parameter.numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Lessons:
    """What the transformer is trained on."""

    scenes: list[Scene]
    latents: Tensor  # (N, 16, f, h, w), a clip of each scene
    captions: Captions

    def draw(self, course: Course, step: int) -> Batch:
        """Pictures are the first latent frame of clips: the VAE encodes it alone."""
        rng = random.Random(f"{course.name} {step}")
        pictures = step < course.picture_steps or step % PICTURES_EVERY == 0
        count, frames = (PICTURE_BATCH, 1) if pictures else (CLIP_BATCH, self.latents.shape[2])
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        texts = [self.captions.training_rows(self.scenes[n], rng) for n in chosen]
        return collate([Encoded(self.latents[n, :, :frames], rows) for n, rows in zip(chosen, texts, strict=True)])


def loss(predict: Predict, batch: Batch, shift: float) -> Tensor:
    """The trainer's own: flow matching at shifted random noise levels."""
    sigma = sample_sigma(len(batch.latents), shift, batch.latents.device)
    noisy = add_noise(batch.latents, torch.randn_like(batch.latents), sigma)
    return squared_error(predict(noisy.latents, noisy.timestep, batch.cond), noisy.velocity)


def follow(
    model: WanModel, vae: WanVAE, captions: Captions, scenes: Sequence[Scene], frames: int = FRAMES
) -> list[Tensor]:
    """A video per scene, asked for in one of its captions."""
    rng = random.Random("prompts")
    texts = [captions.rows(caption(scene, rng)) for scene in scenes]
    return generate(model, vae, texts, noise_of(vae, range(len(scenes)), frames), captions.rows(""))


class Bf16Linear(nn.Linear):
    """A linear layer of fp32 weights that computes in bf16. Autocast would take Wan's fp32 islands along."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())


def train_transformer(work: Path, seed: int, vae: WanVAE, captions: Captions, compiled: bool) -> WanModel:
    """The trained transformer, on the VAE's device."""
    lessons = Lessons(*encode_clips(work, vae), captions)
    torch.manual_seed(seed)
    model = start(WanModel(SHAPE)).to(vae.conv2.weight.device)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Bf16Linear
    for course in COURSES:
        loss_at = lesson_loss(model, course, lessons, compiled)
        model = fit(model, course.plan(seed), loss_at, partial(evaluate, course, vae, captions), work)
    return model.eval().requires_grad_(False)


def evaluate(course: Course, vae: WanVAE, captions: Captions, model: WanModel, step: int) -> str:
    """What the probe finds on withheld scenes, as pictures while the course is still at them."""
    tested, frames = split()[1][:NUM_TESTED], 1 if step <= course.picture_steps else FRAMES
    shares = adherence(follow(model, vae, captions, tested, frames), tested)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def lesson_loss(model: WanModel, course: Course, lessons: Lessons, compiled: bool) -> Callable[[int], Tensor]:
    """The loss of a step of the course as a function of the step."""
    device, predict = model.head.head.weight.device, make_predict(model)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)

    def loss_at(step: int) -> Tensor:
        batch = lessons.draw(course, step).to(device)
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused one is three times slower in bf16
            return loss(predict, batch, course.shift)

    return loss_at

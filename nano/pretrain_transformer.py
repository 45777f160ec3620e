"""The small transformer, from nothing: first pictures, then clips and pictures, all parameters."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from nano.probe import adherence
from nano.sampling import generate, noise_of
from nano.training import Plan, faster_attention, fingerprint, fit
from nano.world import FRAMES, Scene, caption, colourless_caption, made_up_word, recoloured, render, split
from utils.common.files import replacing
from utils.diffusion.flow import Predict, sample_noisy
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, Encoded, collate, make_predict, to_unit_range
from utils.training.memory import Memory, prepare
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE

SHAPE = WanShape(dim=192, ffn_dim=768, num_heads=6, num_layers=8, text_dim=64, text_len=32, freq_dim=256)
CLIPS, RECOLOURED_CLIPS = 3072, 768
PICTURE_STEPS, CLIP_STEPS = 700, 4300
PICTURES_EVERY = 8  # steps, while clips are learnt
PICTURE_BATCH, CLIP_BATCH = 96, 32
SHIFT = 2.0
UNCONDITIONAL_SHARE, MADE_UP_SHARE = 0.1, 0.05
NUM_TESTED = 32


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

    def training_rows(self, shown: "Shown", rng: random.Random) -> Tensor:
        """Of one of the clip's captions; now and then of none, or of one with a word that means nothing."""
        chance = rng.random()
        if chance < UNCONDITIONAL_SHARE:
            return self.rows(rng.choice(("", self.negative)))
        text = colourless_caption(shown.scene, rng) if shown.recoloured else caption(shown.scene, rng)
        if chance < UNCONDITIONAL_SHARE + MADE_UP_SHARE:
            word = made_up_word(rng)
            return self._encode(rng.choice((f"{word} {text}", f"{text}, {word} style")))
        return self.rows(text)

    def _encode(self, text: str) -> Tensor:
        rows = self.encoder.encode([text])[0].cpu()
        return F.pad(rows, (0, 0, 0, SHAPE.text_len - len(rows)))


@dataclass(frozen=True)
class Shown:
    """What a training clip shows. Clips in any colours make the model wider than the world that it is tested on."""

    scene: Scene
    recoloured: bool

    def clip(self, rng: random.Random) -> Tensor:
        return recoloured(self.scene, rng) if self.recoloured else render(self.scene, rng)


def training_clips() -> list[Shown]:
    known, _ = split()
    return [Shown(known[index % len(known)], index >= CLIPS) for index in range(CLIPS + RECOLOURED_CLIPS)]


def encode_clips(work: Path, vae: WanVAE, clips: Sequence[Shown]) -> Tensor:
    """Latents (N, 16, f, h, w) of the clips, kept in `work` under the name of this VAE."""
    encoders = (*vae.encoder.parameters(), *vae.conv1.parameters())
    samples = (shown.clip(random.Random(0)) for shown in (clips[0], clips[-1]))
    path = work / f"latents-{fingerprint(str(len(clips)), *encoders, *samples)}.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    latents = []
    for index in tqdm(range(0, len(clips), 8), "encoding clips"):
        here = enumerate(clips[index : index + 8], index)
        video = to_unit_range(torch.stack([shown.clip(random.Random(f"clip {n}")) for n, shown in here]))
        with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16), faster_attention(vae.device):
            latents.append(vae.encode(video.to(vae.device)).cpu())
    latents = torch.cat(latents).contiguous()
    with replacing(path) as unfinished:
        save_file({"latents": latents}, unfinished)
    return latents


def draw(step: int, clips: Sequence[Shown], latents: Tensor, captions: Captions) -> Batch:
    """Pictures are the first latent frame of clips: the VAE encodes it alone."""
    rng = random.Random(f"transformer {step}")
    pictures = step < PICTURE_STEPS or step % PICTURES_EVERY == 0
    count, frames = (PICTURE_BATCH, 1) if pictures else (CLIP_BATCH, latents.shape[2])
    chosen = [rng.randrange(len(clips)) for _ in range(count)]
    texts = [captions.training_rows(clips[n], rng) for n in chosen]
    return collate([Encoded(latents[n, :, :frames], Cond(text)) for n, text in zip(chosen, texts, strict=True)])


def loss(predict: Predict[Cond], batch: Batch) -> Tensor:
    """The trainer's own: flow matching at shifted random noise levels."""
    noisy = sample_noisy(batch.latents, SHIFT)
    return squared_error(predict(noisy.latents, noisy.timestep, batch.cond), noisy.velocity)


def asked_for(
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
    device, clips = vae.device, training_clips()
    latents = encode_clips(work, vae, clips)
    torch.manual_seed(seed)
    model = start(WanModel(SHAPE)).to(device)
    predict = make_predict(model)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Bf16Linear
    prepare(model, Memory(compile=compiled), attach=lambda base: None)

    def loss_at(step: int) -> Tensor:
        batch = draw(step, clips, latents, captions).to(device)
        with faster_attention(device):
            return loss(predict, batch)

    def evaluate(average: WanModel, step: int) -> str:
        tested, frames = split()[1][:NUM_TESTED], 1 if step <= PICTURE_STEPS else FRAMES
        shares = adherence(asked_for(average, vae, captions, tested, frames), tested)
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

    steps = PICTURE_STEPS, CLIP_STEPS
    data = fingerprint(str((steps, PICTURE_BATCH, CLIP_BATCH, SHIFT, UNCONDITIONAL_SHARE, MADE_UP_SHARE)), latents)
    plan = Plan("transformer", seed, sum(steps), 2e-3, 1e-3, ema_decay=0.998, evaluate_every=1000, data=data)
    return fit(model, plan, loss_at, evaluate, work).eval().requires_grad_(False)

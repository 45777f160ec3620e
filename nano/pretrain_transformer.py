"""Trains all parameters of the small transformer from scratch: on images first, then on clips and images."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from nano.probe import adherence
from nano.sampling import generate, noise_of
from nano.training import Stage, autocast, faster_attention, fingerprint, fit, training_dtype
from nano.world import FRAMES, Scene, caption, colourless_caption, made_up_word, recoloured, render, split
from utils.common.errors import UserError
from utils.common.tensor_files import TensorFileError, read_tensors, write_tensors
from utils.diffusion.flow import Predict, sample_noisy
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, Encoded, collate, make_predict, to_unit_range
from utils.training.memory import Memory, prepare
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE

SHAPE = WanShape(dim=192, ffn_dim=768, num_heads=6, num_layers=8, text_dim=64, text_len=32, freq_dim=256)
CLIPS, RECOLOURED_CLIPS = 3072, 768
ENCODING_BATCH = 8  # clips
IMAGE_STEPS, CLIP_STEPS = 700, 4300
IMAGES_EVERY = 8  # steps, during training on clips
IMAGE_BATCH, CLIP_BATCH = 96, 32
SHIFT = 2.0
UNCONDITIONAL_SHARE, MADE_UP_SHARE = 0.1, 0.05  # of the captions
NUM_TESTED = 32  # withheld scenes for the printed figures


def initialise(model: WanModel) -> WanModel:
    """Initialises a new model in place: Xavier's weights, zero biases, a last layer of zeros. Returns the model.

    Wan initialises the text embedding with a deviation of 0.02, which suits its width. At this width the text would
    have almost no effect.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.get_parameter("bias"))
        if name == "head.head":
            nn.init.zeros_(module.get_parameter("weight"))
    return model


@dataclass
class CaptionEncoder:
    """Text rows (T, E) of captions, padded to the length that the transformer reads. Each caption is encoded once."""

    encoder: TextEncoder
    negative: str  # the default negative prompt of the scripts, so that guidance with it works

    def __post_init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def rows(self, text: str) -> Tensor:
        if text not in self._rows:
            self._rows[text] = self._encode(text)
        return self._rows[text]

    def training_rows(self, clip: "TrainingClip", rng: random.Random) -> Tensor:
        """The rows of one of the clip's captions; sometimes of no caption, or of one with a meaningless word."""
        chance = rng.random()
        if chance < UNCONDITIONAL_SHARE:
            return self.rows(rng.choice(("", self.negative)))
        text = colourless_caption(clip.scene, rng) if clip.recoloured else caption(clip.scene, rng)
        if chance < UNCONDITIONAL_SHARE + MADE_UP_SHARE:
            word = made_up_word(rng)
            return self._encode(rng.choice((f"{word} {text}", f"{text}, {word} style")))
        return self.rows(text)

    def _encode(self, text: str) -> Tensor:
        rows = self.encoder.encode([text])[0].cpu()
        return F.pad(rows, (0, 0, 0, SHAPE.text_len - len(rows)))


@dataclass(frozen=True)
class TrainingClip:
    """What a training clip shows. Clips in arbitrary colours prepare the model for looks beyond those of the world."""

    scene: Scene
    recoloured: bool

    def render(self, rng: random.Random) -> Tensor:
        """The clip (3, F, H, W) on the 0..255 scale."""
        return recoloured(self.scene, rng) if self.recoloured else render(self.scene, rng)


def training_clips() -> list[TrainingClip]:
    known, _ = split()
    return [TrainingClip(known[index % len(known)], index >= CLIPS) for index in range(CLIPS + RECOLOURED_CLIPS)]


def encode_clips(work: Path, vae: WanVAE, clips: Sequence[TrainingClip]) -> Tensor:
    """Latents (N, 16, f, h, w) of the clips, cached in `work` under a fingerprint of the VAE and the clips.

    Raises UserError if the cache file cannot be read.
    """
    encoders = (*vae.encoder.parameters(), *vae.conv1.parameters())
    samples = (clip.render(random.Random(0)) for clip in (clips[0], clips[-1]))
    path = work / f"latents-{fingerprint(str(len(clips)), *encoders, *samples)}.safetensors"
    if path.exists():
        return _read_latents(path)
    encoded = []
    for first in tqdm(range(0, len(clips), ENCODING_BATCH), "encoding clips"):
        numbered = enumerate(clips[first : first + ENCODING_BATCH], first)
        video = to_unit_range(torch.stack([clip.render(random.Random(f"clip {n}")) for n, clip in numbered]))
        with torch.no_grad(), autocast(vae.device), faster_attention(vae.device):
            encoded.append(vae.encode(video.to(vae.device)).cpu())
    latents = torch.cat(encoded).contiguous()
    write_tensors(path, {"latents": latents})
    return latents


def _read_latents(path: Path) -> Tensor:
    try:
        tensors, _ = read_tensors(path)
        return tensors["latents"]
    except (TensorFileError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the clips are encoded again") from None


def draw(step: int, clips: Sequence[TrainingClip], latents: Tensor, captions: CaptionEncoder) -> Batch:
    """The batch of a step. Images are the first latent frames of clips, which the VAE encodes on their own."""
    rng = random.Random(f"transformer {step}")
    images = step < IMAGE_STEPS or step % IMAGES_EVERY == 0
    count, frames = (IMAGE_BATCH, 1) if images else (CLIP_BATCH, latents.shape[2])
    chosen = [rng.randrange(len(clips)) for _ in range(count)]
    texts = [captions.training_rows(clips[n], rng) for n in chosen]
    return collate([Encoded(latents[n, :, :frames], Cond(text)) for n, text in zip(chosen, texts, strict=True)])


def loss(predict: Predict[Cond], batch: Batch) -> Tensor:
    """The trainer's loss: flow matching at shifted random noise levels."""
    noisy = sample_noisy(batch.latents, SHIFT)
    return squared_error(predict(noisy.latents, noisy.timestep, batch.cond), noisy.velocity)


def generate_scenes(
    model: WanModel, vae: WanVAE, captions: CaptionEncoder, scenes: Sequence[Scene], frames: int = FRAMES
) -> list[Tensor]:
    """A video (F, 3, H, W) uint8 per scene, generated from one of its captions."""
    rng = random.Random("prompts")
    texts = [captions.rows(caption(scene, rng)) for scene in scenes]
    return generate(model, vae, texts, noise_of(vae, range(len(scenes)), frames), captions.rows(""))


class Bf16Linear(nn.Linear):
    """A linear layer with fp32 weights that computes in bf16. Autocast would also affect the layers that stay fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())


def train_transformer(work: Path, seed: int, vae: WanVAE, captions: CaptionEncoder, compiled: bool) -> WanModel:
    """Trains the transformer on the VAE's device. Latents and the state of the training are saved in `work`.

    Raises UserError if one of these files is damaged or belongs to another training.
    """
    device, clips = vae.device, training_clips()
    latents = encode_clips(work, vae, clips)
    torch.manual_seed(seed)
    model = initialise(WanModel(SHAPE)).to(device)
    predict = make_predict(model)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear) and training_dtype(device) == torch.bfloat16:
            module.__class__ = Bf16Linear
    prepare(model, Memory(compile=compiled), attach=lambda base: None)

    def loss_at(step: int) -> Tensor:
        batch = draw(step, clips, latents, captions).to(device)
        with faster_attention(device):
            return loss(predict, batch)

    def evaluate(average: WanModel, step: int) -> str:
        tested, frames = split()[1][:NUM_TESTED], 1 if step <= IMAGE_STEPS else FRAMES
        shares = adherence(generate_scenes(average, vae, captions, tested, frames), tested)
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

    steps = IMAGE_STEPS, CLIP_STEPS
    data = fingerprint(str((steps, IMAGE_BATCH, CLIP_BATCH, SHIFT, UNCONDITIONAL_SHARE, MADE_UP_SHARE)), latents)
    stage = Stage("transformer", seed, sum(steps), 2e-3, 1e-3, ema_decay=0.998, evaluate_every=1000, data=data)
    return fit(model, stage, loss_at, evaluate, work).eval().requires_grad_(False)

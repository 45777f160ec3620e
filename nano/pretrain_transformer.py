"""Trains all parameters of small transformers: the first from scratch, those of other families from the first."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from utils.encoding.conditioning import Batch, Cond, Encoded, Encoders, collate, make_predict, to_unit_range
from utils.training.memory import Memory, prepare
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel, WanShape
from wan.modules.t5 import TextEncoder
from wan.modules.vae import WanVAE

SHAPE = WanShape(dim=192, ffn_dim=768, num_heads=6, num_layers=8, text_dim=64, text_len=32, freq_dim=256)
RECOLOURED_SHARE = 0.2  # of the clips
ENCODING_BATCH = 8  # clips
IMAGES_EVERY = 8  # steps, during training on clips
IMAGE_BATCH, CLIP_BATCH = 96, 32
SHIFT = 2.0
UNCONDITIONAL_SHARE, MADE_UP_SHARE = 0.1, 0.05  # of the captions
NUM_TESTED = 32  # withheld scenes for the printed figures


@dataclass(frozen=True)
class Course:
    """How one transformer is trained: for which family, how long, on images or clips alone, and at which noise levels.

    A model that is given frames sees no images: of those it would see the answer. Its clips begin alike, whatever the
    motion: otherwise the first frame would say what the caption says.
    """

    name: str
    family: Family
    image_steps: int
    clip_steps: int
    sigmas: tuple[float, float] = (0.0, 1.0)
    learning_rate: float = 2e-3
    rest_learning_rate: float = 1e-3
    num_clips: int = 3840

    @property
    def steps(self) -> int:
        return self.image_steps + self.clip_steps

    def shows_images(self, step: int) -> bool:
        """Whether the batch of a step is of images."""
        return not self.family.given and (step < self.image_steps or step % IMAGES_EVERY == 0)


# Images come first: they cost a fifth.
FIRST = Course("transformer", FAMILIES["wan2.1-t2v-1.3B"], image_steps=700, clip_steps=4300)


@dataclass(frozen=True)
class Samples:
    """Training clips, encoded: latents (N, 16, f, h, w), and what shows the given frames (N, 20, f, h, w), if any."""

    clips: "Sequence[TrainingClip]"
    latents: Tensor
    channels: Tensor | None = None


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
class ClipEncoders:
    """What clips and their captions are encoded with."""

    vae: WanVAE
    captions: CaptionEncoder


@dataclass(frozen=True)
class TrainingClip:
    """What a training clip shows. Clips in arbitrary colours prepare the model for looks beyond those of the world."""

    scene: Scene
    recoloured: bool
    from_middle: bool = False

    def render(self, rng: random.Random) -> Tensor:
        """The clip (3, F, H, W) on the 0..255 scale."""
        draw = recoloured if self.recoloured else render
        return draw(self.scene, rng, from_middle=self.from_middle)


def training_clips(count: int, from_middle: bool = False) -> list[TrainingClip]:
    known, _ = split()
    first = round(count * (1 - RECOLOURED_SHARE))  # of those in arbitrary colours
    return [TrainingClip(known[number % len(known)], number >= first, from_middle) for number in range(count)]


def encode_clips(work: Path, vae: WanVAE, clips: Sequence[TrainingClip], family: Family) -> Samples:
    """Encodes the clips, and what shows a family its given frames of them; cached in `work`, by the VAE and the clips.

    Raises UserError if a cache file cannot be read.
    """
    encoders = (*vae.encoder.parameters(), *vae.conv1.parameters())
    samples = (clip.render(random.Random(0)) for clip in (clips[0], clips[-1]))
    mark = fingerprint(str(len(clips)), *encoders, *samples)
    encode = partial(_encode, vae, clips)
    latents = _cached(work / f"latents-{mark}.safetensors", "latents", partial(encode, vae.encode))
    if not family.given:
        return Samples(clips, latents)
    given = Encoders(family, vae)

    def channels(videos: Tensor) -> Tensor:
        text = torch.zeros(1, SHAPE.text_dim)
        conds = [given.condition(text, {0: video[:, :1]}, video.shape[1]) for video in videos]
        return torch.stack([cond.channels for cond in conds if cond.channels is not None])

    path = work / f"channels-{family.task}-{mark}.safetensors"
    return Samples(clips, latents, _cached(path, "channels", partial(encode, channels)))


def _encode(vae: WanVAE, clips: Sequence[TrainingClip], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """What `encode` makes of batches (B, 3, F, H, W) in -1..1 of the clips, of all together."""
    encoded = []
    for first in tqdm(range(0, len(clips), ENCODING_BATCH), "encoding clips"):
        numbered = enumerate(clips[first : first + ENCODING_BATCH], first)
        video = to_unit_range(torch.stack([clip.render(random.Random(f"clip {n}")) for n, clip in numbered]))
        with torch.no_grad(), autocast(vae.device), faster_attention(vae.device):
            encoded.append(encode(video.to(vae.device)).cpu())
    return torch.cat(encoded).contiguous()


def _cached(path: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from its file, or else made and written there."""
    if not path.exists():
        tensor = make()
        write_tensors(path, {name: tensor})
        return tensor
    try:
        tensors, _ = read_tensors(path)
        return tensors[name]
    except (TensorFileError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the clips are encoded again") from None


def draw(step: int, course: Course, samples: Samples, captions: CaptionEncoder) -> Batch:
    """The batch of a step. Images are the first latent frames of clips, which the VAE encodes on their own."""
    rng = random.Random(f"{course.name} {step}")
    images = course.shows_images(step)
    count, frames = (IMAGE_BATCH, 1) if images else (CLIP_BATCH, samples.latents.shape[2])
    chosen = [rng.randrange(len(samples.clips)) for _ in range(count)]
    texts = [captions.training_rows(samples.clips[n], rng) for n in chosen]
    channels = [None if samples.channels is None else samples.channels[n] for n in chosen]
    conds = [Cond(text, shown) for text, shown in zip(texts, channels, strict=True)]
    return collate([Encoded(samples.latents[n, :, :frames], cond) for n, cond in zip(chosen, conds, strict=True)])


def loss(predict: Predict[Cond], batch: Batch, sigmas: tuple[float, float]) -> Tensor:
    """The trainer's loss: flow matching at shifted random noise levels, those of an expert."""
    noisy = sample_noisy(batch.latents, SHIFT, sigmas)
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


Evaluate = Callable[[WanModel, int], str]  # the averaged model after so many steps -> figures to print


def train_transformer(
    work: Path,
    seed: int,
    encoders: ClipEncoders,
    compiled: bool,
    course: Course | None = None,
    model: WanModel | None = None,
    evaluate: Evaluate | None = None,
) -> WanModel:
    """Trains a transformer on the VAE's device: a new one, or this `model`, in place.

    `evaluate` makes other figures than those of a text-to-video model. Latents and the state of the training are saved
    in `work`. Raises UserError if one of these files is damaged or belongs to another training.
    """
    course = FIRST if course is None else course
    vae, captions = encoders.vae, encoders.captions
    device = vae.device
    clips = training_clips(course.num_clips, from_middle=bool(course.family.given))
    samples = encode_clips(work, vae, clips, course.family)
    torch.manual_seed(seed)
    model = (initialise(WanModel(SHAPE)) if model is None else model).to(device).requires_grad_(True)
    begun = fingerprint("", *model.parameters())
    predict = make_predict(model)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear) and training_dtype(device) == torch.bfloat16:
            module.__class__ = Bf16Linear
    prepare(model, Memory(compile=compiled), attach=lambda base: None)

    def loss_at(step: int) -> Tensor:
        batch = draw(step, course, samples, captions).to(device)
        with faster_attention(device):
            return loss(predict, batch, course.sigmas)

    def evaluate_first(average: WanModel, step: int) -> str:
        tested, frames = split()[1][:NUM_TESTED], 1 if step <= course.image_steps else FRAMES
        shares = adherence(generate_scenes(average, vae, captions, tested, frames), tested)
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())

    settings = course.image_steps, course.clip_steps, course.sigmas, IMAGE_BATCH, CLIP_BATCH, SHIFT
    data = fingerprint(f"{settings} {UNCONDITIONAL_SHARE} {MADE_UP_SHARE} {begun}", samples.latents)
    rates = course.learning_rate, course.rest_learning_rate
    stage = Stage(course.name, seed, course.steps, *rates, ema_decay=0.998, evaluate_every=1000, data=data)
    return fit(model, stage, loss_at, evaluate or evaluate_first, work).eval().requires_grad_(False)

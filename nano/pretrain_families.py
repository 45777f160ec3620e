"""Trains small models of other families from Wan-Nano's transformer, and writes them beside it.

    python -m nano.pretrain_families --compile     writes nano/high_noise and nano/i2v; nano/states holds the states

    high_noise    the high-noise expert of a text-to-video model like Wan 2.2 A14B; Wan-Nano itself is the other
    i2v           an image-to-video model like Wan 2.2 I2V-A14B; copies of its one transformer serve as both experts

Their VAE, text encoder and tokenizer are Wan-Nano's. If it is interrupted, the same command resumes it.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nano.pretrain_transformer import NUM_TESTED, CaptionEncoder, ClipEncoders, Course, train_transformer
from nano.probe import adherence
from nano.sampling import SAMPLER, generate, load, noise_of
from nano.world import FRAMES, Scene, caption, render, split
from utils.adapters.full_model import write_transformer
from utils.adapters.lora import pad_inputs
from utils.common.console import say
from utils.common.device import pick_device
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script
from utils.common.temp_rng import MAX_SEED
from utils.encoding.conditioning import Encoders, to_pixels, to_unit_range
from utils.encoding.text import negative_prompt_file, read_prompt
from wan.checkpoints import CheckpointError
from wan.configs import FAMILIES, Family
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE
from wan.text2video import Sampler

NANO = Path(__file__).resolve().parent
T2V, I2V = FAMILIES["wan2.2-t2v-A14B"], FAMILIES["wan2.2-i2v-A14B"]
# Half the learning rates and half the clips of the training from nothing: much is known already.
further = partial(Course, image_steps=0, learning_rate=1e-3, rest_learning_rate=5e-4, num_clips=1920)
COURSES = {
    "high_noise": further("high_noise", T2V, clip_steps=1500, sigmas=T2V.experts[0].sigmas),
    "i2v": further("i2v", I2V, clip_steps=2000),
}


@dataclass(frozen=True)
class Options:
    """Train small models of other families from Wan-Nano."""

    model: Path = option(NANO / "model", "Wan-Nano, from which they are trained")
    output_dir: Path = option(NANO, "where each trained transformer is written, in a folder of its own")
    work: Path = option(NANO / "states", "where the states of the training are saved")
    only: str | None = option(None, "train only this one", choices=tuple(COURSES))
    seed: int = option(0, "seed of the training", minimum=0, maximum=MAX_SEED)
    compile: bool = option(False, "compile the training steps: a quarter faster, requires a C++ compiler")


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    for name, folder in (("--output_dir", opts.output_dir), ("--work", opts.work)):
        check_writable(folder, name)
        folder.mkdir(parents=True, exist_ok=True)
    for name, course in COURSES.items():
        if opts.only in (None, name):
            base, vae, encoder = load(opts.model, pick_device())
            encoders = ClipEncoders(vae, CaptionEncoder(encoder, read_prompt(negative_prompt_file(course.family))))
            low = base if course.family is T2V else None
            figures = partial(evaluate, encoders=encoders, family=course.family, low=low)
            model = with_inputs(base, course.family.in_dim)
            trained = train_transformer(opts.work, opts.seed, encoders, opts.compile, course, model, figures)
            write_transformer(opts.output_dir / name, trained, course.family)
            say(f"wrote {opts.output_dir / name}")


def with_inputs(model: WanModel, in_dim: int) -> WanModel:
    """A copy of a transformer that reads so many channels, of which the new ones change nothing yet."""
    wide, state = WanModel(replace(model.shape, in_dim=in_dim)), dict(model.state_dict())
    state["patch_embedding.weight"] = pad_inputs(state["patch_embedding.weight"], in_dim)
    wide.load_state_dict(state)
    return wide


def sampler_of(family: Family) -> Sampler:
    """The settings with which its small model is measured: those of Wan-Nano, for each expert."""
    return replace(SAMPLER, guidance=SAMPLER.guidance * len(family.experts), boundaries=family.boundaries)


def first_frames(scenes: Sequence[Scene], seed: str) -> list[Tensor]:
    """The first frame (3, 1, H, W) in -1..1 of a clip of each scene."""
    rng = random.Random(seed)
    return [to_unit_range(render(scene, rng, from_middle=True))[:, :1] for scene in scenes]


def channels_of(pictures: Sequence[Tensor], vae: WanVAE) -> list[Tensor]:
    """What shows given first frames (3, 1, H, W) to the image-to-video model: (20, f, h, w)."""
    encoders, text = Encoders(I2V, vae), torch.zeros(1, 1)
    conds = [encoders.condition(text, {0: picture.to(vae.device)}, FRAMES) for picture in pictures]
    return [cond.channels for cond in conds if cond.channels is not None]


def kept(videos: Sequence[Tensor], pictures: Sequence[Tensor]) -> list[float]:
    """The PSNR in dB of the first frame of each video (F, 3, H, W) uint8 to the one that was given (3, 1, H, W)."""
    given = (to_pixels(picture)[0].float() for picture in pictures)
    errors = [(video[0].float() - one).square().mean() for video, one in zip(videos, given, strict=True)]
    return [(10 * torch.log10(255**2 / error)).item() for error in errors]


def evaluate(model: WanModel, step: int, encoders: ClipEncoders, family: Family, low: WanModel | None = None) -> str:
    """Figures of the model in training, with `low` as the low-noise expert, or else as both experts."""
    tested, rng = split()[1][:NUM_TESTED], random.Random("prompts")
    texts = [encoders.captions.rows(caption(scene, rng)) for scene in tested]
    pictures = first_frames(tested, "first frames") if family.given else []
    channels = channels_of(pictures, encoders.vae) if pictures else None
    noise, negative = noise_of(encoders.vae, range(len(tested))), encoders.captions.rows("")
    models = [model, model if low is None else low]
    videos = generate(models, encoders.vae, texts, noise, negative, channels, sampler_of(family))
    said = [f"{name} {share:.0%}" for name, share in adherence(videos, tested).items()]
    if pictures:
        said.append(f"given frame {min(kept(videos, pictures)):.1f} dB at least")
    return ", ".join(said)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""Previews during training: the same prompts from the same noise every time, so that only the LoRA differs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.stated_steps import Asked, StatedSteps, choose_sampler
from utils.common.errors import UserError
from utils.common.options import expand_home, option
from utils.common.tensors import map_tensors
from utils.diffusion.flow import Predict, seeded_noise
from utils.encoding.conditioning import Batch, Cond, Encoders, replace_text, to_pixels
from utils.encoding.pictures import check_pictures, load_pictures
from utils.encoding.sampling import denoise
from utils.encoding.text import Texts, read_prompt
from wan.configs import Family
from wan.modules.vae import WanVAE
from wan.text2video import Sampler
from wan.utils.fm_solvers import LCM, SOLVERS, UNIPC

USUAL_STEPS = 20
BRIEFLY = 4  # steps in which both experts are asked, whatever the shift of their family


@dataclass(frozen=True)
class Previews:
    """previews"""

    sample_prompts: str | None = option(
        None, "prompt to generate during training, or a .txt file with one per line", affects_training=False
    )
    sample_every: int = option(
        200,
        "generate previews before training, every N steps and at the end",
        minimum=1,
        requires="sample_prompts",
        affects_training=False,
    )
    sample_steps: int | None = option(
        None,
        f"sampling steps of a preview (default: {USUAL_STEPS}, or those that a LoRA was distilled into)",
        minimum=1,
        requires="sample_prompts",
        affects_training=False,
    )
    sample_solver: str | None = option(
        None,
        f"solver of previews (default: {UNIPC}, or {LCM} with a LoRA that was distilled into few steps)",
        choices=SOLVERS,
        requires="sample_prompts",
        affects_training=False,
    )
    sample_guidance: tuple[float, ...] = option(
        (),
        "guidance of previews; two: of the high and the low expert (default: the model's; 1 with --distill_cfg, or "
        "with a LoRA that was distilled into few steps)",
        minimum=0,
        requires="sample_prompts",
        affects_training=False,
    )
    sample_shift: float | None = option(
        None,
        "shift of the noise levels of previews (default: the model's, or what a LoRA distilled into few steps states)",
        minimum=0.01,
        requires="sample_prompts",
        affects_training=False,
    )

    sample_images: tuple[str, ...] = option(
        (),
        "pictures to start previews from, one for each prompt or one for all; FIRST,LAST for models given both "
        "(default: the frames of validation clips)",
        requires="sample_prompts",
        is_path=True,
        affects_training=False,
    )
    also_lora: tuple[str, ...] = option(
        (),
        "further LoRAs in previews only, each FILE or FILE:STRENGTH, such as one for sampling in 4 steps",
        requires="sample_prompts",
        is_path=True,
        affects_training=False,
    )

    @property
    def preview_prompts(self) -> list[str]:
        """The prompts of previews, none by default. Raises UserError as `read_prompts` does."""
        return [] if self.sample_prompts is None else read_prompts(self.sample_prompts)

    def preview_images(self, family: Family, num_frames: int) -> list[list[Path]]:
        """The pictures that each preview of so many frames starts from, or none.

        Raises UserError for another number of entries than prompts, and where one is not what the family is given.
        """
        count, given = len(self.preview_prompts), self.sample_images
        if len(given) not in (0, 1, count):
            raise UserError(f"--sample_images has {len(given)} entries for {count} prompts: give one, or one for each")
        sets = [[Path(expand_home(name.strip())) for name in entry.split(",")] for entry in given]
        for paths in sets:
            check_pictures(paths, family, "--sample_images")
        if sets and family.given_as == "latents" and num_frames == 1:
            raise UserError("--sample_images has no effect: in previews of one frame there is no first one to be given")
        return sets * count if len(sets) == 1 else sets

    def preview_sampler(
        self, family: Family, size: tuple[int, int], distilled: bool, stated: Sequence[StatedSteps] = ()
    ) -> Sampler:
        """As the family is sampled at this (width, height), or as LoRAs that were distilled into few steps state.

        Where only guidance is `distilled` into a LoRA there is none. Options override all of this. Raises UserError as
        `choose_sampler` does.
        """
        guidance = (1.0,) if distilled else family.guidance
        usual = Sampler(UNIPC, USUAL_STEPS, guidance, family.shift_at(*size), family.boundaries)
        asked = Asked(self.sample_steps, self.sample_solver, self.sample_guidance, self.sample_shift, "--sample_")
        return choose_sampler(usual, asked, stated)


@dataclass(frozen=True)
class Request:
    """One prompt and all that decides what it gives besides the model, in host memory."""

    prompt: str
    noise: Tensor  # (1, C, F, H, W)
    cond: Cond
    control: Tensor | None = None  # (F, 3, H, W) uint8: what `cond` makes it follow, to be shown beside it
    seed: int = 0  # of the noise


@dataclass(frozen=True)
class Preview:
    """Prompts that are generated again and again, and how."""

    requests: Sequence[Request]
    negative: Tensor | None  # (T, E)
    sampler: Sampler
    fps: float
    vae: WanVAE

    def in_brief(self) -> "Preview":
        """The largest of them, in so few steps that each expert is just asked: it needs as much memory."""
        largest = max(self.requests, key=lambda request: request.noise.numel())
        steps = BRIEFLY if self.sampler.boundaries else 1
        return replace(self, requests=[largest], sampler=replace(self.sampler, steps=steps, timesteps=()))

    def generate(self, predict: Predict[Cond]) -> list[tuple[str, Tensor]]:
        """Each prompt with its video (F, 3, H, W) uint8; a control is shown to the left of the video that follows it.

        Does not change torch's random state, and returns its memory to the driver.
        """
        device = self.vae.device
        negative = None if self.negative is None else self.negative.to(device)
        videos = []
        for number, request in enumerate(self.requests, 1):
            batch = Batch(request.noise, request.cond).to(device)
            progress = partial(tqdm, desc=f"preview {number} of {len(self.requests)}", unit="step", leave=False)
            sampler = replace(self.sampler, seeds=(request.seed,))
            latents = denoise(sampler, predict, batch.latents, batch.cond, negative, progress)
            with torch.no_grad():
                frames = to_pixels(self.vae.decode(latents)[0])
            if request.control is not None:
                frames = torch.cat([request.control, frames], dim=3)
            videos.append((request.prompt, frames))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # decoding reserves more than a training step does
        return videos


def read_prompts(given: str) -> list[str]:
    """The prompts of --sample_prompts: the lines of the .txt file of this name, or this prompt itself.

    Raises UserError for no prompt, a file that cannot be read, and a file of another kind.
    """
    path = Path(expand_home(given))
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in read_prompt(path).splitlines() if line.strip()]
    if not given.strip():
        raise UserError("--sample_prompts is empty: give a prompt, or a .txt file with one per line")
    if os.path.isfile(given):  # False, not an error, for a text that is no path
        raise UserError(f"--sample_prompts {given} is a file, but not a .txt file with one prompt per line")
    return [given]


@dataclass(frozen=True)
class Scenes:
    """What previews show: how large, and what they are given besides their prompts.

    Prompts take the `clips` in turn: the controls and the given frames of these. `images` replace the frames.
    """

    size: tuple[int, int, int]  # width, height, frames
    clips: Sequence[Batch] = ()
    images: Sequence[Sequence[Path]] = ()  # a set for each prompt, or none


@torch.no_grad()
def make_requests(
    prompts: Sequence[tuple[str, Tensor]], scenes: Scenes, seed: int, encoders: Encoders
) -> list[Request]:
    """A request per prompt and its text (T, E). A request's noise depends on the seed and its place alone."""
    vae, requests = encoders.vae, []
    for index, (prompt, text) in enumerate(prompts):
        clip = scenes.clips[index % len(scenes.clips)] if scenes.clips else None
        cond = Cond(text[None]) if clip is None else replace(replace_text(clip.cond, text), held=None)
        width, height, frames = scenes.size
        shape = (1, *vae.latent_shape(frames, height, width)) if clip is None else clip.latents.shape
        if scenes.images:
            cond = _given_images(cond, scenes.images[index], shape, encoders)
        control = None
        if encoders.control is not None and cond.channels is not None:
            followed = cond.channels[0, -encoders.family.out_dim :].to(vae.device)
            control = to_pixels(vae.decode(followed[None])[0])
        requests.append(Request(prompt, seeded_noise(shape, seed + index), cond, control, seed + index))
    return requests


def _given_images(cond: Cond, paths: Sequence[Path], shape: Sequence[int], encoders: Encoders) -> Cond:
    """The conditions with these pictures as the given frames; a control stays."""
    frames, height, width = encoders.vae.video_shape(*shape[2:])
    pictures = load_pictures(paths, encoders.family, width, height)
    pictures = {place: picture.to(encoders.vae.device) for place, picture in pictures.items()}
    given = map_tensors(encoders.condition(cond.text[0], pictures, frames), lambda part: part[None].cpu())
    if encoders.control is not None and cond.channels is not None:
        control = cond.channels[:, -encoders.family.out_dim :]
        channels = control if given.channels is None else torch.cat([given.channels, control], dim=1)
        return replace(given, channels=channels)
    return given


def make_preview(texts: Texts, sampler: Sampler, seed: int, encoders: Encoders, scenes: Scenes) -> Preview:
    """Previews of these scenes; noise from the seed."""
    requests = make_requests(texts.previews, scenes, seed, encoders)
    return Preview(requests, texts.negative, sampler, encoders.family.fps, encoders.vae)

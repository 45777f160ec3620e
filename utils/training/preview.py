"""Previews during training: the same prompts from the same noise every time, so that only the LoRA differs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.errors import UserError
from utils.common.options import option
from utils.data.plan import Window
from utils.diffusion.flow import Predict, seeded_noise
from utils.encoding.conditioning import Batch, Cond, replace_text, to_pixels
from utils.encoding.text import Texts, read_prompt
from wan.configs import Family
from wan.modules.vae import WanVAE
from wan.text2video import Sampler


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
    sample_steps: int = option(
        20, "sampling steps of a preview", minimum=1, requires="sample_prompts", affects_training=False
    )
    sample_guidance: float | None = option(
        None,
        "guidance of previews (default: the model's; 1 with --distill_cfg)",
        minimum=0,
        requires="sample_prompts",
        affects_training=False,
    )

    def preview_sampler(self, family: Family, distilled: bool) -> Sampler:
        """As the family is sampled; without guidance where a LoRA has it distilled into it. Options override both."""
        usual = (1.0,) if distilled else family.guidance
        guidance = usual if self.sample_guidance is None else (self.sample_guidance,)
        return Sampler("unipc", self.sample_steps, guidance, family.shift, family.boundaries)


@dataclass(frozen=True)
class Request:
    """One prompt and all that decides what it gives besides the model, in host memory."""

    prompt: str
    noise: Tensor  # (1, C, F, H, W)
    cond: Cond
    control: Tensor | None = None  # (F, 3, H, W) uint8: what `cond` makes it follow, to be shown beside it


@dataclass(frozen=True)
class Preview:
    """Prompts that are generated again and again, and how."""

    requests: Sequence[Request]
    negative: Tensor | None  # (T, E)
    sampler: Sampler
    fps: float
    vae: WanVAE

    def generate(self, predict: Predict[Cond]) -> list[tuple[str, Tensor]]:
        """Each prompt with its video (F, 3, H, W) uint8; a control is shown to the left of the video that follows it.

        Draws no random numbers, and returns its memory to the driver.
        """
        device = self.vae.device
        negative = None if self.negative is None else self.negative.to(device)
        videos = []
        for number, request in enumerate(self.requests, 1):
            batch = Batch(request.noise, request.cond).to(device)
            progress = partial(tqdm, desc=f"preview {number} of {len(self.requests)}", unit="step", leave=False)
            uncond = None if negative is None else replace_text(batch.cond, negative)
            latents = self.sampler.denoise(predict, batch.latents, batch.cond, uncond, progress)
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
    path = Path(given)
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in read_prompt(path).splitlines() if line.strip()]
    if not given.strip():
        raise UserError("--sample_prompts is empty: give a prompt, or a .txt file with one per line")
    if os.path.isfile(given):  # False, not an error, for a text that is no path
        raise UserError(f"--sample_prompts {given} is a file, but not a .txt file with one prompt per line")
    return [given]


@torch.no_grad()
def make_requests(
    prompts: Sequence[tuple[str, Tensor]], shape: Sequence[int], seed: int, vae: WanVAE, clips: Sequence[Batch] = ()
) -> list[Request]:
    """A request per prompt and its text (T, E): for latents (C, F, H, W), or like the clips whose control it follows.

    The clips are taken in turn. A request's noise depends on the seed and its place alone.
    """
    requests = []
    for index, (prompt, text) in enumerate(prompts):
        clip = clips[index % len(clips)] if clips else None
        size = (1, *shape) if clip is None else clip.latents.shape
        noise = seeded_noise(size, seed + index)
        cond = Cond(text[None]) if clip is None else replace_text(clip.cond, text)
        control = None if cond.channels is None else to_pixels(vae.decode(cond.channels.to(vae.device))[0])
        requests.append(Request(prompt, noise, cond, control))
    return requests


def make_preview(
    texts: Texts, sampler: Sampler, family: Family, seed: int, vae: WanVAE, size: Window, clips: Sequence[Batch] = ()
) -> Preview:
    """Previews of this size, or of that of the clips whose control they follow; noise from the seed."""
    shape = vae.latent_shape(size.frames, size.height, size.width)
    return Preview(make_requests(texts.previews, shape, seed, vae, clips), texts.negative, sampler, family.fps, vae)

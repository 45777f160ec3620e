"""Previews during training: the same prompts from the same noise every time, so that only the LoRA differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.conditioning import Batch, Cond, to_pixels
from utils.objectives import Predict
from utils.sampling import Sampler
from utils.text import read_prompt
from wan.modules.vae import WanVAE


@dataclass(frozen=True)
class Scene:
    """One prompt, and everything that decides what it gives besides the model. Kept in host memory between previews."""

    prompt: str
    noise: Tensor  # (1, C, F, H, W)
    cond: Cond


@dataclass(frozen=True)
class Preview:
    """What is generated again and again."""

    scenes: Sequence[Scene]
    negative: Tensor | None  # (T, E)
    sampler: Sampler

    @torch.no_grad()
    def generate(self, predict: Predict, vae: WanVAE) -> list[tuple[str, Tensor]]:
        """Per prompt the prompt and its video (F, 3, H, W) uint8; a control is shown to the left of what follows it.

        Draws no random numbers, and gives the memory back to the driver.
        """
        device = vae.conv2.weight.device
        negative = None if self.negative is None else self.negative.to(device)
        videos = []
        for number, scene in enumerate(self.scenes, 1):
            batch = Batch(scene.noise, scene.cond).to(device)
            progress = partial(tqdm, desc=f"preview {number} of {len(self.scenes)}", unit="step", leave=False)
            latents = self.sampler.denoise(predict, batch.latents, batch.cond, negative, progress)
            shown = [latents] if batch.cond.channels is None else [batch.cond.channels, latents]
            videos.append((scene.prompt, torch.cat([to_pixels(vae.decode(part)[0]) for part in shown], dim=3)))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # decoding reserves more than a training step does
        return videos


def read_prompts(given: str) -> list[str]:
    """The prompts of --sample_prompts: the lines of the text file of this name, or this prompt itself.

    Raises UserError for a file that cannot be read, or holds none.
    """
    if not given.endswith(".txt"):
        return [given]
    return [line.strip() for line in read_prompt(Path(given)).splitlines() if line.strip()]


def make_scenes(
    prompts: Mapping[str, Tensor], shape: Sequence[int], seed: int, clips: Sequence[Batch] = ()
) -> list[Scene]:
    """A scene per prompt and its text (T, E), of latents (C, F, H, W), or like the clips whose control it follows.

    The clips are taken in turn. A scene's noise depends on the seed and its place alone.
    """
    scenes = []
    for index, (prompt, text) in enumerate(prompts.items()):
        clip = clips[index % len(clips)] if clips else None
        size = (1, *shape) if clip is None else clip.latents.shape
        # Drawn on the CPU: alike on every device.
        noise = torch.randn(size, generator=torch.Generator().manual_seed(seed + index))
        scenes.append(Scene(prompt, noise, Cond(text[None], None if clip is None else clip.cond.channels)))
    return scenes

"""From clips to what the transformer reads: latents, text rows, and extra input channels.

    Clip --encode_clip--> Encoded --collate--> Batch --predict--> velocity

Shape letters: B batch, C latent channels, K extra input channels, F H W latent frames, height and width,
T text tokens, E text width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.data.loading import Clip
from utils.diffusion.objectives import Predict
from utils.media.controls import make_control
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE


@dataclass(frozen=True)
class Cond:
    """What the model is told besides the noisy latents."""

    text: Tensor  # (B, T, E), zero rows where a caption is shorter
    channels: Tensor | None = None  # (B, K, F, H, W) latents concatenated after the noisy ones, as control LoRAs read


@dataclass(frozen=True)
class Encoded:
    """One sample, ready for training: fresh from the encoders, or from the cache."""

    latents: Tensor  # (C, F, H, W)
    text: Tensor  # (T, E)
    channels: Tensor | None = None  # (K, F, H, W)
    mask: Tensor | None = None  # (F, H, W) in 0..1

    def to(self, device: torch.device) -> "Encoded":
        """On the device, without the host waiting for the copies."""
        return self._each(lambda part: _to_device(part, device))

    def pin_memory(self) -> "Encoded":
        """In page-locked memory, from where a GPU copies without the host waiting; the loader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Encoded":
        parts = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return Encoded(**{name: part if part is None else change(part) for name, part in parts.items()})


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket."""

    latents: Tensor  # (B, C, F, H, W)
    cond: Cond
    mask: Tensor | None = None  # (B, F, H, W) in 0..1: where the loss counts; everywhere alike without

    def tokens(self, patch_size: tuple[int, int, int]) -> int:
        """How many tokens the transformer sees."""
        return self.latents[:, 0].numel() // math.prod(patch_size)

    def to(self, device: torch.device) -> "Batch":
        channels, mask = (None if part is None else part.to(device) for part in (self.cond.channels, self.mask))
        return Batch(self.latents.to(device), Cond(self.cond.text.to(device), channels), mask)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixels on the 0..255 scale -> fp32 in -1..1, the range the VAE was trained on; the pixels stay as they are."""
    return pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_pixels(video: Tensor) -> Tensor:
    """A video (3, F, H, W) in -1..1 -> frames (F, 3, H, W) uint8 on the CPU."""
    return video.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).transpose(0, 1).cpu()


@torch.no_grad()
def encode_clip(clip: Clip, text: Tensor, vae: WanVAE, control_type: str | None = None) -> Encoded:
    """Encodes a clip on the VAE's device; with a control type, its control too (from its file, where it has one)."""
    video = to_unit_range(clip.pixels.to(vae.device, non_blocking=True))
    latents, channels = encode_video(video, vae), None
    if control_type is not None and clip.control is None:
        channels = encode_video(make_control(video, control_type), vae)
    elif control_type is not None:
        channels = encode_video(to_unit_range(clip.control.to(vae.device, non_blocking=True)), vae)
    mask = None if clip.mask is None else pool_mask(clip.mask.to(vae.device, non_blocking=True), vae.stride)
    return Encoded(latents, _to_device(text, vae.device), channels, mask)


def pool_mask(mask: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """The means (f, h, w) in 0..1 of a mask (F, H, W) uint8 over what each latent covers; the first frame is alone."""
    time, height, width = stride
    small = F.avg_pool2d(mask[:, None].float() / 255, (height, width))[:, 0]
    later = rearrange(small[1:], "(f time) h w -> f time h w", time=time).mean(dim=1)
    return torch.cat([small[:1], later])


def encode_video(video: Tensor, vae: WanVAE) -> Tensor:
    """Latents (C, F, H, W) fp32 of a video (3, F, H, W) in -1..1."""
    return vae.encode(video[None].to(vae.dtype))[0].float()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without the host waiting for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate(samples: Sequence[Encoded]) -> Batch:
    """Stacks samples of one bucket; shorter texts get zero rows, which is what the model pads with.

    Where some of them have a mask, the others count everywhere.
    """
    length = max(len(sample.text) for sample in samples)
    text = torch.stack([F.pad(sample.text, (0, 0, 0, length - len(sample.text))) for sample in samples])
    channels = mask = None
    if samples[0].channels is not None:
        channels = torch.stack([sample.channels for sample in samples])
    if any(sample.mask is not None for sample in samples):
        everywhere = torch.ones_like(samples[0].latents[0])
        mask = torch.stack([everywhere if sample.mask is None else sample.mask for sample in samples])
    return Batch(torch.stack([sample.latents for sample in samples]), Cond(text, channels), mask)


def inject_noise(cond: Cond, strength: float) -> Cond:
    """Adds noise to the control latents, per sample up to `strength`, so that the model does not overtrust them."""
    if cond.channels is None or strength == 0:
        return cond
    amount = torch.rand(len(cond.channels), 1, 1, 1, 1, device=cond.channels.device) * strength
    return replace(cond, channels=cond.channels + amount * torch.randn_like(cond.channels))


def replace_text(cond: Cond, text: Tensor) -> Cond:
    """The same condition with another text (T, E) for every sample: the negative side of guidance."""
    return replace(cond, text=text.expand(len(cond.text), -1, -1))


def make_predict(model: WanModel) -> Predict:
    """`predict(latents, timestep, cond) -> velocity` of a transformer; absent extra channels are zeros."""
    in_dim = model.patch_embedding.weight.shape[1]  # more than the model was made with, where control widened it

    def predict(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        extra = in_dim - latents.shape[1]
        if cond.channels is not None:
            latents = torch.cat([latents, cond.channels.to(latents.dtype)], dim=1)
        elif extra > 0:
            latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, extra))
        return model(latents, timestep, cond.text)

    return predict

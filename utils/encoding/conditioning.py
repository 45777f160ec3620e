"""From clips to what the transformer reads: latents, text rows, and extra input channels.

    Clip --encode_clip--> Encoded --collate--> Batch --predict--> velocity

Shape letters: B batch, C latent channels, K extra input channels, F H W latent frames, height and width,
T text tokens, E text width. Of one sample instead of a batch there is no B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from utils.common.tensors import map_tensors, stack_tensors
from utils.data.loading import Clip
from utils.diffusion.flow import Predict
from utils.media.controls import make_control
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE


@dataclass(frozen=True)
class Cond:
    """What the model is conditioned on besides the noisy latents. A new condition is a field here."""

    text: Tensor  # (B, T, E), zero rows where a caption is shorter
    channels: Tensor | None = None  # (B, K, F, H, W) latents concatenated after the noisy ones, such as a control's


@dataclass(frozen=True)
class Encoded:
    """One sample, ready for training: fresh from the encoders, or from the cache."""

    latents: Tensor  # (C, F, H, W)
    cond: Cond
    mask: Tensor | None = None  # (F, H, W) in 0..1: how much each position counts in the loss; 1 everywhere without

    def to(self, device: torch.device) -> "Encoded":
        """On the device, without the host waiting for the copies."""
        return map_tensors(self, partial(_to_device, device=device))

    def pin_memory(self) -> "Encoded":
        """In page-locked memory, from where a GPU copies without the host waiting; the loader calls this."""
        return map_tensors(self, Tensor.pin_memory)

    def parts(self) -> dict[str, Tensor]:
        """What is kept in the latent cache: all tensors but the text, by field name."""
        named = {"latents": self.latents, "mask": self.mask, **vars(self.cond)}
        return {name: part for name, part in named.items() if part is not None and name != "text"}

    @staticmethod
    def from_parts(parts: Mapping[str, Tensor], text: Tensor) -> "Encoded":
        """The sample with these `parts()` and this text (T, E)."""
        conditions = {spec.name for spec in fields(Cond)}
        cond = Cond(text, **{name: part for name, part in parts.items() if name in conditions})
        return Encoded(parts["latents"], cond, parts.get("mask"))


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket."""

    latents: Tensor  # (B, C, F, H, W)
    cond: Cond
    mask: Tensor | None = None  # (B, F, H, W) in 0..1

    def tokens(self, patch_size: tuple[int, int, int]) -> int:
        """How many tokens the transformer sees."""
        return self.latents[:, 0].numel() // math.prod(patch_size)

    def to(self, device: torch.device) -> "Batch":
        return map_tensors(self, lambda tensor: tensor.to(device))


def to_unit_range(pixels: Tensor) -> Tensor:
    """Pixels on the 0..255 scale -> fp32 in -1..1, the range the VAE was trained on. The pixels are not changed."""
    return pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_pixels(video: Tensor) -> Tensor:
    """A video (3, F, H, W) in -1..1 -> frames (F, 3, H, W) uint8 on the CPU."""
    return video.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).transpose(0, 1).cpu()


@torch.no_grad()
def encode_clip(clip: Clip, text: Tensor, vae: WanVAE, control_type: str | None = None) -> Encoded:
    """Encodes a clip, and with a control type its control, on the VAE's device; `text` (T, E) is the clip's caption.

    A clip that comes with a control keeps it; for any other the control is made.
    """
    video = to_unit_range(clip.pixels.to(vae.device, non_blocking=True))
    latents, channels, mask = encode_video(video, vae), None, None
    if control_type is not None and clip.control is None:
        channels = encode_video(make_control(video, control_type), vae)
    elif control_type is not None and clip.control is not None:
        channels = encode_video(to_unit_range(clip.control.to(vae.device, non_blocking=True)), vae)
    if clip.mask is not None:
        mask = pool_mask(clip.mask.to(vae.device, non_blocking=True), vae.stride)
    return Encoded(latents, Cond(_to_device(text, vae.device), channels), mask)


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
    """Stacks samples of one bucket. Raises ValueError where only some of them have a condition.

    Shorter texts get zero rows, with which the model pads too. If some samples have a mask, the others get ones.
    """
    length = max(len(sample.cond.text) for sample in samples)
    masked = any(sample.mask is not None for sample in samples)
    stacked = stack_tensors([_even_out(sample, length, masked) for sample in samples])
    return Batch(stacked.latents, stacked.cond, stacked.mask)


def _even_out(sample: Encoded, length: int, masked: bool) -> Encoded:
    """The sample with a text of this length and, if `masked`, with a mask."""
    text = F.pad(sample.cond.text, (0, 0, 0, length - len(sample.cond.text)))
    mask = torch.ones_like(sample.latents[0]) if masked and sample.mask is None else sample.mask
    return replace(sample, cond=replace(sample.cond, text=text), mask=mask)


def inject_noise(cond: Cond, strength: float) -> Cond:
    """Adds noise to the control latents, up to `strength` per sample, so that the model does not rely on them alone."""
    if cond.channels is None or strength == 0:
        return cond
    amount = torch.rand(len(cond.channels), 1, 1, 1, 1, device=cond.channels.device) * strength
    return replace(cond, channels=cond.channels + amount * torch.randn_like(cond.channels))


def replace_text(cond: Cond, text: Tensor) -> Cond:
    """The conditions of a batch with the text (T, E) for every sample: the negative side of guidance."""
    return replace(cond, text=text.expand(len(cond.text), -1, -1))


def make_predict(model: WanModel) -> Predict[Cond]:
    """`predict(latents, timestep, cond) -> velocity` of a transformer."""
    return partial(_predict, model)


def _predict(model: WanModel, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """Input channels for which there is no condition are zeros, as those of a control LoRA without a control."""
    absent = model.patch_embedding.weight.shape[1] - latents.shape[1]
    if cond.channels is not None:
        latents = torch.cat([latents, cond.channels.to(latents.dtype)], dim=1)
    elif absent > 0:
        latents = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, absent))
    return model(latents, timestep, cond.text)

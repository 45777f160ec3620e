"""Sampling from given frames: how Wan is conditioned on pictures of a clip.

Wan 2.1 I2V, FLF2V and Wan 2.2 I2V-A14B read given frames in extra input channels, Wan 2.2 TI2V-5B as a clean first
latent frame. Sources: image2video.py, first_last_frame2video.py and textimage2video.py of the official code.

Shape letters: B batch, C latent channels, F frames, H W pixels; f h w latent frames, height and width.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from wan.modules.vae import WanVAE


def frame_mask(places: Iterable[int], num_frames: int, step: int) -> Tensor:
    """Which frames are given: 1 or 0 in (step, f), for a VAE that makes one latent of `step` frames after the first.

    The first frame counts `step` times, so that each latent frame has as many rows as it covers frames. Of the last
    latent frame, therefore, a given last frame marks only the last row.
    """
    given = torch.zeros(num_frames)
    given[list(places)] = 1
    return torch.cat([given[:1].expand(step), given[1:]]).unflatten(0, (-1, step)).T


def frame_channels(pictures: Mapping[int, Tensor], num_frames: int, vae: WanVAE) -> Tensor:
    """The input channels (4 + C, f, h, w) that show given frames: their mask, then latents of the clip they make.

    `pictures` are (3, 1, H, W) in -1..1 by their place in the clip: 0 is its first frame, -1 its last. All other
    frames are gray (0).
    """
    height, width = pictures[0].shape[2:]
    clip = torch.zeros(3, num_frames, height, width, device=pictures[0].device)
    for place, picture in pictures.items():
        clip[:, place] = picture[:, 0]
    latents = vae.encode(clip[None].to(vae.dtype))[0].float()
    mask = frame_mask(pictures, num_frames, vae.stride[0])
    rows = mask[:, :, None, None].to(latents.device).expand(-1, -1, *latents.shape[2:])
    return torch.cat([rows, latents])


def hold_first(latents: Tensor, first: Tensor, held: Tensor | None = None) -> Tensor:
    """The latents (B, C, f, h, w) with `first` (B, C, 1, h, w) as their first frame, in the samples `held` (B,) bool.

    None means in all of them.
    """
    if held is not None:
        first = torch.where(held.view(-1, 1, 1, 1, 1), first, latents[:, :, :1])
    return torch.cat([first.to(latents.dtype), latents[:, :, 1:]], dim=2)


def timestep_rows(timestep: Tensor, held: Tensor | None = None) -> Tensor:
    """The timesteps (B, 2) of the first latent frame and of all others, from (B,): 0 where the first frame is held."""
    first = torch.zeros_like(timestep) if held is None else timestep.masked_fill(held, 0)
    return torch.stack([first, timestep], dim=1)

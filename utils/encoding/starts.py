"""Where a student starts that learns from its own samples: from noise, a text, and the frames that its model is given.

No clip is encoded for it, only those frames. The latents of its batches are zeros: they say how large a sample is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.plan import Window
from utils.encoding.latent_cache import LatentCache
from wan.configs import Family


def places_to_read(family: Family, has_frames: bool = True, has_control: bool = False) -> tuple[int, ...] | None:
    """The places of the frames that such a student needs of a clip: those that its model is given.

    None: every frame, as a control is made of all of them. Prompts have no frames.
    """
    if has_control:
        return None
    return family.given if has_frames else ()


@dataclass(frozen=True)
class BlankLatents:
    """Zeros in the place of latents, beside what is cached of the given frames, if anything is."""

    family: Family
    given: LatentCache | None = None

    def load(self, window: Window) -> dict[str, Tensor]:
        """The parts of a sample, as `LatentCache.load` returns those of a clip. Raises UserError as that does."""
        zeros = torch.zeros(latent_shape(self.family, window))
        if self.given is None or not self.given.layout.names(window):
            return {"latents": zeros}
        return {"latents": zeros, **self.given.load(window)}


def latent_shape(family: Family, window: Window) -> tuple[int, int, int, int]:
    """(C, f, h, w) of a window's latents."""
    time, rows, columns = family.stride
    return family.out_dim, (window.frames - 1) // time + 1, window.height // rows, window.width // columns

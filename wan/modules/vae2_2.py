"""The causal video VAE of Wan 2.2 TI2V-5B: video (B, 3, F, H, W) in [-1, 1] <-> normalised latents (B, 48, f, h, w).

It is made of the layers of Wan 2.1's, and differs in four ways. Each 2x2 pixels are folded into channels first, so that
the compression is 4, 16, 16. The decoder is wider than the encoder. A doubling keeps the width. And every stage that
changes the resolution has a shortcut without parameters around it.

B batch, C channels, F frames, H height, W width; f, h, w the same counts after compression.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as functional
from einops import rearrange, repeat
from torch import Tensor, nn

from wan.modules.vae import Causal, CausalConv3d, Chain, Downsample, Past, ResidualBlock, Upsample, WanVAE, head, middle

# Per-channel statistics of the released Wan 2.2 VAE's latents.
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

PATCH = 2
CHANNELS = 3 * PATCH**2  # of a folded video


def patchify(video: Tensor) -> Tensor:
    """video (B, 3, F, H, W) -> (B, 12, F, H / 2, W / 2): the rows of a 2x2 square vary fastest, then its columns."""
    return rearrange(video, "b c f (h row) (w col) -> b (c col row) f h w", row=PATCH, col=PATCH)


def unpatchify(x: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c col row) f h w -> b c f (h row) (w col)", row=PATCH, col=PATCH)


def residual_blocks(dim: int, out_dim: int, count: int) -> list[nn.Module]:
    """So many residual blocks in sequence, the first of which changes the width."""
    return [ResidualBlock(*widths) for widths in pairwise([dim, *[out_dim] * count])]


class DownStage(Causal, nn.Module):
    """Residual blocks and a halving; `halve_time` says whether time is halved too. None: nothing is halved.

    The shortcut is the mean of each 2x2 positions. Where time is halved, two frames become twice the channels, which is
    the width of the next stage; the first frame of a video follows a frame of zeros.
    """

    def __init__(self, dim: int, out_dim: int, num_blocks: int, halve_time: bool | None) -> None:
        super().__init__()
        blocks = residual_blocks(dim, out_dim, num_blocks)
        halving = [] if halve_time is None else [Downsample(out_dim, halve_time)]
        self.downsamples = Chain(*blocks, *halving)
        self.halve_time = halve_time

    def shortcut(self, x: Tensor, past: Past) -> Tensor:
        if self.halve_time is None:
            return x
        means = functional.avg_pool2d(rearrange(x, "b c f h w -> b (c f) h w"), 2)
        x = rearrange(means, "b (c f) h w -> b c f h w", f=x.shape[2])
        if not self.halve_time:
            return x
        if past.first_chunk:
            x = functional.pad(x, (0, 0, 0, 0, 1, 0))
        return rearrange(x, "b c (f two) h w -> b (c two) f h w", two=2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.downsamples(x, past) + self.shortcut(x, past)


class UpStage(Causal, nn.Module):
    """Residual blocks and a doubling; `double_time` says whether time is doubled too.

    The shortcut repeats each position; where the width is halved, which is never where time is doubled, two channels
    become the two rows. The first chunk keeps its one frame.
    """

    def __init__(self, dim: int, out_dim: int, num_blocks: int, double_time: bool) -> None:
        super().__init__()
        self.upsamples = Chain(*residual_blocks(dim, out_dim, num_blocks), Upsample(out_dim, out_dim, double_time))
        self.double_time = double_time
        self.narrowing = dim // out_dim

    def shortcut(self, x: Tensor, past: Past) -> Tensor:
        pattern = "b (c row) f h w -> b c (f time) (h row again) (w 2)"
        time = 2 if self.double_time and not past.first_chunk else 1
        return repeat(x, pattern, time=time, row=self.narrowing, again=2 // self.narrowing)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.upsamples(x, past) + self.shortcut(x, past)


def encoder(z_dim: int, widths: Sequence[int], num_res_blocks: int, temporal: Sequence[bool]) -> Chain:
    """(B, 12, F, H / 2, W / 2) -> (B, 2 * z_dim, f, h, w): a stage per width, halving in each but the last.

    `temporal` says per halving whether time is halved too.
    """
    dims = pairwise([widths[0], *widths])
    stages = [DownStage(*d, num_res_blocks, halve) for d, halve in zip(dims, [*temporal, None], strict=True)]
    return Chain(
        conv1=CausalConv3d(CHANNELS, widths[0]),
        downsamples=Chain(*stages),
        middle=middle(widths[-1]),
        head=head(widths[-1], 2 * z_dim),
    )


def decoder(z_dim: int, widths: Sequence[int], num_res_blocks: int, temporal: Sequence[bool]) -> Chain:
    """(B, z_dim, f, h, w) -> (B, 12, F, H / 2, W / 2): a stage per width, doubling in each but the last.

    `temporal` says per doubling whether time is doubled too. The last stage has no shortcut.
    """
    num_blocks = num_res_blocks + 1
    *dims, last = pairwise([widths[0], *widths])
    stages: list[nn.Module] = [UpStage(*d, num_blocks, double) for d, double in zip(dims, temporal, strict=True)]
    stages.append(Chain(upsamples=Chain(*residual_blocks(*last, num_blocks))))
    return Chain(
        conv1=CausalConv3d(z_dim, widths[0]),
        middle=middle(widths[0]),
        upsamples=Chain(*stages),
        head=head(widths[-1], CHANNELS),
    )


class Wan22VAE(WanVAE):
    """The Wan 2.2 VAE, with the released parameter names, used in the same way as Wan 2.1's.

    `stride` is (4, 16, 16). Raises ValueError for another `z_dim` than the released one.
    """

    release = "Wan 2.2"
    statistics = (LATENT_MEAN, LATENT_STD)
    patch = PATCH
    build_encoder = staticmethod(encoder)
    build_decoder = staticmethod(decoder)

    def __init__(self, dim: int = 160, decoder_dim: int = 256, z_dim: int = 48) -> None:
        super().__init__(dim, z_dim, decoder_dim=decoder_dim)

    def _encode_chunk(self, video: Tensor, past: Past) -> Tensor:
        return super()._encode_chunk(patchify(video), past)

    def _decode_chunk(self, z: Tensor, past: Past) -> Tensor:
        return unpatchify(super()._decode_chunk(z, past))

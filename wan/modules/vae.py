"""The causal video VAE of Wan 2.1: video (B, 3, F, H, W) in [-1, 1] <-> normalised latents (B, 16, f, h, w).

That of Wan 2.2, in `wan.modules.vae2_2`, is made of the same layers.

Frame n does not depend on frame n+1, so a video is processed in chunks: one frame, then as many as make one latent
frame, or several latent frames if the frames are small. `Past` holds what the temporal convolutions still need of
earlier chunks, so that memory does not grow with the length.

B batch, C channels, F frames, H height, W width; f, h, w the same counts after compression by 4, 8, 8.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from wan.modules.attention import attention

# Per-channel statistics of the released Wan 2.1 VAE's latents.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip

# A chunk is one latent frame of 832x480 pixels, or several if they are smaller: small videos are not worth cutting up.
MAX_PIXELS_AT_ONCE = 4 * 832 * 480


MIN_LENGTH = 1e-12  # that a vector is divided by, as in torch's normalize


class Past:
    """The state of one pass over a video: the last input frames of each temporal convolution.

    Every pass has its own, so the modules hold no state and passes may interleave. `first_chunk` is True until the
    first chunk has been processed; `frames` holds (B, C, num_past, H, W) per convolution.
    """

    def __init__(self) -> None:
        self.first_chunk = True
        self.frames: dict[nn.Module, Tensor] = {}

    def remember(self, conv: "CausalConv3d", x: Tensor) -> None:
        """Keeps the last `conv.num_past` frames of x (B, C, F, H, W) for the next chunk."""
        # A slice would keep all of x alive.
        self.frames[conv] = x[:, :, -conv.num_past :].clone()

    def prepend(self, conv: "CausalConv3d", x: Tensor) -> Tensor:
        """x (B, C, F, H, W) after the `conv.num_past` frames before it: those kept, or zeros at the start."""
        before = self.frames.get(conv)
        if before is None:
            before = torch.zeros_like(x[:, :, :1]).expand(-1, -1, conv.num_past, -1, -1)
        x = torch.cat([before, x], dim=2)
        self.remember(conv, x)
        return x


class Causal:
    """Marks the layers that depend on earlier frames: their forward takes (x, past)."""


class Chain(Causal, nn.Module):
    """Layers in sequence, numbered or named; the causal ones are given the past."""

    def __init__(self, *layers: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        for name, layer in (*enumerate(layers), *named.items()):
            self.add_module(str(name), layer)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for layer in self.children():
            x = layer(x, past) if isinstance(layer, Causal) else layer(x)
        return x


class CausalConv3d(Causal, nn.Module):
    """A convolution over (F, H, W) that is centred in space and ends at the current frame in time.

    In time it is padded on the left only, with the last `num_past` = kernel - stride frames: a chunk of F frames gives
    F / stride frames.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: tuple[int, int, int] = (3, 3, 3), time_stride: int = 1
    ) -> None:
        super().__init__()
        conv = nn.Conv3d(dim, out_dim, kernel_size)  # for its initialisation
        self.weight, self.bias = conv.weight, conv.bias
        self.stride = (time_stride, 1, 1)
        self.padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        self.num_past = kernel_size[0] - time_stride

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = past.prepend(self, x)
        if _needs_onednn(x):
            return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, self.stride, (1, 1, 1), 1)
        return functional.conv3d(x, self.weight, self.bias, self.stride, self.padding)


def _needs_onednn(x: Tensor) -> bool:
    """Whether x might go to a CPU kernel five times slower than oneDNN's, as torch does with a small single sample.

    A large one goes to oneDNN either way.
    """
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    usable = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return x.device.type == "cpu" and len(x) == 1 and plain and usable


class RMSNorm(nn.Module):
    """Scales the channel vector at each position to length sqrt(C), times gamma: x / ||x|| * sqrt(C) * gamma.

    `num_axes` counts the axes behind the channels: 3 for video, 2 for frames. Of half precision the lengths are fp32,
    the products are not: in fp32 they would be written and read at twice the size.
    """

    def __init__(self, dim: int, num_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))
        self.scale = dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return functional.normalize(x, dim=1) * (self.scale * self.gamma)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        return x * (self.scale / length.clamp(min=MIN_LENGTH)).to(x.dtype) * self.gamma


class ResidualBlock(Causal, nn.Module):
    """Norm, SiLU and causal convolution, twice, added to the input (projected if the width changes)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = Chain(
            RMSNorm(dim, num_axes=3),
            nn.SiLU(),
            CausalConv3d(dim, out_dim),
            RMSNorm(out_dim, num_axes=3),
            nn.SiLU(),
            nn.Identity(),  # the released weights count a dropout here
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.shortcut(x) + self.residual(x, past)


class AttentionBlock(nn.Module):
    """Single-head self attention over the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, num_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def attend(self, frames: Tensor) -> Tensor:
        """(N, C, H, W) frames, each on its own -> the same shape."""
        # Contiguous, because fused kernels need it: else the scores of all pairs of positions would be stored.
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (qkv c) h w -> qkv n (h w) 1 c", qkv=3).contiguous()
        return self.proj(rearrange(attention(q, k, v), "n (h w) 1 c -> n c h w", h=frames.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + per_frame(self.attend, x)


class Downsample(Causal, nn.Module):
    """Halves height and width and, if `temporal`, the frames; a first chunk of one frame stays one frame."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), time_stride=2) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        if past.first_chunk:
            past.remember(self.time_conv, x)
            return x
        return self.time_conv(x, past)


class Upsample(Causal, nn.Module):
    """Doubles height and width and, if `temporal`, the frames; the first chunk keeps its one frame.

    The temporal convolution is not applied to that first frame: for it, time begins with zeros at the second chunk.
    """

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None and not past.first_chunk:
            x = rearrange(self.time_conv(x, past), "b (two c) f h w -> b c (f two) h w", two=2)
        return per_frame(self.resample, x)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs a layer for images (N, C, H, W) on every frame of x (B, C, F, H, W)."""
    frames = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=x.shape[0])


def first_and_rest(x: Tensor, step: int) -> list[Tensor]:
    """x (B, C, F, H, W) split along time: the first frame, which the VAE treats differently, then `step` at a time."""
    return [x[:, :, :1], *x[:, :, 1:].split(step, dim=2)] if x.shape[2] > 1 else [x]


def in_chunks(layer: Callable[[Tensor, Past], Tensor], chunks: Iterable[Tensor]) -> Tensor:
    """Runs a causal layer over the chunks of a video (B, C, F, H, W) in order; the outputs are joined along time."""
    past, outputs = Past(), []
    for chunk in chunks:
        outputs.append(layer(chunk, past))
        past.first_chunk = False
    return torch.cat(outputs, dim=2)


def middle(dim: int) -> Chain:
    """The narrowest part of encoder and decoder."""
    return Chain(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def head(dim: int, out_dim: int) -> Chain:
    """Norm, SiLU and the last convolution of encoder and decoder."""
    return Chain(RMSNorm(dim, num_axes=3), nn.SiLU(), CausalConv3d(dim, out_dim))


def encoder(z_dim: int, widths: Sequence[int], num_res_blocks: int, temporal: Sequence[bool]) -> Chain:
    """(B, 3, F, H, W) -> (B, 2 * z_dim, f, h, w): a stage per width, halving after each but the last.

    `temporal` says per halving whether time is halved too.
    """
    stages: list[nn.Module] = []
    dim = widths[0]
    for width, halve_time in zip(widths, [*temporal, None], strict=True):
        for _ in range(num_res_blocks):
            stages.append(ResidualBlock(dim, width))
            dim = width
        if halve_time is not None:
            stages.append(Downsample(dim, halve_time))
    first = CausalConv3d(3, widths[0])
    return Chain(conv1=first, downsamples=Chain(*stages), middle=middle(dim), head=head(dim, 2 * z_dim))


def decoder(z_dim: int, widths: Sequence[int], num_res_blocks: int, temporal: Sequence[bool]) -> Chain:
    """(B, z_dim, f, h, w) -> (B, 3, F, H, W): a stage per width, doubling after each but the last.

    `temporal` says per doubling whether time is doubled too. A doubling halves the width, and the next stage widens it.
    """
    stages: list[nn.Module] = []
    dim = widths[0]
    for width, double_time in zip(widths, [*temporal, None], strict=True):
        for _ in range(num_res_blocks + 1):
            stages.append(ResidualBlock(dim, width))
            dim = width
        if double_time is not None:
            stages.append(Upsample(width, width // 2, double_time))
            dim = width // 2
    first = CausalConv3d(z_dim, widths[0])
    return Chain(conv1=first, middle=middle(widths[0]), upsamples=Chain(*stages), head=head(dim, 3))


class WanVAE(nn.Module):
    """The Wan 2.1 VAE, with the released parameter names; `Wan22VAE` is one with other stages.

    `stride` is its compression in time, height and width, (4, 8, 8) as released; `z_dim` the latent channels. Latents
    are normalised by the statistics of the released weights and never sampled. Raises ValueError for another `z_dim`
    than those statistics have.
    """

    release: ClassVar[str] = "Wan 2.1"
    statistics: ClassVar[tuple[Sequence[float], Sequence[float]]] = (LATENT_MEAN, LATENT_STD)
    patch: ClassVar[int] = 1  # rows and columns of pixels that are folded into one position before the encoder
    build_encoder = staticmethod(encoder)
    build_decoder = staticmethod(decoder)
    latent_mean: Tensor  # (z_dim, 1, 1, 1)
    latent_std: Tensor  # (z_dim, 1, 1, 1)

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temporal_downsample: Sequence[bool] = (False, True, True),
        decoder_dim: int | None = None,  # as the encoder's
    ) -> None:
        super().__init__()
        mean, std = self.statistics
        if z_dim != len(mean):
            raise ValueError(f"the {self.release} VAE has latent statistics for z_dim {len(mean)}, not {z_dim}")
        widths, decoder_widths = ([base * multiple for multiple in dim_mult] for base in (dim, decoder_dim or dim))
        self.z_dim = z_dim
        space = self.patch * 2 ** len(temporal_downsample)
        self.stride = (2 ** sum(temporal_downsample), space, space)
        self.encoder = self.build_encoder(z_dim, widths, num_res_blocks, temporal_downsample)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = self.build_decoder(z_dim, decoder_widths[::-1], num_res_blocks, temporal_downsample[::-1])
        # Not in the checkpoint, so they have values even if the module is built on the meta device.
        for name, values in (("latent_mean", mean), ("latent_std", std)):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(-1, 1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z_dim, f, h, w) of a video's latents."""
        time, space, _ = self.stride
        return self.z_dim, (frames - 1) // time + 1, height // space, width // space

    def video_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F, H, W) of the video that latents of so many frames, rows and columns decode to."""
        time, space, _ = self.stride
        return time * (frames - 1) + 1, height * space, width * space

    def encode(self, video: Tensor) -> Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> normalised latents (B, z_dim, f, h, w) of `latent_shape`.

        The latents are (mu - mean) / std of the posterior's mean mu. Raises ValueError unless F is 4n + 1 and H and W
        are multiples of the stride.
        """
        frames, height, width = video.shape[2:]
        time, space, _ = self.stride
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(
                f"the VAE encodes {time}n+1 frames with height and width multiples of {space}, "
                f"not {frames} frames of {height}x{width} (height x width)"
            )
        mu, _ = self.posterior(video)
        return (mu - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, z_dim, f, h, w) -> video (B, 3, 4 (f - 1) + 1, H, W), clamped to [-1, 1]."""
        z = latents * self.latent_std + self.latent_mean
        return self.generate(z.to(self.dtype)).clamp(-1, 1)

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's answer to a video as `encode` takes it: mean and log-variance, each (B, z_dim, f, h, w)."""
        step = self.stride[0] * self.latent_frames_at_once(video[:, 0, 0].numel())
        mu, log_variance = in_chunks(self._encode_chunk, first_and_rest(video, step)).chunk(2, dim=1)
        return mu, log_variance

    def generate(self, z: Tensor) -> Tensor:
        """z (B, z_dim, f, h, w), drawn from a posterior, not normalised -> video (B, 3, 4 (f - 1) + 1, H, W)."""
        step = self.latent_frames_at_once(z[:, 0, 0].numel() * self.stride[1] * self.stride[2])
        return in_chunks(self._decode_chunk, first_and_rest(z, step))

    def latent_frames_at_once(self, pixels: int) -> int:
        """How many latent frames are processed together, for frames of so many pixels in the whole batch."""
        return max(1, MAX_PIXELS_AT_ONCE // (self.stride[0] * pixels))

    def _encode_chunk(self, video: Tensor, past: Past) -> Tensor:
        return self.conv1(self.encoder(video, past))

    def _decode_chunk(self, z: Tensor, past: Past) -> Tensor:
        return self.decoder(self.conv2(z), past)

"""The Wan diffusion transformer: noisy latents, a timestep and text in, a velocity out.

Shape letters: B batch, C latent channels, F H W latent frames, height and width, f h w the same in patches,
L = f h w video tokens, D model width, N heads, K head size, T text tokens, E text width, I image tokens,
S timesteps per sample: 1, or 2 where the first latent frame has its own,
R rows of modulation per sample: 1 for all tokens, or f, each for the tokens of one latent frame.

Precision follows the official inference code: linear layers compute in the dtype of their weights, while the
residual stream, normalisation, modulation, time embedding and head are fp32 (`is_fp32` names their parameters).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.modules.attention import KERNELS, Attend, attention

FREQUENCY_BASE = 10_000.0  # of the time sinusoid and of the rotary positions
IMAGE_EPS = 1e-5  # of the norms around the image tokens; every other norm has the eps of the shape
FP32_PARTS = ("time_embedding.", "time_projection.", "head.", "img_emb.proj.0.", "img_emb.proj.4.", "img_emb.emb_pos")


@dataclass(frozen=True)
class WanShape:
    """The widths of one transformer; the defaults are those of Wan2.1-T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int = 0  # width of the vision tokens that cross attention reads beside the text; 0: it reads none
    image_positions: int = 0  # learned positions of these tokens; 0: they have none


def is_fp32(name: str) -> bool:
    """Whether the parameter of this official name stays fp32 when the rest is cast to bf16."""
    return name.startswith(FP32_PARTS) or "norm" in name or "modulation" in name


def sinusoid(timestep: Tensor, freq_dim: int) -> Tensor:
    """Timesteps (B, S) on the 0..1000 scale -> (B, S, freq_dim) fp32, cosines first, computed in float64."""
    half = freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / -half
    angle = timestep.double().unsqueeze(-1) * FREQUENCY_BASE**exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


@lru_cache(maxsize=8)
def rotary_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines (L, 1, K/2, 2) that rotate the pairs of one head by their token's frame, row and column.

    Height and width get 2 * (K // 6) of the K dimensions each, time the rest; every axis counts its own frequencies
    from base 10000 over its own share. Angles are float64, the table is fp32.
    """
    side = 2 * (head_dim // 6)
    # The first call may come from sampling in inference mode; the cached table must serve training too.
    with torch.inference_mode(False):
        axes = []
        for axis, (length, share) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
            exponent = torch.arange(0, share, 2, dtype=torch.float64, device=device) / -share
            position = torch.arange(length, dtype=torch.float64, device=device)
            angle = torch.outer(position, FREQUENCY_BASE**exponent)
            shape = [1, 1, 1, angle.shape[1]]
            shape[axis] = length
            axes.append(angle.view(shape).expand(*grid, -1))
        angles = rearrange(torch.cat(axes, dim=-1), "f h w P -> (f h w) 1 P")
        return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates the adjacent pairs of x (B, L, N, K) by `rotary` (L, 1, K/2, 2), in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # a compiler joins real products with their neighbours, but not complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    # One complex product moves a fifth of the bytes.
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary)).flatten(-2)


def rows_of_frames(rows: Tensor, frames: int) -> Tensor:
    """Rows (B, S, ...) of the timesteps -> (B, R, ...): one is that of all frames; of two, the first is the first's."""
    if rows.shape[1] == 1:
        return rows
    first, others = rows.split(1, dim=1)
    return torch.cat([first, others.expand(-1, frames - 1, *rows.shape[2:])], dim=1)


def split_by(rows: Tensor, x: Tensor) -> Tensor:
    """Tokens x (B, L, D) -> (B, R, L / R, D): those that share each of the rows (B, R, D)."""
    return x.unflatten(1, (rows.shape[1], -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D), shift and scale (B, R, D) -> (B, L, D)"""
    # Each row is broadcast over its tokens: it is never repeated for every one of them.
    return (split_by(scale, x) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x and update (B, L, D), gate (B, R, D) -> x + gate * update (B, L, D)"""
    return (split_by(gate, x) + gate.unsqueeze(2) * split_by(gate, update)).flatten(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width: normalised in fp32, rounded to x's dtype, then weighted in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys: what self and cross attention share.

    `attend` is the kernel, one of `wan.modules.attention.KERNELS`; `WanModel.use_attention` chooses it.
    """

    attend: Attend = staticmethod(attention)

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        dim = shape.dim
        self.num_heads = shape.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, shape.eps), RMSNorm(dim, shape.eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x (B, L, D) -> (B, L, D)"""
        v = self.heads(self.v(x))
        q = rotate(self.heads(self.norm_q(self.q(x))), rotary).to(v.dtype)
        k = rotate(self.heads(self.norm_k(self.k(x))), rotary).to(v.dtype)
        return self.o(self.attend(q, k, v).flatten(2))


class CrossAttention(Attention):
    """Reads the text and, where the model has them, the image tokens: two attentions by the same queries, summed."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__(shape)
        if shape.image_dim:
            self.k_img, self.v_img = (nn.Linear(shape.dim, shape.dim) for _ in range(2))
            self.norm_k_img = RMSNorm(shape.dim, shape.eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """x (B, L, D), text (B, T, D), image (B, I, D) -> (B, L, D)"""
        v = self.heads(self.v(text))
        q = self.heads(self.norm_q(self.q(x))).to(v.dtype)
        k = self.heads(self.norm_k(self.k(text))).to(v.dtype)
        seen = self.attend(q, k, v)
        if image is not None:
            k_img = self.heads(self.norm_k_img(self.k_img(image))).to(v.dtype)
            seen = seen + self.attend(q, k_img, self.heads(self.v_img(image)))
        return self.o(seen.flatten(2))


class Block(nn.Module):
    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        dim = shape.dim
        self.norm1 = nn.LayerNorm(dim, shape.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(shape)
        self.norm3 = nn.LayerNorm(dim, shape.eps)
        self.cross_attn = CrossAttention(shape)
        self.norm2 = nn.LayerNorm(dim, shape.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, shape.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(shape.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, mod: Tensor, rotary: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """x (B, L, D) fp32, mod (B, R, 6, D) fp32, rotary (L, 1, K/2, 2), text (B, T, D), image (B, I, D) -> x

        The text's dtype is the one the linear layers compute in; the image's is the same.
        """
        dtype = text.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + mod).unbind(2)  # each (B, R, D)
        x = add_gated(x, gate1, self.self_attn(modulate(self.norm1(x), shift1, scale1).to(dtype), rotary))
        x = x + self.cross_attn(self.norm3(x).to(dtype), text, image)
        return add_gated(x, gate2, self.ffn(modulate(self.norm2(x), shift2, scale2).to(dtype)))


class Head(nn.Module):
    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim, shape.eps, elementwise_affine=False)
        self.head = nn.Linear(shape.dim, math.prod(shape.patch_size) * shape.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, shape.dim) / shape.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D) fp32, time (B, R, D) fp32 -> (B, L, patch * C) fp32"""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """Image tokens of the vision encoder's width -> of the model's."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        width, dim = shape.image_dim, shape.dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width, IMAGE_EPS), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, dim), nn.LayerNorm(dim, IMAGE_EPS),
        )  # fmt: skip
        if shape.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, shape.image_positions, width))

    def forward(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """image (B, I, image_dim) -> (B, I, D) in `dtype`, in which the linear layers compute; the norms in fp32."""
        norm_in, linear_in, gelu, linear_out, norm_out = self.proj
        x = image.float()
        if hasattr(self, "emb_pos"):
            x = x + self.emb_pos[:, : x.shape[1]]
        return norm_out(linear_out(gelu(linear_in(norm_in(x).to(dtype)))).float()).to(dtype)


class WanModel(nn.Module):
    """The transformer with the official parameter names."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.dim
        self.patch_embedding = nn.Conv3d(shape.in_dim, dim, shape.patch_size, shape.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(shape.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(shape.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if shape.image_dim:
            self.img_emb = ImageEmbedding(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.head = Head(shape)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the linear layers compute: that of a bias, however the weights are stored."""
        return self.get_parameter("text_embedding.0.bias").dtype

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        """The velocity (noise - latents) that the model predicts for noisy latents.

        latents (B, C, F, H, W), H and W even; timestep (B,), 0..1000, not rounded, or (B, 2): that of the first latent
        frame and that of all others; text (B, T, E) rows of the text encoder, T <= text_len: shorter ones are padded
        with zero rows, which the model attends to, as in its training; image (B, I, image_dim) tokens of the vision
        encoder, only for a model that reads them. Returns (B, out_dim, F, H, W) fp32.

        Raises ValueError where an image is missing or cannot be read, and for another number of timesteps.
        """
        dtype = self.compute_dtype
        x = self.patch_embedding(latents.to(dtype))
        grid = tuple(x.shape[2:])
        # Contiguous, or every norm of every block would make a copy.
        x = rearrange(x, "B D f h w -> B (f h w) D").float().contiguous()
        rotary = rotary_table(grid, self.shape.dim // self.shape.num_heads, x.device)

        text = F.pad(text.to(dtype), (0, 0, 0, self.shape.text_len - text.shape[1]))
        text = self.text_embedding(text)
        image = self._embed_image(image)
        timesteps = timestep.reshape(len(x), -1)  # (B, S)
        if timesteps.shape[1] not in (1, 2):
            raise ValueError(f"one or two timesteps for each sample, not {timesteps.shape[1]}")
        time = self.time_embedding(sinusoid(timesteps, self.shape.freq_dim))  # (B, S, D)
        mod = self.time_projection(time).unflatten(-1, (6, -1))
        time, mod = rows_of_frames(time, grid[0]), rows_of_frames(mod, grid[0])  # (B, R, D), (B, R, 6, D)

        for block in self.blocks:
            x = block(x, mod, rotary, text, image)
        return self._unpatchify(self.head(x, time), grid)

    def use_attention(self, kernel: str) -> None:
        """Attends by this kernel, one of `wan.modules.attention.KERNELS`."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = KERNELS[kernel]

    def _embed_image(self, image: Tensor | None) -> Tensor | None:
        """Tokens (B, I, image_dim) of the vision encoder -> (B, I, D), for a model that reads them."""
        reads = self.shape.image_dim > 0
        if reads != (image is not None):
            raise ValueError("the model reads image tokens: none are given" if reads else "the model reads no image")
        return None if image is None else self.img_emb(image, self.compute_dtype)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        f, h, w = grid
        p, q, r = self.shape.patch_size
        return rearrange(x, "B (f h w) (p q r C) -> B C (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)

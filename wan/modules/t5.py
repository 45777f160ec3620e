"""The UMT5 encoder that turns prompts into text rows for Wan's cross attention.

T5 is Raffel et al., 2020 (arXiv 1910.10683), UMT5 is Chung et al., 2023 (arXiv 2304.09151): the attention is not
scaled, and positions enter as a learned bias on its scores, here one table per layer.

B batch, L tokens, D width, H heads, C channels per head.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from wan.modules.tokenizers import Tokenizer

MAX_DISTANCE = 128


def relative_buckets(length: int, num_buckets: int, device: torch.device | None = None) -> Tensor:
    """For every query and key among `length` positions, the bucket (L, L) int64 of their offset k - q.

    The lower half of the buckets holds keys at or before the query, the upper half keys after it. In each half, the
    first half of the buckets holds one distance each, the rest grow with the logarithm up to MAX_DISTANCE.
    """
    positions = torch.arange(length, device=device)
    offset = positions[None, :] - positions[:, None]
    distance = offset.abs()
    half = num_buckets // 2
    exact = half // 2
    # log2 is exact at powers of two, where the bucket changes.
    growth = torch.log2(distance.clamp(min=exact) / exact) / math.log2(MAX_DISTANCE / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the width, in fp32, rounded to the dtype of x before the weight multiplies."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Self attention without scaling; the softmax is taken in fp32."""

    def __init__(self, dim: int, dim_attn: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim_attn, bias=False)
        self.k = nn.Linear(dim, dim_attn, bias=False)
        self.v = nn.Linear(dim, dim_attn, bias=False)
        self.o = nn.Linear(dim_attn, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, visible: Tensor | None) -> Tensor:
        """x (B, L, D), bias (H, L, L), visible (B, 1, 1, L) bool: False hides a key -> (B, L, D)."""
        q, k, v = (self._heads(projected) for projected in (self.q(x), self.k(x), self.v(x)))
        scores = (q @ k.transpose(-1, -2) + bias).float()
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        attended = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.o(rearrange(attended, "b h l c -> b l (h c)"))

    def _heads(self, projected: Tensor) -> Tensor:
        return rearrange(projected, "b l (h c) -> b h l c", h=self.num_heads)


class FeedForward(nn.Module):
    """Gated: fc2(fc1(x) * gelu(gate(x))), with the tanh form of GELU."""

    def __init__(self, dim: int, dim_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, dim_ffn, bias=False)
        self.fc2 = nn.Linear(dim_ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativePositions(nn.Module):
    """A layer's own learned attention bias per bucket and head."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets (L, L) -> bias (H, L, L)."""
        return rearrange(self.embedding(buckets), "q k h -> h q k")


class Block(nn.Module):
    """One encoder layer: attention, then feed-forward, each after a norm and added to its input."""

    def __init__(self, dim: int, dim_attn: int, dim_ffn: int, num_heads: int, num_buckets: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, dim_attn, num_heads)
        self.norm2 = RMSNorm(dim)
        self.ffn = FeedForward(dim, dim_ffn)
        self.pos_embedding = RelativePositions(num_buckets, num_heads)

    def forward(self, x: Tensor, buckets: Tensor, visible: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), visible)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """The encoder half of UMT5, by default at the size of umt5-xxl, with the parameter names of Wan's checkpoint."""

    def __init__(
        self,
        vocab_size: int = 256384,
        dim: int = 4096,
        dim_attn: int = 4096,
        dim_ffn: int = 10240,
        num_heads: int = 64,
        num_layers: int = 24,
        num_buckets: int = 32,
    ) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(num_layers))
        self.norm = RMSNorm(dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) int64 -> rows (B, L, D); mask (B, L), bool or int, is 0 where a key is padding and hidden."""
        buckets = relative_buckets(ids.shape[1], self.num_buckets, ids.device)
        visible = None if mask is None else rearrange(mask.bool(), "b l -> b 1 1 l")
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, visible)
        return self.norm(x)


@dataclass(frozen=True)
class TextEncoder:
    """An encoder with its tokenizer: from prompts to text rows."""

    encoder: UMT5Encoder
    tokenizer: Tokenizer

    def encode(self, prompts: list[str]) -> list[Tensor]:
        """The rows (S, D) of each prompt, without gradient, on the encoder's device; S counts its tokens with </s>.

        Prompts with the same tokens share one tensor. Raises ValueError if different tokens give the same rows, as with
        a damaged checkpoint whose token embedding is zero.
        """
        ids_of_prompts = [tuple(ids) for ids in self.tokenizer(prompts)]
        rows_of_ids = {ids: self._rows(ids) for ids in dict.fromkeys(ids_of_prompts)}
        _raise_if_alike(rows_of_ids.values())
        return [rows_of_ids[ids] for ids in ids_of_prompts]

    def _rows(self, ids: tuple[int, ...]) -> Tensor:
        with torch.inference_mode():
            rows = self.encoder(torch.tensor([ids], device=self.encoder.token_embedding.weight.device))[0]
        # A tensor made in inference mode cannot be used in autograd; a copy made outside of it can.
        with torch.inference_mode(False):
            return rows.clone()


def _raise_if_alike(prompts: Iterable[Tensor]) -> None:
    """Raise ValueError if two prompts' rows (S, D) are equal as far as both reach.

    Only prompts whose first rows agree are compared in full, so that many prompts cost little.
    """
    groups: dict[tuple[float, ...], list[Tensor]] = defaultdict(list)
    for rows in prompts:
        groups[tuple(rows[0].tolist())].append(rows)
    for group in groups.values():
        for rows, others in combinations(group, 2):
            length = min(len(rows), len(others))
            if torch.equal(rows[:length], others[:length]):
                raise ValueError(
                    "two different prompts have the same text embedding: the text encoder's weights are broken\n"
                    "(most likely a token embedding of zeros). Download the text encoder again."
                )

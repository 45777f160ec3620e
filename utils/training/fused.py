"""A transformer block for training without a compiler: three autograd Functions, one for each sublayer.

A sublayer is x + gate * branch(norm(x)). Each Function keeps what is dear (the answers of matrix products and of the
attention) and the normalised stream, rounded to the dtype of computing. What is cheap (modulation, the norms of queries
and keys, rotation) is computed again in the backward pass. The numbers are those of `wan.modules.model.Block` up to
rounding; tests bound the difference.

Shape letters as in `wan.modules.model`, and M = B L tokens of all samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.adapters.projection import Projection, project, project_backward, project_forward
from utils.training.kept_attention import Answer, Tape, attend, attend_backward
from wan.modules.model import Block, CrossAttention, RMSNorm, rotate, split_by

Kept = list[list[Tensor]]  # what a branch keeps for the backward pass, in groups


class FusedBlock:
    """The forward pass of a block in training; called as `Block.forward` is.

    Where a layer is more than a product with plain LoRAs, it is the block's own.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.plain = block.forward
        self.tape: Tape | None = None

    def __call__(self, x: Tensor, mod: Tensor, rotary: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        block, dtype = self.block, text.dtype
        layers = _projections(block)
        if layers is None:
            return self.plain(x, mod, rotary, text, image)
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + mod).unbind(2)  # each (B, R, D)

        attn = block.self_attn
        norm = _Norm(1 + scale1, shift1, block.norm1.eps, dtype)
        queries, keys = (_Heads(attn.num_heads, norm_, rotary) for norm_ in (attn.norm_q, attn.norm_k))
        inner = [layers[f"self_attn.{name}"] for name in "qkv"]
        x = _sublayer(x, gate1, _AttentionBranch(norm, inner, queries, keys, layers["self_attn.o"], self.tape))

        # Text and picture have few rows: their keys and values are computed outside of the Function.
        attn = block.cross_attn
        given = _keys_and_values(attn, text, [layers["cross_attn.k"], layers["cross_attn.v"]], attn.norm_k)
        if image is not None:
            inner = [layers["cross_attn.k_img"], layers["cross_attn.v_img"]]
            given += _keys_and_values(attn, image, inner, attn.norm_k_img)
        norm = _Norm(block.norm3.weight[None, None], block.norm3.bias[None, None], block.norm3.eps, dtype)
        queries = _Heads(attn.num_heads, attn.norm_q)
        inner = [layers["cross_attn.q"]]
        branch = _AttentionBranch(norm, inner, queries, None, layers["cross_attn.o"], self.tape)
        x = _sublayer(x, None, branch, given)

        norm = _Norm(1 + scale2, shift2, block.norm2.eps, dtype)
        return _sublayer(x, gate2, _FeedForwardBranch(norm, layers["ffn.0"], layers["ffn.2"]))

    def keeping_answers(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for the two passes of a checkpointed block: the first keeps the attention's answers for the second."""
        tape = Tape()
        return self._with(tape), self._with(tape)

    @contextmanager
    def _with(self, tape: Tape) -> Iterator[None]:
        self.tape = tape
        try:
            yield
        finally:
            self.tape = None
            tape.rewind()


def _projections(block: Block) -> Mapping[str, Projection] | None:
    """What each linear layer of a block computes at this moment; None where one is more than plain LoRAs."""
    found = {}
    for part in ("self_attn", "cross_attn", "ffn"):
        for name, layer in getattr(block, part).named_children():
            if isinstance(layer, RMSNorm | nn.GELU):
                continue
            projection = Projection.of(layer)
            if projection is None:
                return None
            found[f"{part}.{name}"] = projection
    return found


def _keys_and_values(attn: CrossAttention, rows: Tensor, layers: list[Projection], norm: RMSNorm) -> list[Tensor]:
    """rows (B, T, D) -> keys and values (B, T, N, K)"""
    k, v = project(rows, layers)
    return [attn.heads(norm(k)).to(v.dtype), attn.heads(v)]


class _Branch(Protocol):
    norm: "_Norm"

    @property
    def matrices(self) -> list[nn.Parameter]: ...

    def forward(self, m: Tensor, shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        """m (M, D), modulated, of a stream of `shape` (B, L, D) -> the answer (M, D), and what is kept."""

    def backward(
        self, grad: Tensor, normed: Tensor, kept: Kept, given: Sequence[Tensor], needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """grad (M, D) -> the gradient of m (M, D), and those of `given` and of the matrices."""


def _sublayer(x: Tensor, gate: Tensor | None, branch: _Branch, given: Sequence[Tensor] = ()) -> Tensor:
    """x + gate * branch(norm(x)), (B, L, D) fp32. gate (B, R, D) fp32; None: 1."""
    result: Tensor = _Sublayer.apply(x, gate, branch, len(given), *given, *branch.matrices)
    return result


class _Sublayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, branch: _Branch, num_given: int, *others: Tensor
    ) -> Tensor:
        m, normed, rstd = branch.norm.forward(x)
        given = others[:num_given]
        update, kept = branch.forward(m, x.shape, given)
        update = update.view(x.shape)
        ctx.branch, ctx.num_given, ctx.sizes = branch, num_given, [len(group) for group in kept]
        ctx.save_for_backward(gate, normed, rstd, *given, *(tensor for group in kept for tensor in group))
        if gate is None:
            return x + update
        return torch.addcmul(split_by(gate, x), gate.unsqueeze(2), split_by(gate, update)).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, needs_input = ctx.branch, ctx.needs_input_grad[0]
        gate, normed, rstd, *rest = ctx.saved_tensors
        given, kept = rest[: ctx.num_given], _regroup(rest[ctx.num_given :], ctx.sizes)
        inner = torch.empty_like(grad, dtype=normed.dtype)
        if gate is None:
            inner.copy_(grad)
        else:
            torch.mul(split_by(gate, grad), gate.unsqueeze(2), out=split_by(gate, inner))
        inner, grads = branch.backward(inner.flatten(0, 1), normed, kept, given, needs_input)
        if needs_input:
            grad = branch.norm.backward(inner.view(normed.shape), normed, rstd, grad)
        return grad if needs_input else None, None, None, None, *grads


def _regroup(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Kept:
    rest = iter(tensors)
    return [[next(rest) for _ in range(size)] for size in sizes]


@dataclass(frozen=True)
class _Norm:
    """A layer norm, and the modulation of its result: x -> (x - mean) / std * scale + shift."""

    scale: Tensor  # (B, R, D) fp32
    shift: Tensor  # (B, R, D) fp32
    eps: float
    dtype: torch.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) fp32 -> modulated (M, D), normalised (B, L, D), 1 / std (B, L, 1) fp32"""
        normed, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
        return self.modulate(normed), normed.to(self.dtype), rstd

    def modulate(self, normed: Tensor) -> Tensor:
        """Normalised (B, L, D) -> modulated (M, D)"""
        m = torch.empty_like(normed, dtype=self.dtype)
        shift, scale = self.shift.unsqueeze(2), self.scale.unsqueeze(2)
        torch.addcmul(shift, split_by(self.scale, normed), scale, out=split_by(self.scale, m))
        return m.flatten(0, 1)

    def backward(self, grad: Tensor, normed: Tensor, rstd: Tensor, stream: Tensor) -> Tensor:
        """grad (B, L, D) of the modulated -> that of x, added to `stream`, (B, L, D) fp32"""
        inner = torch.empty_like(grad)
        torch.mul(split_by(self.scale, grad), self.scale.unsqueeze(2), out=split_by(self.scale, inner))
        # The formula of a layer norm whose input was `normed` already: mean 0, std 1. The true std is the factor below.
        stats = torch.float32 if grad.is_cuda else grad.dtype
        mean, one = (torch.full(rstd.shape, value, dtype=stats, device=grad.device) for value in (0.0, 1.0))
        inner, _, _ = torch.ops.aten.native_layer_norm_backward(
            inner, normed, grad.shape[-1:], mean, one, None, None, [True, False, False]
        )
        return torch.addcmul(stream, rstd, inner)


@dataclass(frozen=True)
class _Heads:
    """Queries or keys: a norm over the full width, and the rotation of each head."""

    num_heads: int
    norm: RMSNorm
    rotary: Tensor | None = None

    def forward(self, x: Tensor, shape: torch.Size) -> Tensor:
        """x (M, D) of a stream of `shape` (B, L, D) -> heads (B, L, N, K) in the dtype of x"""
        return self._turn(F.rms_norm(x, x.shape[-1:], eps=self.norm.eps), shape)

    def again(self, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, with what `backward` needs: the normalised x with its graph, and the leaf of that."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            normed = F.rms_norm(leaf, leaf.shape[-1:], eps=self.norm.eps)
        return self._turn(normed.detach(), shape), normed, leaf

    def _turn(self, normed: Tensor, shape: torch.Size) -> Tensor:
        heads = self.split(normed * self.norm.weight, shape)
        heads = heads if self.rotary is None else rotate(heads, self.rotary)
        return heads.to(normed.dtype)

    def split(self, x: Tensor, shape: torch.Size) -> Tensor:
        """x (M, D) of a stream of `shape` (B, L, D) -> (B, L, N, K)"""
        return x.view(*shape[:2], self.num_heads, -1)

    def backward(self, grad: Tensor, normed: Tensor, leaf: Tensor) -> Tensor:
        """grad (B, L, N, K) of the heads -> that of x (M, D)"""
        if self.rotary is not None:
            cos, sin = self.rotary.unbind(-1)
            grad = rotate(grad, torch.stack((cos, -sin), dim=-1))
        inner = torch.empty_like(leaf)
        torch.mul(grad.reshape(leaf.shape), self.norm.weight, out=inner)
        return torch.autograd.grad(normed, leaf, inner)[0]


@dataclass(frozen=True)
class _AttentionBranch:
    """Attention by the queries of the tokens: to their own keys and values, or to given pairs, each apart, summed."""

    norm: _Norm
    inner: Sequence[Projection]  # q, k, v; or q alone
    queries: _Heads
    keys: _Heads | None  # None: pairs are given
    outer: Projection
    tape: Tape | None
    answers: list[Answer] = field(default_factory=list)  # their numbers alone

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [matrix for projection in (*self.inner, self.outer) for matrix in projection.matrices]

    def forward(self, m: Tensor, shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        products, hidden = project_forward(self.inner, m)
        compute = lambda: self._attend(products, shape, given)
        seen, answers = compute() if self.tape is None else self.tape.play(compute)
        update, outer_hidden = self.outer.forward(seen.view(m.shape))
        self.answers.extend(Answer((), answer.numbers) for answer in answers)
        return update, [products, hidden, [seen], outer_hidden, *(list(answer.tensors) for answer in answers)]

    def _attend(
        self, products: Sequence[Tensor], shape: torch.Size, given: Sequence[Tensor]
    ) -> tuple[Tensor, list[Answer]]:
        """The sum of the attentions (B, L, D), and the answers of their kernels."""
        q = self.queries.forward(products[0], shape)
        if self.keys is not None:
            given = self.keys.forward(products[1], shape), self.queries.split(products[2], shape)
        seen, answers = zip(*(attend(q, k, v) for k, v in _pairs(given)), strict=True)
        return sum(seen[1:], seen[0]).flatten(2), list(answers)

    def backward(
        self, grad: Tensor, normed: Tensor, kept: Kept, given: Sequence[Tensor], needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        products, hidden, (seen,), outer_hidden, *tensors = kept
        answers = [Answer(tuple(own), answer.numbers) for own, answer in zip(tensors, self.answers, strict=True)]
        seen_grad, outer_grads = self.outer.backward(grad, seen.view(grad.shape), outer_hidden)
        seen_grad = self.queries.split(seen_grad, normed.shape)

        q, *query_graph = self.queries.again(products[0], normed.shape)
        if self.keys is not None:
            k, *key_graph = self.keys.again(products[1], normed.shape)
            given = k, self.queries.split(products[2], normed.shape)
        found = [
            attend_backward(seen_grad, q, k, v, answer) for (k, v), answer in zip(_pairs(given), answers, strict=True)
        ]
        q_grad = sum((grads[0] for grads in found[1:]), found[0][0])
        grads = [self.queries.backward(q_grad, *query_graph)]
        given_grads = [grad for pair in found for grad in pair[1:]]
        if self.keys is not None:
            k_grad, v_grad = given_grads
            grads += [self.keys.backward(k_grad, *key_graph), v_grad.reshape(grad.shape)]
            given_grads = []
        m = self.norm.modulate(normed) if any(projection.pairs for projection in self.inner) else None
        m_grad, inner_grads = project_backward(self.inner, grads, m, hidden, needs_input)
        return m_grad, [*given_grads, *inner_grads, *outer_grads]


def _pairs(given: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """k, v, k, v, ... -> (k, v), (k, v), ..."""
    return list(zip(given[::2], given[1::2], strict=True))


@dataclass(frozen=True)
class _FeedForwardBranch:
    """Two layers with a GELU between them."""

    norm: _Norm
    inner: Projection
    outer: Projection

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [*self.inner.matrices, *self.outer.matrices]

    def forward(self, m: Tensor, shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        wide, inner_hidden = self.inner.forward(m)
        update, outer_hidden = self.outer.forward(F.gelu(wide, approximate="tanh"))
        return update, [[wide], inner_hidden, outer_hidden]

    def backward(
        self, grad: Tensor, normed: Tensor, kept: Kept, given: Sequence[Tensor], needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        (wide,), inner_hidden, outer_hidden = kept
        activated = F.gelu(wide, approximate="tanh") if self.outer.pairs else None
        wide_grad, outer_grads = self.outer.backward(grad, activated, outer_hidden)
        wide_grad = torch.ops.aten.gelu_backward(wide_grad, wide, approximate="tanh")
        m = self.norm.modulate(normed) if self.inner.pairs else None
        m_grad, inner_grads = self.inner.backward(wide_grad, m, inner_hidden, needs_input=needs_input)
        return m_grad, [*inner_grads, *outer_grads]

"""A transformer block for training without a compiler: three autograd Functions, one for each sublayer.

A sublayer is x + gate * outer(core(inner(norm(x)))): a modulated norm, linear layers, a core (attention or GELU), and a
linear layer. Its Function keeps what is dear, the answers of matrix products and of the attention, and the normalised
stream, rounded to the dtype of computing. What is cheap, modulation, the norms of queries and keys, and rotation, is
computed again in the backward pass. The numbers are those of `wan.modules.model.Block` up to rounding; tests bound the
difference.

Shape letters as in `wan.modules.model`, and M = B L tokens of all samples, W the width that a core reads or writes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.adapters.projection import Projection, project, project_backward, project_forward, speaking_adapters
from utils.training.kept_attention import Answer, Tape, attend, attend_backward
from wan.modules.attention import Attend
from wan.modules.model import Block, RMSNorm, rotate, split_by

Layers = Mapping[str, Projection]  # by their names in the block
Kept = list[list[Tensor]]  # what is kept for the backward pass, in groups


class FusedBlock:
    """The forward pass of a block in training; called as `Block.forward` is. The stream keeps its dtype, any.

    Where the block has more than frozen weights and plain LoRAs, it is the block's own.
    """

    def __init__(self, block: Block, plain: Callable[..., Tensor]) -> None:
        """`plain` is the block's own forward pass, for a stream of any dtype."""
        self.block, self.plain = block, plain
        self.tape: Tape | None = None
        self._known: dict[tuple[object, ...], Layers | None] = {}

    def __call__(self, x: Tensor, mod: Tensor, rotary: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        block, layers = self.block, self._layers()
        if layers is None or mod.requires_grad:
            return self.plain(x, mod, rotary, text, image)
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + mod).unbind(2)  # each (B, R, D)
        norm1, norm2 = (_Norm(norm.eps, text.dtype) for norm in (block.norm1, block.norm2))
        norm3, weight, bias = _Norm(block.norm3.eps, text.dtype), *block.norm3.parameters()

        own, cross = block.self_attn, block.cross_attn
        queries, keys = (_Heads(own.num_heads, norm, rotary) for norm in (own.norm_q, own.norm_k))
        inner = [layers[f"self_attn.{name}"] for name in "qkv"]
        sublayer = _Sublayer(norm1, inner, _Attention(own.attend, queries, keys, self.tape), layers["self_attn.o"])
        hidden = _apply(sublayer, x, 1 + scale1, shift1, gate1)

        core = _Attention(cross.attend, _Heads(cross.num_heads, cross.norm_q), None, self.tape)
        sublayer = _Sublayer(norm3, [layers["cross_attn.q"]], core, layers["cross_attn.o"])
        given = self._keys_and_values(layers, text, image)
        hidden = _apply(sublayer, hidden, weight[None, None], bias[None, None], None, given)

        sublayer = _Sublayer(norm2, [layers["ffn.0"]], _Gelu(), layers["ffn.2"], x.dtype)
        return _apply(sublayer, hidden, 1 + scale2, shift2, gate2)

    def _layers(self) -> Layers | None:
        """What each linear layer computes at this moment; None where the block has more than these."""
        layers = {
            f"{part}.{name}": layer
            for part in ("self_attn", "cross_attn", "ffn")
            for name, layer in getattr(self.block, part).named_children()
            if not isinstance(layer, RMSNorm | nn.GELU)
        }
        # Asking the layers takes a while, and the answer changes only when another adapter speaks.
        state = tuple((layer, *speaking_adapters(layer)) for layer in layers.values())
        if state not in self._known:
            found = {name: Projection.of(layer) for name, layer in layers.items()}
            others = (p for name, p in self.block.named_parameters() if "lora_" not in name)
            fits = all(found.values()) and not any(parameter.requires_grad for parameter in others)
            self._known[state] = {n: p for n, p in found.items() if p is not None} if fits else None
        return self._known[state]

    def _keys_and_values(self, layers: Layers, text: Tensor, image: Tensor | None) -> list[Tensor]:
        """Keys and values (B, T, N, K) of the text, and of the picture: few rows, which are left to autograd."""
        attn, given = self.block.cross_attn, []
        for rows, suffix in ((text, ""), (image, "_img")):
            if rows is not None:
                k, v = project(rows, [layers[f"cross_attn.{name}{suffix}"] for name in "kv"])
                norm = getattr(attn, f"norm_k{suffix}")
                given += [attn.heads(norm(k)).to(v.dtype), attn.heads(v)]
        return given

    def keeping_answers(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for the two passes of a checkpointed block: the first keeps attention's answers for the second."""
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


class _Core(Protocol):
    """What is between the linear layers of a sublayer."""

    def forward(self, products: list[Tensor], shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        """products (M, W) of a stream of `shape` (B, L, D) -> what the outer layer reads (M, W), and what is kept."""

    def output(self, products: list[Tensor], kept: Kept) -> Tensor:
        """What the outer layer has read (M, W)."""

    def backward(
        self, grad: Tensor, products: list[Tensor], shape: torch.Size, kept: Kept, given: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of the output (M, W) -> those of the products, and of what is given."""


@dataclass(frozen=True)
class _Sublayer:
    norm: "_Norm"
    inner: Sequence[Projection]
    core: _Core
    outer: Projection
    dtype: torch.dtype = torch.float32  # of the stream that it returns

    @property
    def matrices(self) -> list[nn.Parameter]:
        return [matrix for projection in (*self.inner, self.outer) for matrix in projection.matrices]


def _apply(
    sublayer: _Sublayer, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None, given: Sequence[Tensor] = ()
) -> Tensor:
    """x (B, L, D); scale, shift and gate (B, R, D) fp32, no gate for 1; `given` with gradients of their own -> x"""
    result: Tensor = _SublayerFunction.apply(x, scale, shift, gate, sublayer, len(given), *given, *sublayer.matrices)
    return result


class _SublayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        gate: Tensor | None,
        sublayer: _Sublayer,
        num_given: int,
        *others: Tensor,
    ) -> Tensor:
        given = list(others[:num_given])
        m, normed, rstd = sublayer.norm.forward(x, scale, shift)
        products, hidden = project_forward(sublayer.inner, m)
        seen, kept = sublayer.core.forward(products, x.shape, given)
        update, outer_hidden = sublayer.outer.forward(seen)

        groups = [given, products, hidden, outer_hidden, *kept]
        ctx.sublayer, ctx.sizes, ctx.dtype = sublayer, [len(group) for group in groups], x.dtype
        ctx.save_for_backward(scale, shift, gate, normed, rstd, *(tensor for group in groups for tensor in group))
        return _add(x, update.view(x.shape), gate, sublayer.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sublayer, needs_input = ctx.sublayer, ctx.needs_input_grad[0]
        scale, shift, gate, normed, rstd, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        given, products, hidden, outer_hidden, *kept = ([next(rest) for _ in range(size)] for size in ctx.sizes)

        inner = grad.to(normed.dtype) if gate is None else _scale(grad, gate, normed.dtype)
        # Only LoRAs need what their layers have read.
        seen = sublayer.core.output(products, kept) if sublayer.outer.pairs else None
        seen_grad, outer_grads = sublayer.outer.backward(inner.flatten(0, 1), seen, outer_hidden)
        assert seen_grad is not None
        grads, given_grads = sublayer.core.backward(seen_grad, products, normed.shape, kept, given)
        m = sublayer.norm.modulate(normed, scale, shift) if hidden else None
        m_grad, inner_grads = project_backward(sublayer.inner, grads, m, hidden, needs_input)
        if m_grad is None:
            stream = None
        else:
            stream = torch.empty_like(grad, dtype=ctx.dtype)
            sublayer.norm.backward(m_grad.view(normed.shape), normed, rstd, scale, grad, out=stream)
        return stream, None, None, None, None, None, *given_grads, *inner_grads, *outer_grads


def _add(x: Tensor, update: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + gate * update (B, L, D), computed in fp32 and written once, in `dtype`. gate (B, R, D), or None for 1."""
    result = torch.empty_like(x, dtype=dtype)
    if gate is None:
        return torch.add(x, update, out=result)
    torch.addcmul(split_by(gate, x), gate.unsqueeze(2), split_by(gate, update), out=split_by(gate, result))
    return result


def _scale(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (B, R, D) fp32 * x (B, L, D), written once, in `dtype`."""
    result = torch.empty_like(x, dtype=dtype)
    torch.mul(split_by(rows, x), rows.unsqueeze(2), out=split_by(rows, result))
    return result


@dataclass(frozen=True)
class _Norm:
    """A layer norm, and the modulation of its result: x -> (x - mean) / std * scale + shift. Rows (B, R, D) fp32."""

    eps: float
    dtype: torch.dtype

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, D) -> modulated (M, D), normalised (B, L, D), 1 / std (B, L, 1) fp32"""
        normed, _, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, self.eps)
        return self.modulate(normed, scale, shift), normed.to(self.dtype), rstd

    def modulate(self, normed: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalised (B, L, D) -> modulated (M, D)"""
        m = torch.empty_like(normed, dtype=self.dtype)
        torch.addcmul(shift.unsqueeze(2), split_by(scale, normed), scale.unsqueeze(2), out=split_by(scale, m))
        return m.flatten(0, 1)

    def backward(self, grad: Tensor, normed: Tensor, rstd: Tensor, scale: Tensor, stream: Tensor, out: Tensor) -> None:
        """grad (B, L, D) of the modulated -> that of x, with `stream` (B, L, D) added, into `out`"""
        inner = _scale(grad, scale, grad.dtype)
        # The formula of a layer norm whose input was `normed` already: mean 0, std 1. The true std is the factor below.
        stats = torch.float32 if grad.is_cuda else grad.dtype
        mean, one = (torch.full(rstd.shape, value, dtype=stats, device=grad.device) for value in (0.0, 1.0))
        inner, _, _ = torch.ops.aten.native_layer_norm_backward(
            inner, normed, grad.shape[-1:], mean, one, None, None, [True, False, False]
        )
        torch.addcmul(stream, rstd, inner, out=out)


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
            grad = rotate(grad.contiguous(), torch.stack((cos, -sin), dim=-1))
        inner = torch.empty_like(leaf)
        torch.mul(grad.reshape(leaf.shape), self.norm.weight, out=inner)
        return torch.autograd.grad(normed, leaf, inner)[0]


@dataclass(frozen=True)
class _Attention:
    """Attention by the queries of the tokens: to their own keys and values, or to given pairs, each apart, summed."""

    kernel: Attend
    queries: _Heads
    keys: _Heads | None  # None: pairs are given
    tape: Tape | None
    layouts: list[tuple[Any, ...]] = field(default_factory=list)  # of the kernels' answers

    def forward(self, products: list[Tensor], shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        def compute() -> list[tuple[Tensor, Answer]]:
            pairs = given
            if self.keys is not None:
                pairs = self.keys.forward(products[1], shape), self.queries.split(products[2], shape)
            q = self.queries.forward(products[0], shape)
            return [attend(q, k, v, self.kernel) for k, v in _pairs(pairs)]

        outputs, answers = zip(*(compute() if self.tape is None else self.tape.play(compute)), strict=True)
        seen = sum(outputs[1:], outputs[0]).flatten(2).flatten(0, 1)
        self.layouts.extend(answer.layout for answer in answers)
        return seen, [[seen], *(list(answer.tensors) for answer in answers)]

    def output(self, products: list[Tensor], kept: Kept) -> Tensor:
        return kept[0][0]

    def backward(
        self, grad: Tensor, products: list[Tensor], shape: torch.Size, kept: Kept, given: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        q, *query_graph = self.queries.again(products[0], shape)
        pairs = given
        if self.keys is not None:
            k, *key_graph = self.keys.again(products[1], shape)
            pairs = k, self.queries.split(products[2], shape)
        answers = [Answer(tuple(own), layout) for own, layout in zip(kept[1:], self.layouts, strict=True)]
        heads = self.queries.split(grad, shape)
        found = [
            attend_backward(heads, q, k, v, answer, self.kernel)
            for (k, v), answer in zip(_pairs(pairs), answers, strict=True)
        ]
        query_grads, pair_grads = [each[0] for each in found], [one for each in found for one in each[1:]]
        query_grad = self.queries.backward(sum(query_grads[1:], query_grads[0]), *query_graph)
        if self.keys is None:
            return [query_grad], pair_grads
        k_grad, v_grad = pair_grads
        return [query_grad, self.keys.backward(k_grad, *key_graph), v_grad.reshape(grad.shape)], []


def _pairs(given: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """k, v, k, v, ... -> (k, v), (k, v), ..."""
    return list(zip(given[::2], given[1::2], strict=True))


class _Gelu:
    def forward(self, products: list[Tensor], shape: torch.Size, given: Sequence[Tensor]) -> tuple[Tensor, Kept]:
        return self.output(products, []), []

    def output(self, products: list[Tensor], kept: Kept) -> Tensor:
        return F.gelu(products[0], approximate="tanh")

    def backward(
        self, grad: Tensor, products: list[Tensor], shape: torch.Size, kept: Kept, given: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.ops.aten.gelu_backward(grad, products[0], approximate="tanh")], []

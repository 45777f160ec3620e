"""Changes of other kinds as plain pairs of matrices: LoHa, LoKr and DoRA of a rank, and what is lost by it.

The best pair of a rank is a truncated singular value decomposition (Eckart and Young 1936). LoHa and LoKr need no dense
one: a LoHa is a pair whose rank is the product of its two (the rows of one side are Kronecker products of the rows of
its factors), and the singular values of a Kronecker product are the products of those of its factors.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from utils.adapters.dora import decomposed_change
from utils.adapters.lora import pad_inputs
from utils.adapters.lora_file import LoraError, LoraFile, LoraPair, delta
from utils.adapters.lycoris import LOHA, Lycoris

Read = Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]  # modules -> each with its weight in the base model
Svd = tuple[Tensor, Tensor, Tensor]  # U (out, k), the singular values (k,), V^T (k, in)

DENSE = 2048  # the shorter side of matrices that are decomposed in full; larger ones by iteration
EXTRA, ROUNDS = 16, 8  # columns and rounds of the iteration beyond what is needed


@dataclass(frozen=True)
class Loss:
    """What is lost where changes become pairs: squared norms of the changes, and of what the pairs lack."""

    whole: Mapping[str, float]
    lost: Mapping[str, float]

    @property
    def residual(self) -> float:
        """The norm of what is lost, relative to that of all changes together."""
        return _relative(sum(self.lost.values()), sum(self.whole.values()))

    @property
    def worst(self) -> tuple[str, float]:
        """The module that loses most of its own change, and how much."""
        by_module = {name: _relative(lost, self.whole[name]) for name, lost in self.lost.items()}
        return max(by_module.items(), key=lambda item: item[1])


def needs_base(lora: LoraFile) -> list[str]:
    """The modules whose change depends on the weights of the base model."""
    return sorted(lora.magnitudes)


def fold(lora: LoraFile, rank: int, read: Read | None) -> tuple[LoraFile, Loss]:
    """The LoRA with a plain pair of this rank, or less, in place of every LoHa, LoKr and DoRA; plain pairs stay.

    `read` gives the base weights of `needs_base`. The pairs are fp32 and their alpha is their rank. Raises LoraError
    for a base of other shapes.
    """
    pairs, whole, lost = dict(lora.pairs), {}, {}
    for name, lycoris in lora.lycoris.items():
        if name not in lora.magnitudes:
            pairs[name], whole[name], lost[name] = _truncated(_decompose(lycoris), rank, lycoris.weight_shape)
    decomposed = needs_base(lora)
    for name, weight in read(decomposed) if read is not None else ():
        factors = lora.factors[name]
        if name in lora.input_shapes:
            weight = pad_inputs(weight, lora.input_shapes[name][1])
        if (len(weight), weight[0].numel()) != (factors.weight_shape[0], math.prod(factors.weight_shape[1:])):
            shapes = f"{factors.weight_shape} at {name}, the base model {tuple(weight.shape)}"
            raise LoraError(f"the LoRA has {shapes}: is it for another Wan?")
        change = decomposed_change(weight, delta(factors).view_as(weight), lora.magnitudes[name])
        pairs[name], whole[name], lost[name] = _truncated(_dense(change.flatten(1), rank), rank, tuple(weight.shape))
        # Of an iteration only the first singular values are known: the rest is what is left of the change.
        whole[name] = change.double().square().sum().item()
        lost[name] = (change.double() - delta(pairs[name]).view_as(change).double()).square().sum().item()
    return replace(lora, pairs=pairs, lycoris={}, magnitudes={}), Loss(whole, lost)


def _truncated(svd: Svd, rank: int, shape: tuple[int, ...]) -> tuple[LoraPair, float, float]:
    """The pair of the largest singular values, shared between both matrices; squared norms of all and of the rest."""
    left, values, right = svd
    order = values.argsort(descending=True, stable=True)[:rank]
    root = values[order].sqrt()
    up, down = left[:, order] * root, root[:, None] * right[order]
    kept = values[order].double().square().sum().item()
    whole = values.double().square().sum().item()
    down, up = down.reshape(len(order), *shape[1:]), up.reshape(shape[0], -1, *[1] * (len(shape) - 2))
    return LoraPair(down.contiguous(), up.contiguous(), float(len(order))), whole, max(whole - kept, 0.0)


def _decompose(factors: Lycoris) -> Svd:
    """All singular values of a LoHa or LoKr, from those of its small factors where it has them."""
    if factors.kind == LOHA:
        (a1, b1), (a2, b2) = (factors.sides(f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        up = torch.einsum("or,os->ors", a1, a2).flatten(1) * factors.scale
        down = torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1)
        return _of_product(up, down) if len(down) < min(len(up), down.shape[1]) else _full(up @ down)
    (u1, s1, v1), (u2, s2, v2) = (_full(factors.whole(f"lokr_w{n}", f"lokr_t{n}")) for n in (1, 2))
    return torch.kron(u1, u2), torch.kron(s1, s2) * abs(factors.scale), torch.kron(v1, v2) * _sign(factors.scale)


def _of_product(up: Tensor, down: Tensor) -> Svd:
    """That of up (out, k) @ down (k, in), through two QR decompositions and a core (k, k)."""
    left, first = torch.linalg.qr(up)
    right, second = torch.linalg.qr(down.T)
    u, s, v = _full(first @ second.T)
    return left @ u, s, v @ right.T


def _dense(matrix: Tensor, rank: int) -> Svd:
    """The largest singular values of a matrix, at least `rank` of them."""
    count = rank + EXTRA
    if min(matrix.shape) <= max(DENSE, count):
        return _full(matrix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # where the iteration begins decides the last bits: the same for the same file
        u, s, v = torch.svd_lowrank(matrix, q=count, niter=ROUNDS)
    return u, s, v.T


def _full(matrix: Tensor) -> Svd:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _sign(number: float) -> float:
    return -1.0 if number < 0 else 1.0


def _relative(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0

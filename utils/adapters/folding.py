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
Progress = Callable[[Sequence[str]], Iterable[str]]  # may wrap the names of the modules in a bar

DENSE = 1024  # the shorter side of matrices that are decomposed in full; larger ones by iteration
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


def fold(lora: LoraFile, rank: int, read: Read | None, progress: Progress = iter) -> tuple[LoraFile, Loss]:
    """The LoRA with a plain pair of this rank, or less, in place of every LoHa, LoKr and DoRA; plain pairs stay.

    `read` gives the base weights of `needs_base`. The pairs are fp32 and their alpha is their rank. Raises LoraError
    for a base of other shapes.
    """
    pairs, whole, lost = dict(lora.pairs), {}, {}
    plain = [name for name in lora.lycoris if name not in lora.magnitudes]
    weights = iter(read(needs_base(lora)) if read is not None else ())
    for name in progress([*plain, *needs_base(lora)]):
        if name in lora.magnitudes:
            _, weight = next(weights)
            svd = _of_dense(_decomposed(lora, name, weight).flatten(1), rank)
        else:
            svd = _of_lycoris(lora.lycoris[name], rank)
        pairs[name] = _pair(svd, lora.factors[name].weight_shape)
        whole[name], lost[name] = svd.values.double().square().sum().item() + svd.lost, svd.lost
    return replace(lora, pairs=pairs, lycoris={}, magnitudes={}), Loss(whole, lost)


def _decomposed(lora: LoraFile, name: str, weight: Tensor) -> Tensor:
    """The change that a DoRA makes of a base weight, in full. Raises LoraError for one of another shape."""
    factors = lora.factors[name]
    if name in lora.input_shapes:
        weight = pad_inputs(weight, lora.input_shapes[name][1])
    if (len(weight), weight[0].numel()) != (factors.weight_shape[0], math.prod(factors.weight_shape[1:])):
        shapes = f"{factors.weight_shape} at {name}, the base model {tuple(weight.shape)}"
        raise LoraError(f"the LoRA has {shapes}: is it for another Wan?")
    return decomposed_change(weight, delta(factors).view_as(weight), lora.magnitudes[name])


@dataclass(frozen=True)
class _Svd:
    """The largest singular values (k,), with U (out, k) and V^T (k, in), and the squared norm of what they leave."""

    left: Tensor
    values: Tensor
    right: Tensor
    lost: float


def _pair(svd: _Svd, shape: tuple[int, ...]) -> LoraPair:
    """The pair of these singular values, which are shared between both matrices."""
    root = svd.values.sqrt()
    down = (root[:, None] * svd.right).reshape(len(root), *shape[1:])
    up = (svd.left * root).reshape(shape[0], -1, *[1] * (len(shape) - 2))
    return LoraPair(down.contiguous(), up.contiguous(), float(len(root)))


def _of_lycoris(factors: Lycoris, rank: int) -> _Svd:
    """That of a LoHa or LoKr, from its small factors where it has them."""
    if factors.kind == LOHA:
        (a1, b1), (a2, b2) = (factors.sides(f"hada_w{n}", f"hada_t{n}") for n in (1, 2))
        if a1.shape[1] * a2.shape[1] > min(DENSE, len(a1), b1.shape[1]):
            return _of_dense(factors.product() * factors.scale, rank)
        up = torch.einsum("or,os->ors", a1, a2).flatten(1) * factors.scale
        return _of_product(up, torch.einsum("ri,si->rsi", b1, b2).flatten(0, 1), rank)
    (u1, s1, v1), (u2, s2, v2) = (_full(factors.whole(f"lokr_w{n}", f"lokr_t{n}")) for n in (1, 2))
    values, sign = torch.outer(s1, s2).flatten() * abs(factors.scale), math.copysign(1.0, factors.scale)
    order = values.argsort(descending=True, stable=True)
    first, second = order[:rank] // len(s2), order[:rank] % len(s2)
    left = torch.einsum("ak,bk->abk", u1[:, first], u2[:, second]).flatten(0, 1)
    right = torch.einsum("ka,kb->kab", v1[first], v2[second]).flatten(1) * sign
    return _Svd(left, values[order[:rank]], right, _square(values[order[rank:]]))


def _of_product(up: Tensor, down: Tensor, rank: int) -> _Svd:
    """That of up (out, k) @ down (k, in), through two QR decompositions and a core (k, k)."""
    left, first = torch.linalg.qr(up)
    right, second = torch.linalg.qr(down.T)
    u, s, v = _full(first @ second.T)
    return _Svd(left @ u[:, :rank], s[:rank], v[:rank] @ right.T, _square(s[rank:]))


def _of_dense(matrix: Tensor, rank: int) -> _Svd:
    if min(matrix.shape) <= max(DENSE, rank + EXTRA):
        u, s, v = _full(matrix)
        return _Svd(u[:, :rank], s[:rank], v[:rank], _square(s[rank:]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # where the iteration begins decides the last bits: the same for the same file
        u, s, right = torch.svd_lowrank(matrix, q=rank + EXTRA, niter=ROUNDS)
    u, s, v = u[:, :rank], s[:rank], right.T[:rank]
    return _Svd(u, s, v, _square(matrix - (u * s) @ v))


def _full(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


def _square(tensor: Tensor) -> float:
    return tensor.double().square().sum().item()


def _relative(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0

"""How far two LoRAs change the same weights in the same directions.

A LoRA changes a weight by D (out, in) = strength * alpha / rank * up @ down. Everything here comes from the two
matrices, in fp64, and D is never made. What is no product of two matrices (LoHa, LoKr, a full change) is made as a
whole, in fp32, one module after another.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraFile, LoraPair, delta

BIAS = ".diff_b"  # the end of a key of `LoraFile.diffs` that changes a bias


@dataclass(frozen=True)
class Product:
    """A change of a weight, up (out, r) @ down (r, in), fp64."""

    up: Tensor
    down: Tensor

    @property
    def squared(self) -> float:
        """The square of its Frobenius norm."""
        return max((self.up.T @ self.up * (self.down @ self.down.T)).sum().item(), 0.0)

    def seen_by(self, outputs: Tensor) -> "Product":
        """outputs.T @ D for directions (out, k) of the outputs."""
        return replace(self, up=outputs.T @ self.up)

    def on(self, inputs: Tensor) -> "Product":
        """D @ inputs for directions (in, k) of the inputs."""
        return replace(self, down=self.down @ inputs)

    def padded(self, inputs: int) -> "Product":
        """With further inputs, which change nothing."""
        return replace(self, down=F.pad(self.down, (0, inputs - self.shape[1])))

    def with_product(self, other: "Product") -> float:
        """The inner product <D, other>: the sum of the products of all entries."""
        return (other.up.T @ self.up * (other.down @ self.down.T)).sum().item()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.up.shape[0], self.down.shape[1]

    def directions(self) -> tuple[Tensor, Tensor]:
        """Orthonormal directions of the outputs (out, k) and of the inputs (in, k) that D has, with k its rank."""
        (left, up), (right, down) = torch.linalg.qr(self.up), torch.linalg.qr(self.down.T)
        outputs, sizes, inputs = torch.linalg.svd(up @ down.T)
        negligible = sizes.max() * torch.finfo(sizes.dtype).eps * max(self.shape)
        rank = int((sizes > negligible).sum())
        return left @ outputs[:, :rank], right @ inputs[:rank].T


@dataclass(frozen=True)
class Whole:
    """A change of a weight (out, in), fp32, as `Product` is one; it has all directions."""

    matrix: Tensor

    @property
    def squared(self) -> float:
        return self.matrix.square().sum(dtype=torch.float64).item()

    def seen_by(self, outputs: Tensor) -> "Whole":
        return Whole(outputs.T.float() @ self.matrix)

    def on(self, inputs: Tensor) -> "Whole":
        return Whole(self.matrix @ inputs.float())

    def padded(self, inputs: int) -> "Whole":
        return Whole(F.pad(self.matrix, (0, inputs - self.shape[1])))

    def with_product(self, other: Product) -> float:
        return (self.seen_by(other.up).matrix * other.down).sum().item()

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]


Change = Product | Whole


@dataclass(frozen=True)
class Shares:
    """How much of a change lies in the directions of another one: shares of its squared norm.

    `inside`: in the directions of its inputs and of its outputs; the others in one of them, whatever the other side is.
    `chance` is what `inside` would be on average if the two had nothing to do with each other.
    """

    inside: float
    inputs: float
    outputs: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """Two changes of one weight; `first` and `second` are their Frobenius norms, 0 where there is no such change.

    `shares` are the first's in the second. They are None where one is not there, and where the second has all
    directions.
    """

    first: float
    second: float
    inner: float = 0.0
    shares: Shares | None = None

    @property
    def in_both(self) -> bool:
        """Whether there is anything to compare."""
        return self.first > 0 and self.second > 0

    @property
    def cosine(self) -> float:
        """1 where both changes are the same but for their size, -1 where they are opposite, 0 where they are apart."""
        return self.inner / (self.first * self.second) if self.in_both else 0.0


def overlaps(first: Chosen, second: Chosen) -> Iterator[tuple[str, Overlap]]:
    """Each weight that one of the LoRAs changes, and what the changes have in common. The lengths of DoRA do not count.

    Both fit the same transformer. A change of the patch embedding may have more inputs, for a control.
    """
    for name in sorted(changed(first.lora) | changed(second.lora)):
        yield name, compare(change_of(first, name), change_of(second, name))


def compare(first: Change | None, second: Change | None) -> Overlap:
    """What two changes of one weight have in common."""
    own, other = (0.0 if change is None else math.sqrt(change.squared) for change in (first, second))
    if first is None or second is None or not own or not other:
        return Overlap(own, other)
    inputs = max(first.shape[1], second.shape[1])
    first, second = first.padded(inputs), second.padded(inputs)
    shares = _shares(first, second) if isinstance(second, Product) else None
    return Overlap(own, other, _inner(first, second), shares)


def changed(lora: LoraFile) -> set[str]:
    """The names of what a LoRA changes: modules for their weights, and "(bias)" after a module for its bias."""
    return {*lora.factors, *map(_name, lora.diffs)}


def change_of(chosen: Chosen, name: str) -> Change | None:
    """What the LoRA changes of what has this name, None where it does not."""
    lora, strength = chosen.lora, chosen.strength
    diffs = [diff for key, diff in lora.diffs.items() if _name(key) == name]
    factors = lora.factors.get(name)
    if isinstance(factors, LoraPair) and not diffs:
        up, down = factors.up.double().flatten(1), factors.down.double().flatten(1)
        return Product(up * (strength * factors.scale), down)
    if factors is None and not diffs:
        return None
    parts = [strength * diff.float() for diff in diffs] + ([] if factors is None else [delta(factors, strength)])
    total = torch.stack([part.reshape(parts[0].shape) for part in parts]).sum(dim=0)
    matrix = total.flatten(1) if total.ndim > 1 else total[:, None]
    if 1 in matrix.shape:  # a vector, whichever way it lies
        return Product(matrix.double().reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64))
    return Whole(matrix)


def _name(key: str) -> str:
    """The name of what the key of a full change means."""
    module = key.rpartition(".")[0]
    return f"{module} (bias)" if key.endswith(BIAS) else module


def _inner(first: Change, second: Change) -> float:
    if isinstance(second, Product):
        return first.with_product(second)
    if isinstance(first, Product):
        return second.with_product(first)
    return (first.matrix * second.matrix).sum(dtype=torch.float64).item()


def _shares(first: Change, second: Product) -> Shares:
    outputs, inputs = second.directions()
    whole, seen = first.squared, first.seen_by(outputs)
    chance = math.prod(directions.shape[1] / directions.shape[0] for directions in (outputs, inputs))
    return Shares(seen.on(inputs).squared / whole, first.on(inputs).squared / whole, seen.squared / whole, chance)

"""LoHa and LoKr: changes of a weight that are factored otherwise than as two matrices.

    LoHa  (w1_a @ w1_b) * (w2_a @ w2_b), elementwise       scale alpha / rank
    LoKr  kron(w1, w2), each whole or a product a @ b      scale alpha / rank, or 1 where both are whole

For convolutions a core t stands between a and b (Tucker). Sources: the LoHa and LoKr modules of LyCORIS, and the weight
adapters of ComfyUI v0.3.77, which read the files of LyCORIS by these rules.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOHA, LOKR = "LoHa", "LoKr"
_ROLE = re.compile(r"(?P<loha>hada)_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)")


@dataclass(frozen=True)
class Lycoris:
    """The factors of one module by LyCORIS's names ("hada_w1_a", "lokr_w2"); alpha is None where unknown."""

    factors: Mapping[str, Tensor]
    alpha: float | None

    @property
    def kind(self) -> str:
        """LoHa or LoKr."""
        return kind_of(next(iter(self.factors)))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its factors by role."""
        return self.factors

    @property
    def rank(self) -> int:
        """The inner dimension of its products; 0 for a LoKr of two whole factors."""
        names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((self.factors[name].shape[0] for name in names if name in self.factors), 0)

    @property
    def scale(self) -> float:
        """What the product is multiplied by: 1 where no alpha is known, as in ComfyUI, or where it has no meaning."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in, ...), the shape of the weight that it changes; a convolution may come flattened."""
        if self.kind == LOHA:
            return self._side("hada_w1", "hada_t1")
        first, second = self._side("lokr_w1"), self._side("lokr_w2", "lokr_t2")
        return first[0] * second[0], first[1] * second[1], *second[2:]

    @property
    def bound(self) -> float:
        """No number in the change, or in the product before it is scaled, exceeds this; NaN where one is none.

        It is found from the factors: in full the changes of a large model take minutes.
        """
        if self.kind == LOHA:
            sides = [self.sides(f"hada_w{n}", f"hada_t{n}") for n in (1, 2)]
            largest = math.prod(len(b) * _largest(a) * _largest(b) for a, b in sides)
        else:
            largest = _largest(self.whole("lokr_w1")) * _largest(self.whole("lokr_w2", "lokr_t2"))
        return max(1.0, abs(self.scale)) * largest

    def map(self, change: Callable[[Tensor], Tensor]) -> "Lycoris":
        """With another tensor for each factor."""
        return replace(self, factors={name: change(factor) for name, factor in self.factors.items()})

    def product(self) -> Tensor:
        """The change before it is scaled, in fp32, (out, in * ...)."""
        if self.kind == LOHA:
            return self.whole("hada_w1", "hada_t1") * self.whole("hada_w2", "hada_t2")
        return torch.kron(self.whole("lokr_w1"), self.whole("lokr_w2", "lokr_t2"))

    def whole(self, name: str, core: str = "") -> Tensor:
        """One of the two factors as a matrix in fp32, (out, in * ...)."""
        if name in self.factors:
            return self.factors[name].float().flatten(1)
        a, b = self.sides(name, core)
        return a @ b

    def sides(self, name: str, core: str = "") -> tuple[Tensor, Tensor]:
        """The two matrices in fp32 whose product is one of the factors, (out, r) and (r, in * ...)."""
        a, b = self.factors[f"{name}_a"].float(), self.factors[f"{name}_b"].float()
        if core in self.factors:
            return a.T, torch.einsum("ij...,jr->ir...", self.factors[core].float(), b).flatten(1)
        return a, b.flatten(1)

    def flattened(self) -> "Lycoris":
        """The same change in matrices alone: kernels flattened, and a core multiplied into the second of its sides."""
        factors = {}
        for name, factor in self.factors.items():
            side, core = name.removesuffix("_a").removesuffix("_b"), f"{name[:4]}_t{name[6:7]}"
            if core in self.factors and side != name:
                factors[name] = self.sides(side, core)[1] if name.endswith("_b") else factor.T
            elif name[5] == "w":
                factors[name] = factor.flatten(1)
        flat = replace(self, factors=factors)
        return flat if flat.rank == self.rank else replace(flat, alpha=self.scale * flat.rank)

    def _side(self, name: str, core: str = "") -> tuple[int, ...]:
        """The shape of one factor."""
        if name in self.factors:
            return tuple(self.factors[name].shape)
        a, b = self.factors[f"{name}_a"], self.factors[f"{name}_b"]
        if core in self.factors:
            return a.shape[1], b.shape[1], *self.factors[core].shape[2:]
        return a.shape[0], *b.shape[1:]


def _largest(tensor: Tensor) -> float:
    low, high = tensor.aminmax()
    return max(-low.item(), high.item())


def kind_of(role: str) -> str:
    """LoHa or LoKr, by the name of a factor; nothing for any other name."""
    match = _ROLE.fullmatch(role)
    return "" if match is None else LOHA if match["loha"] else LOKR


def check_factors(factors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with the reason, for factors that are not those of one LoHa or LoKr, or do not fit."""
    kinds = sorted({kind_of(name) for name in factors})
    if len(kinds) > 1:
        raise ValueError(f"has factors of both {' and '.join(kinds)}")
    prefix = "hada" if kinds == [LOHA] else "lokr"
    sides = (f"{prefix}_w1", f"{prefix}_w2")
    missing = [side for side in sides if side not in factors and not {f"{side}_a", f"{side}_b"} <= factors.keys()]
    if missing or ("hada_t1" in factors) != ("hada_t2" in factors):
        raise ValueError(f"has only a part of a {kinds[0]}: {', '.join(sorted(factors))}")
    lycoris = Lycoris({name: factor.to("meta") for name, factor in factors.items()}, None)  # shapes alone
    try:
        same = kinds == [LOKR] or lycoris.whole("hada_w1", "hada_t1").shape == lycoris.whole("hada_w2", "hada_t2").shape
        fits = same and lycoris.product().numel() == torch.Size(lycoris.weight_shape).numel()
    except (RuntimeError, IndexError):
        fits = False
    if not fits:
        shapes = ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in sorted(factors.items()))
        raise ValueError(f"has factors that do not fit together: {shapes}")

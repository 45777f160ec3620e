"""Linear layers with their plain LoRAs: x W^T + b + scale * x A^T B^T, and what of it goes back.

PEFT's forward converts x to fp32, keeps it once for every adapter, and adds the parts in passes of their own. Here all
products are computed in the dtype of x, the matrices are converted once for each update, layers that read one input
keep it once, and every product adds to the one before.

Shape letters: M tokens of all samples, I input width, O output width, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.adapters.peft import LoraLayer, LoraLinear
from utils.storage.linear import QuantisedLinear, product, product_backward


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter adds nothing but scaling * x @ A^T @ B^T to its layer: no dropout, bias or DoRA."""
    dropout = layer.lora_dropout[adapter]
    matrices = layer.lora_A[adapter], layer.lora_B[adapter]
    unbiased = all(matrix.bias is None for matrix in matrices)
    return unbiased and not layer.lora_variant.get(adapter) and isinstance(dropout, nn.Identity)


def speaking_adapters(layer: nn.Module) -> list[str]:
    """The adapters that act on a layer at this moment."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


@dataclass(frozen=True)
class Pair:
    """The matrices of one LoRA, fp32 or bf16, and its strength."""

    down: nn.Parameter  # (r, I)
    up: nn.Parameter  # (O, r)
    scale: float


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and the LoRAs that are active on it."""

    base: nn.Linear
    pairs: tuple[Pair, ...] = ()

    @staticmethod
    def of(layer: nn.Module) -> "Projection | None":
        """What a layer computes at this moment; None where it is more than a frozen product and plain LoRAs."""
        base = layer.get_base_layer() if isinstance(layer, LoraLinear) else layer
        if not isinstance(base, nn.Linear) or type(base) not in (nn.Linear, QuantisedLinear):
            return None
        if base.weight.requires_grad or "forward" in vars(base):
            return None
        if not isinstance(layer, LoraLinear):
            return Projection(base)
        names = speaking_adapters(layer)
        if not all(is_plain(layer, name) for name in names):
            return None
        pairs = (Pair(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names)
        return Projection(base, tuple(pairs))

    @property
    def matrices(self) -> list[nn.Parameter]:
        """What is trained, in the order of the gradients that `backward` returns."""
        return [matrix for pair in self.pairs for matrix in (pair.down, pair.up)]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (M, I) -> the layer's answer (M, O), and each LoRA's hidden values (M, r)."""
        y, hidden = product(self.base, x), []
        for pair in self.pairs:
            h = x @ in_dtype(pair.down, x.dtype).T
            y.addmm_(h, in_dtype(pair.up, x.dtype).T, alpha=pair.scale)
            hidden.append(h)
        return y, hidden

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None,
        hidden: Sequence[Tensor],
        into: Tensor | None = None,
        needs_input: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of the input, added to `into` where that is given, and those of the matrices in their dtype.

        grad (M, O); x (M, I), which only LoRAs need; `hidden` as `forward` returned it.
        """
        grads: list[Tensor] = []
        if needs_input:
            into = product_backward(self.base, grad, into)
        for pair, h in zip(self.pairs, hidden, strict=True):
            assert x is not None
            hidden_grad = (grad @ in_dtype(pair.up, grad.dtype)).mul_(pair.scale)
            grads.append((hidden_grad.T @ x).to(pair.down.dtype))
            grads.append((grad.T @ h).float().mul_(pair.scale).to(pair.up.dtype))
            if into is not None:
                into.addmm_(hidden_grad, in_dtype(pair.down, grad.dtype))
        return into, grads


def in_dtype(matrix: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The values of a parameter in this dtype, converted once for each of its versions.

    An optimizer whose kernel does not count as a change in place has to say so (`increment_version`).
    """
    if matrix.dtype == dtype:
        return matrix.detach()
    key = (matrix._version, matrix.data_ptr(), dtype)
    known = getattr(matrix, "_converted", None)
    if known is None or known[0] != key:
        known = (key, matrix.detach().to(dtype))
        matrix._converted = known  # type: ignore[attr-defined]
    converted: Tensor = known[1]
    return converted


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The answers (..., O) of layers that read the same x (..., I)."""
    matrices = [matrix for projection in projections for matrix in projection.matrices]
    answers: tuple[Tensor, ...] = _Project.apply(x.reshape(-1, x.shape[-1]), projections, *matrices)
    return tuple(answer.view(*x.shape[:-1], answer.shape[-1]) for answer in answers)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *_matrices: Tensor) -> tuple[Tensor, ...]:
        answers, hidden = project_forward(projections, x)
        ctx.projections = projections
        ctx.save_for_backward(x if hidden else None, *hidden)
        return tuple(answers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *hidden = ctx.saved_tensors
        into, found = project_backward(ctx.projections, grads, x, hidden, ctx.needs_input_grad[0])
        return into, None, *found


def project_forward(projections: Sequence[Projection], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The answers (M, O) of layers that read the same x (M, I), and the hidden values of all their LoRAs, in order."""
    answers, hidden = zip(*(projection.forward(x) for projection in projections), strict=True)
    return list(answers), [h for of_one in hidden for h in of_one]


def project_backward(
    projections: Sequence[Projection],
    grads: Sequence[Tensor],
    x: Tensor | None,
    hidden: Sequence[Tensor],
    needs_input: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient (M, I) of the input that all layers read, and the gradients of their matrices, in order."""
    into, found, rest = None, [], list(hidden)
    for projection, grad in zip(projections, grads, strict=True):
        own, rest = rest[: len(projection.pairs)], rest[len(projection.pairs) :]
        into, more = projection.backward(grad, x, own, into, needs_input)
        found += more
    return into, found

"""Attention whose backward pass takes the kernel's answer from where it was kept, instead of running the kernel again.

What a fused kernel returns (its output, the log-sum-exp of the scores, the state of its generator) is all that its
backward pass needs besides queries, keys and values. Any kernel is served, because its own derivative is used: the
kernel's answer is put in place of its call.

Shape letters as in `wan.modules.model`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from wan.modules.attention import Attend, attention

# What the names of attention kernels begin with: PyTorch's, and those of FlashAttention 2 and 3.
KERNELS = (
    "aten::_scaled_dot_product_",
    "flash_attn::_flash_attn_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
)


@dataclass(frozen=True)
class Answer:
    """What a kernel returned, its tensors apart from the rest. Empty where attention was not one kernel."""

    tensors: tuple[Tensor, ...] = ()
    layout: tuple[Any, ...] = ()  # in the order of the kernel, Tensor in place of each tensor

    @staticmethod
    def of(returned: Sequence[Any]) -> "Answer":
        # Aliases: what the kernel returned becomes part of a graph, which must not live as long.
        tensors = tuple(value.detach() for value in returned if isinstance(value, Tensor))
        return Answer(tensors, tuple(Tensor if isinstance(value, Tensor) else value for value in returned))

    def returned(self) -> tuple[Any, ...]:
        """As the kernel returned it."""
        tensors = iter(self.tensors)
        return tuple(next(tensors).detach() if value is Tensor else value for value in self.layout)


class _AtKernel(TorchDispatchMode):
    """Inside, the answer of the attention kernel is kept; where one is given, the kernel is not run."""

    def __init__(self, answer: Answer | None = None) -> None:
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.name.startswith(KERNELS):
            return func(*args, **(kwargs or {}))
        if self.answer is None:
            self.answer = Answer.of(func(*args, **(kwargs or {})))
        return self.answer.returned()


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Attend = attention) -> tuple[Tensor, Answer]:
    """Attention without a graph, and the answer of its kernel."""
    mode = _AtKernel()
    # Some kernels leave out what a backward pass needs where nothing asks for gradients. The graph is thrown away:
    # checkpointing around this must not see it, and it must not keep itself alive by what it saved.
    with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, Tensor.detach), mode:
        out = kernel(*(x.detach().requires_grad_() for x in (q, k, v)))
    return out.detach(), mode.answer or Answer()


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, answer: Answer, kernel: Attend = attention
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. Without a kernel's answer the attention is computed again."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), _AtKernel(answer if answer.layout else None):
        out = kernel(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    return dq, dk, dv


Results = list[tuple[Tensor, Answer]]  # of attentions


class Tape:
    """Results of attention, in order: written in a first pass, taken in a second one."""

    def __init__(self) -> None:
        self._results: deque[Results] = deque()
        self._is_written = False

    def play(self, compute: Callable[[], Results]) -> Results:
        """The next results: computed and kept in the first pass, taken from the tape in the second."""
        if self._is_written:
            return self._results.popleft()
        self._results.append(compute())
        return self._results[-1]

    def rewind(self) -> None:
        """To be called after the first pass."""
        self._is_written = True

"""What happens in a pass: which tensors stay, and how often the attention kernel runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.trainees import loss_of, prepare_again
from utils.adapters.projection import in_dtype
from utils.training.kept_attention import KERNELS
from utils.training.memory import Memory
from wan.modules.model import WanModel


class Followed(TorchDispatchMode):
    """Inside, every new tensor is followed until its memory is free, and runs of attention kernels are counted.

    Bytes of type uint8 are not: they are main memory in which tensors are parked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel_runs = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._inputs: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self._inputs.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.kernel_runs += name.startswith(KERNELS) and not name.endswith("_backward")
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.uint8:
            self._inputs.add(storage._cdata)
        # A weak reference keeps the address from being used again.
        if storage._cdata not in self._inputs and storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    @property
    def living_bytes(self) -> int:
        """The memory of followed tensors that is not free yet."""
        return sum(size for ref, size in self._storages.values() if not ref.expired())


def kept_bytes(
    memory: Memory, model: WanModel, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]
) -> tuple[float, int]:
    """What a block keeps from the forward to the backward pass, per token; and what is left after the step, in all."""
    kept, left = [], 0
    for parameter in parameters:
        in_dtype(parameter, model.compute_dtype)  # kept for all steps
    blocks, tokens = model.blocks, inputs[0][:, 0].numel() // 4
    for count in (1, 2):
        model.blocks = blocks[:count]
        prepare_again(model, memory)
        with Followed() as followed:
            velocity = model(*inputs)
            kept.append(followed.living_bytes)
            torch.autograd.grad(loss_of(velocity), parameters, allow_unused=True)
            del velocity
        left += followed.living_bytes
    return (kept[1] - kept[0]) / tokens, left

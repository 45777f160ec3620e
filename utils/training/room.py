"""How much room the device has for what blocks keep: measured with one batch, before the first step."""

from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from utils.common.device import free_memory
from utils.training.checkpoint_plan import Room
from utils.training.memory import TrainingPass
from wan.modules.model import WanModel

MARGIN, LEAST_MARGIN = 0.05, 1e9  # of the device's memory, and in bytes: lost between tensors of different sizes
COMPILED = 0.75  # of what the model's own operations keep a compiled block keeps (benchmarks/RECORDS.md)
CPU_MARGIN = 0.25  # of what is free of main memory, which other programs use too


def measure_room(model: WanModel, run: Callable[[], object], reserve: int) -> Room:
    """The room beside what is allocated now and `reserve` bytes more, by one forward and backward pass.

    `run` is that pass, of a model on the device whose blocks are `TrainingPass`es.
    """
    block, costs, tokens = model.blocks[0], dict[str, float](), 0
    training_pass = block.forward
    assert isinstance(training_pass, TrainingPass)

    def counted(x: Tensor, *conditions: Any) -> Tensor:
        nonlocal tokens
        if torch.is_grad_enabled() and not costs:
            tokens = x.shape[0] * x.shape[1]
            costs.update(kept_per_token(training_pass, x, *conditions))
        return training_pass(x, *conditions)

    block.forward = counted
    try:
        if next(model.parameters()).is_cuda:
            free, working = _measure_cuda(run)
        else:
            run()
            free, working = int(psutil.virtual_memory().available * (1 - CPU_MARGIN)), int(2 * costs["none"] * tokens)
    finally:
        block.forward = training_pass
    return Room(free - reserve, working, tokens, costs)


def _measure_cuda(run: Callable[[], object]) -> tuple[int, int]:
    """The bytes that are free for activations, and those that `run` takes at its peak."""
    torch.cuda.synchronize()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    working = torch.cuda.max_memory_allocated() - resident
    _, total = torch.cuda.mem_get_info()
    margin = max(MARGIN * torch.cuda.get_per_process_memory_fraction() * total, LEAST_MARGIN)
    return int(free_memory() + torch.cuda.memory_reserved() - resident - margin), working


def kept_per_token(
    training_pass: TrainingPass, x: Tensor, mod: Tensor, rotary: Tensor, text: Tensor, image: Tensor | None = None
) -> dict[str, float]:
    """The bytes that a block keeps for each token, by strategy. The arguments are those of `Block.forward`."""
    width, heads = x.shape[-1], training_pass.block.self_attn.num_heads
    full = width * training_pass.memory.stream.itemsize
    # The output of each attention, and the log-sum-exp of its scores in fp32.
    attentions = 2 if image is None else 3
    selective = full + attentions * (width * text.dtype.itemsize + heads * torch.float32.itemsize)
    # With a gradient, as the inputs of all blocks behind the first that is trained.
    x = x.detach().to(training_pass.memory.stream).requires_grad_()
    shared = (mod, rotary, text, image, *training_pass.block.buffers())
    none = saved_bytes(lambda: training_pass.eager(x, mod, rotary, text, image), shared)
    none *= COMPILED if training_pass.memory.compile else 1
    none /= x.shape[0] * x.shape[1]
    return {"offload": 0 if x.is_cuda else full, "full": full, "selective": selective, "none": max(none, selective)}


def saved_bytes(forward: Callable[[], Tensor], shared: Iterable[Tensor | None]) -> float:
    """The bytes that autograd saves in a pass, without parameters and what is `shared`; the same memory counts once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with saved_tensors_hooks(pack, Tensor.detach):
        forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in shared if tensor is not None}
    return float(sum(size for place, size in storages.items() if place not in known))

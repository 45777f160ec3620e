"""Compiled blocks: one graph for all blocks of a model and for all sizes of a batch."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as partitioner

from utils.common.console import say
from utils.common.errors import RunError, UserError

# Of what could be kept for the backward pass compiled blocks keep so much, and compute again what costs no products.
KEPT_SHARE = 0.85

# A compiled block moves so many bytes less in a step than the one that runs otherwise, for each token and unit of width
# (benchmarks/RECORDS.md).
SAVED_BYTES = {"cuda": 209, "cpu": 311}
BANDWIDTH = {"cuda": 1e12, "cpu": 2e10}  # bytes per second, of a middling device
COMPILE_SECONDS = 60  # for a graph, roughly
WORTH = 5  # graphs whose time a run must save
MAX_GRAPHS = 32  # strategies, batches of one clip or more, given first frames or none: torch gives up at 8

COMPILER = (
    "for a GPU, PyTorch compiles with Triton (part of its builds for Linux, triton-windows on Windows), a C compiler\n"
    "and the headers of Python; for the CPU, with a C++ compiler"
)


def saved_seconds(device: torch.device, width: int, num_layers: int, tokens: float) -> float:
    """Roughly the time that compiling saves in a run that trains on so many tokens in all."""
    return tokens * num_layers * width * SAVED_BYTES[device.type] / BANDWIDTH[device.type]


def decide(mode: str, device: torch.device, saved: float) -> bool:
    """Whether blocks are compiled: `mode` is on, off, or auto: where that saves `saved` seconds and is possible.

    The decision is printed, except that a short run is not compiled. Raises UserError where a compiler is missing that
    is wanted.
    """
    if mode == "off" or (mode == "auto" and saved < WORTH * COMPILE_SECONDS):
        return False
    reason = why_not(device)
    if reason is None:
        say("the blocks are compiled, which takes minutes before the first step; --compile off leaves it out")
        return True
    if mode == "on":
        raise UserError(f"--compile on: compiling a test function failed ({reason})\n{COMPILER}")
    say(f"the blocks are not compiled, which would be faster: there is no working compiler ({reason})\n{COMPILER}")
    return False


def why_not(device: torch.device) -> str | None:
    """Compiles a small function on the device; the reason if that fails, None otherwise."""
    try:
        torch.compile(lambda x: (2 * x).sin().sum(), fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever a toolchain raises
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


@contextmanager
def explain_failed_compilation() -> Iterator[None]:
    """Turns what a compiler raises into a RunError that says how to do without it."""
    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RunError(f"compiling the blocks failed: {reason}\npass --compile off, which is slower") from error


def compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward pass, compiled for any number of tokens; each call needs gradients.

    Functions with the same code share their graphs, whichever block they belong to.
    """
    partitioner.activation_memory_budget = KEPT_SHARE
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # It warns of operations in place in a region with a checkpoint policy. They are not among what the policy keeps.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    run = torch.compile(forward, fullgraph=True)

    def call(x: Tensor, mod: Tensor, rotary: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        # The first block's input needs no gradient. With one it shares the graph of the others.
        x = x if x.requires_grad else x.detach().requires_grad_()
        maybe_mark_dynamic(x, 1)
        maybe_mark_dynamic(rotary, 0)
        if mod.shape[1] > 1:
            maybe_mark_dynamic(mod, 1)
        for tensor in (x, mod, text, *([] if image is None else [image])):
            if len(tensor) > 1:
                maybe_mark_dynamic(tensor, 0)
        return run(x, mod, rotary, text, image)

    return call

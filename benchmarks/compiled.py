"""What compiled code moves: Inductor's own read and write sets of the kernels that it has scheduled."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx


@dataclass(frozen=True)
class Kernel:
    """One scheduled kernel: generated, or a call of one of torch's."""

    name: str  # of torch's operation, "template" for a generated matrix product, "" for every other generated kernel
    bytes: int  # read and written
    files: tuple[tuple[str, int], ...]  # file and line of the frames of the last operation in it, outermost first


@dataclass(frozen=True)
class Graph:
    """One compiled graph."""

    is_backward: bool
    kernels: tuple[Kernel, ...]


@contextmanager
def watched(run: Callable[[Graph, Sequence[Any], Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, whatever is compiled is compiled anew, and `run` is called instead of each graph that should run.

    It is given the graph, its inputs, and the function that runs it and empties the list of inputs.

    Compiled code must be made inside, or the kernels in it are unknown.
    """
    from torch._inductor.output_code import CompiledFxGraph

    initialise, call = CompiledFxGraph.__init__, CompiledFxGraph.__call__

    def __init__(self: Any, compiled: Any, graph: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, compiled, graph, *args, **kwargs)
        self.graph = Graph(graph.is_backward, tuple(_kernels(graph.scheduler.nodes)))

    def __call__(self: Any, inputs: Any) -> Any:
        return run(self.graph, inputs, lambda: call(self, inputs))

    with ExitStack() as stack:
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(patch.object(CompiledFxGraph, "__init__", __init__))
        stack.enter_context(patch.object(CompiledFxGraph, "__call__", __call__))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the compiler, about its own work
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()


def _kernels(nodes: list[Any]) -> Iterator[Kernel]:
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    for node in nodes:
        moved = node.get_read_write_buffers_sizes()
        name = "template" if node.is_template() else ""
        if isinstance(node, ExternKernelSchedulerNode):
            operation = getattr(node.node, "op_overload", None)
            if isinstance(operation, torch._ops.OpOverload) and _is_view(operation):
                continue
            name = _operation(node.node)
        if moved:
            yield Kernel(name, moved, _frames(node))


def _operation(node: Any) -> str:
    """torch.ops.aten.mul.Tensor, extern_kernels.mm -> mul, mm."""
    parts = (node.python_kernel_name or "").split(".")
    return parts[3] if parts[:2] == ["torch", "ops"] else parts[-1]


def _is_view(operation: torch._ops.OpOverload) -> bool:
    aliases = [result.alias_info for result in operation._schema.returns]
    return all(alias is not None and not alias.is_write for alias in aliases)


def _frames(node: Any) -> tuple[tuple[str, int], ...]:
    origins: list[fx.Node] = [origin for part in node.get_nodes() if part.node for origin in part.node.get_origins()]
    traces = [trace for origin in origins if (trace := origin.meta.get("stack_trace"))]
    return (
        tuple((file, int(line)) for file, line in re.findall(r'File "(.+?)", line (\d+)', traces[-1])) if traces else ()
    )

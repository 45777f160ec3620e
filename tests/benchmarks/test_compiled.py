"""What compiled code moves and keeps, on functions whose kernels are known."""

import pytest
import torch
from torch import Tensor

from benchmarks.compiled import Graph, watched
from benchmarks.ledger import BACKWARD, ELEMENTWISE, FORWARD, GEMM, KEPT, OPS, Entry, Ledger, record, total
from tests.compiler import need_compiler
from utils.common.errors import RunError

SIZE = 4 * 64 * 64


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    need_compiler()


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """Of x -> exp(sin(x)) @ w compiled, and an exp that is not."""
    weight = torch.ones(64, 64)

    def chain(x: Tensor) -> Tensor:
        return x.sin().exp() @ weight

    x = torch.ones(64, 64, requires_grad=True)
    compiled = torch.compile(chain)
    return record(lambda: compiled(x).exp().sum(), [x], compiled=True)


def test_a_chain_is_one_kernel_that_reads_its_input_and_writes_its_output(ledger):
    fused = {entry: value for entry, value in ledger.items() if entry.line.endswith(", compiled")}
    assert total(fused, ELEMENTWISE, FORWARD) == 2 * SIZE
    assert total(fused, GEMM, FORWARD) == total(fused, GEMM, BACKWARD) == 3 * SIZE
    assert total(fused, OPS, FORWARD) == total(fused, OPS, BACKWARD) == 2
    # The gradient of the product, x, and what is kept in between are read, the gradient of x is written.
    assert 3 * SIZE <= total(fused, ELEMENTWISE, BACKWARD) <= 4 * SIZE


def test_what_is_not_compiled_is_counted_beside_it(ledger):
    assert ledger[Entry(ELEMENTWISE, FORWARD, "elsewhere")] == 2 * SIZE + SIZE + 4


def test_what_a_compiled_graph_hands_to_its_backward_pass_is_kept(ledger):
    eager = {entry: value for entry, value in ledger.items() if not entry.line.endswith(", compiled")}
    assert total(eager, KEPT, FORWARD) == SIZE
    assert total(ledger, KEPT, FORWARD) - SIZE in (0, SIZE)  # nothing where exp is computed again, or its output


def test_graphs_tell_their_direction_and_run_as_before():
    seen: list[Graph] = []

    def run(graph, inputs, action):
        assert any(isinstance(value, Tensor) for value in inputs)
        seen.append(graph)
        return action()

    x = torch.ones(8, requires_grad=True)
    with watched(run):
        torch.compile(torch.sin)(x).sum().backward()
    assert [graph.is_backward for graph in seen] == [False, True]
    assert [len(graph.kernels) for graph in seen] == [1, 1]
    assert torch.allclose(x.grad, torch.ones(8).cos())


def test_a_model_that_should_be_compiled_and_is_not_is_an_error():
    x = torch.ones(8, requires_grad=True)
    with pytest.raises(RunError, match="nothing was compiled"):
        record(lambda: x.sin().sum(), [x], compiled=True)


def test_views_that_the_compiler_leaves_to_torch_are_free():
    seen: list[Graph] = []

    def turn(x: Tensor, turns: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * turns)

    with watched(lambda graph, inputs, action: (seen.append(graph), action())[1]):
        torch.compile(turn)(torch.ones(8, 2), torch.ones(8, dtype=torch.complex64))
    [graph] = seen
    assert [(kernel.name, kernel.bytes) for kernel in graph.kernels] == [("mul", 3 * 8 * 8)]

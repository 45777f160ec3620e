"""Whether blocks are compiled, and what is said about it."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import TorchDynamoException

from tests.tiny import TINY_SHAPE
from tests.trainees import answers, prepare_again, relative_error, trainee
from utils.common.errors import RunError, UserError
from utils.training import compilation
from utils.training.checkpointing import STRATEGIES
from utils.training.compilation import (
    BANDWIDTH,
    COMPILE_SECONDS,
    COMPILER,
    SAVED_BYTES,
    WORTH,
    decide,
    explain_failed_compilation,
    saved_seconds,
    why_not,
)
from utils.training.memory import Memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG, SHORT = WORTH * COMPILE_SECONDS, WORTH * COMPILE_SECONDS - 1e-3


@pytest.fixture
def asked(monkeypatch) -> list[torch.device]:
    """The devices for which a working compiler was looked for, and found."""
    devices: list[torch.device] = []
    monkeypatch.setattr(compilation, "why_not", lambda device: devices.append(device))
    return devices


@pytest.fixture
def without_compiler(monkeypatch) -> None:
    monkeypatch.setattr(compilation, "why_not", lambda _: "RuntimeError: no gcc")


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_the_time_that_is_saved_is_that_of_moving_the_bytes():
    assert saved_seconds(CUDA, 1536, 30, 1e6) == pytest.approx(1e6 * 30 * 1536 * SAVED_BYTES["cuda"] / 1e12)
    assert saved_seconds(CPU, 1536, 30, 1e6) == pytest.approx(1e6 * 30 * 1536 * SAVED_BYTES["cpu"] / BANDWIDTH["cpu"])
    assert saved_seconds(CUDA, 2, 3, 10) == pytest.approx(6 * saved_seconds(CUDA, 1, 1, 10))
    assert saved_seconds(CUDA, 1, 1, 0) == 0


@pytest.mark.parametrize(("mode", "saved"), [("off", 1e9), ("auto", SHORT), ("auto", 0.0)])
def test_a_short_run_is_not_compiled_without_a_word_or_a_test_of_the_compiler(mode, saved, asked, capsys):
    assert decide(mode, CPU, saved) is False
    assert asked == [] and said(capsys) == ""


@pytest.mark.parametrize(("mode", "saved"), [("on", 0.0), ("on", 1e9), ("auto", LONG)])
def test_where_a_compiler_works_that_is_said(mode, saved, asked, capsys):
    assert decide(mode, CUDA, saved) is True
    assert asked == [CUDA]
    assert said(capsys) == (
        "the blocks are compiled, which takes minutes before the first step; --compile off leaves it out"
    )


def test_auto_goes_on_without_a_compiler_and_says_why(without_compiler, capsys):
    assert decide("auto", CPU, LONG) is False
    reason = "there is no working compiler (RuntimeError: no gcc)"
    assert said(capsys) == f"the blocks are not compiled, which would be faster: {reason} {' '.join(COMPILER.split())}"


def test_on_without_a_compiler_is_an_error_that_says_what_is_missing(without_compiler, capsys):
    with pytest.raises(UserError) as error:
        decide("on", CPU, 0.0)
    assert str(error.value) == f"--compile on: compiling a test function failed (RuntimeError: no gcc)\n{COMPILER}"
    assert said(capsys) == ""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\n  no gcc here\nand a long trace"), "RuntimeError: no gcc here"),
        (ImportError(""), "ImportError"),
        (OSError("  \n "), "OSError"),
    ],
)
def test_whatever_a_toolchain_raises_becomes_a_reason_of_one_line(error, reason, monkeypatch):
    def compile(function, **_):
        def call(x):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile)
    assert why_not(CPU) == reason


def test_a_compiler_that_works_on_the_device_gives_no_reason(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: seen.append(x.device) or function(x))
    assert why_not(CPU) is None and seen == [CPU]


def test_what_a_compiler_raises_in_a_run_is_reported_with_the_way_to_do_without():
    with pytest.raises(RunError) as error, explain_failed_compilation():
        raise TorchDynamoException("\n  no gcc here\nand a long trace")
    assert str(error.value) == "compiling the blocks failed: no gcc here\npass --compile off, which is slower"
    with pytest.raises(RunError, match="failed: \n"), explain_failed_compilation():
        raise TorchDynamoException("")
    with pytest.raises(ValueError), explain_failed_compilation():
        raise ValueError("another error")


@pytest.fixture
def graphs(monkeypatch) -> Iterator[Callable[[], int]]:
    """How many graphs were made; they run as torch's own operations, so that no compiler is needed."""
    made: list[object] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        made.append(graph)
        return aot_eager(graph, inputs)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **more: compile(forward, backend=counted, **more))
    torch._dynamo.reset()
    yield lambda: len(made)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "strategy", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "full")]
)
def test_all_blocks_share_one_graph_for_every_length_and_one_more_for_larger_batches(strategy, graphs):
    model, parameters = trainee()
    lengths = [
        2 * 3 * 4,
        4 * 8 * 8,
        TINY_SHAPE.text_len * 4,
        3 * 4 * 6,
    ]  # of latents: the third has as many tokens as text
    for batch, number in ((1, 1), (2, 2), (3, 2)):
        for size in lengths:
            latents = torch.randn(batch, TINY_SHAPE.in_dim, 1, 2, size // 2)
            inputs = latents, torch.full((batch,), 500.0), torch.randn(batch, 5, TINY_SHAPE.text_dim)
            prepare_again(model, Memory(strategy))
            expected = answers(model, parameters, inputs)
            prepare_again(model, Memory(strategy, compile=True))
            assert relative_error(answers(model, parameters, inputs), expected) < 1e-5
        assert graphs() == number, f"batches of {batch}"

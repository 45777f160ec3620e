"""Which attention kernel a run uses, and that training with each is the same."""

import pytest
import torch

from tests.followed import Followed
from tests.kernels import installed
from tests.trainees import answers, equal, inputs_of, prepared
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.imports import hidden
from utils.training import attention
from utils.training.attention import (
    AttentionOptions,
    SamplingAttention,
    check_kernel,
    choose,
    fastest,
    is_exact,
    measure,
)
from utils.training.memory import Memory
from wan.modules.attention import KERNELS, PACKAGES
from wan.modules.model import WanShape

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=64, freq_dim=32)
BF16, FP32 = torch.bfloat16, torch.float32


def test_pytorchs_choice_stays_unless_another_is_clearly_faster():
    assert choose({"sdpa": 1.0, "cudnn": 0.98, "flash2": 1.1}) == "sdpa"
    assert choose({"sdpa": 1.0, "cudnn": 0.95, "flash3": 0.7}) == "flash3"


def scaled(factor: float):
    return lambda q, k, v: factor * KERNELS["sdpa"](q, k, v)


def fails(error: Exception):
    def attend(*_):
        raise error

    return attend


HEADS = [torch.randn(1, 8, 2, 24) for _ in range(4)]


@pytest.mark.parametrize(
    "attend, said",
    [
        (fails(RuntimeError("no kernel")), "flash2 is left out: no kernel\n"),
        (fails(ImportError("undefined symbol")), "flash2 is left out: undefined symbol\n"),
        (scaled(1.05), "flash2 is left out: its answers are too far from attention in fp32\n"),
    ],
)
def test_kernels_that_fail_or_are_not_exact_are_left_out(attend, said, monkeypatch, capsys):
    assert measure("sdpa", *HEADS) > 0 and capsys.readouterr().out == ""
    monkeypatch.setitem(KERNELS, "flash2", attend)
    assert measure("flash2", *HEADS) is None and capsys.readouterr().out == said
    assert is_exact(scaled(1.01), *HEADS[:3])


def test_a_kernel_of_pytorch_that_does_not_serve_this_is_left_out_silently(monkeypatch, capsys):
    monkeypatch.setitem(KERNELS, "cudnn", fails(RuntimeError("no kernel")))
    assert measure("cudnn", *HEADS) is None and capsys.readouterr().out == ""


def test_memory_that_is_too_small_is_no_failure_of_a_kernel(monkeypatch):
    monkeypatch.setitem(KERNELS, "flash2", fails(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        measure("flash2", *HEADS)


def test_the_fastest_kernel_is_measured_said_and_kept(monkeypatch, capsys):
    asked = []

    def times(name, q, k, v, grad):
        asked.append(name)
        assert q.shape == grad.shape == (3, 40, 2, 24) and q.dtype == BF16
        return {"sdpa": 0.002, "flash2": 0.001}.get(asked[-1])

    monkeypatch.setattr(attention, "measure", times)
    with installed():
        assert fastest(CPU, BF16, SHAPE, (3, 40)) == "flash2"
    assert asked == ["sdpa", "cudnn", "efficient", "flash2", "flash3"]  # all but the one without a backward pass
    assert capsys.readouterr().out == (
        "--attention flash2: forward and backward of 3x40 tokens take sdpa 2.00 ms, flash2 1.00 ms\n"
    )
    monkeypatch.setattr(attention, "fastest", lambda *_: "cudnn")
    decisions = Decisions("a GPU")
    assert AttentionOptions().attention_kernel(GPU, BF16, SHAPE, (3, 40), decisions) == "cudnn"
    assert decisions.table() == {"device": "a GPU", "attention": "cudnn"}
    kept = Decisions("a GPU", {"device": "a GPU", "attention": "flash3"})
    with installed():
        assert AttentionOptions().attention_kernel(GPU, BF16, SHAPE, (3, 40), kept) == "flash3"
    assert "--attention flash3, as in the saved run" in capsys.readouterr().out
    with hidden("flash_attn_interface"), pytest.raises(UserError, match="flash3 needs flash_attn_interface"):
        AttentionOptions().attention_kernel(GPU, BF16, SHAPE, (3, 40), kept)
    with pytest.raises(UserError, match="attention is 'sage'"):
        broken = Decisions("a GPU", {"device": "a GPU", "attention": "sage"})
        AttentionOptions().attention_kernel(GPU, BF16, SHAPE, (3, 40), broken)


def test_on_the_cpu_and_where_it_is_named_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(attention, "fastest", lambda *_: pytest.fail("measured"))
    assert AttentionOptions().attention_kernel(CPU, FP32, SHAPE, (1, 40), Decisions("cpu")) == "sdpa"
    named = AttentionOptions(attention="cudnn")
    assert named.attention_kernel(GPU, BF16, SHAPE, (1, 40), Decisions("a GPU")) == "cudnn"


@pytest.mark.parametrize("name", PACKAGES)
def test_what_does_not_run_here_is_refused_at_the_start(name):
    with (
        hidden(PACKAGES[name]),
        pytest.raises(UserError, match=f"(?s){name} needs .*cannot be imported.*(pip install|build it)"),
    ):
        check_kernel(name, GPU, is_fp32=False)
    with installed():
        check_kernel(name, GPU, is_fp32=False)
        with pytest.raises(UserError, match="needs a CUDA GPU: leave it out"):
            check_kernel(name, CPU, is_fp32=False)
        with pytest.raises(UserError, match="computes in half precision"):
            check_kernel(name, GPU, is_fp32=True)


def test_sdpa_runs_everywhere():
    check_kernel("sdpa", CPU, is_fp32=True)
    AttentionOptions().check_attention(CPU, is_fp32=True)
    SamplingAttention().check_attention(CPU, is_fp32=True)
    with pytest.raises(UserError, match="sage needs"):
        SamplingAttention(attention="sage").check_attention(CPU, is_fp32=False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        AttentionOptions(attention="cudnn").check_attention(CPU, is_fp32=False)


@pytest.mark.parametrize("kernel", ["flash2", "flash3"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("strategy, runs", [("none", 1), ("selective", 1), ("full", 2)])
def test_gradients_are_those_of_sdpa_and_answers_are_kept_as_its_are(kernel, fuse, strategy, runs):
    results = []
    with installed():
        for name in ("sdpa", kernel):
            model, parameters = prepared(Memory(strategy, fuse=fuse, attention=name))
            inputs = inputs_of(model)
            with Followed() as followed:
                results.append(answers(model, parameters, inputs))
            assert followed.kernel_runs == runs * 2 * len(model.blocks)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not equal(*results)

"""The command that counts and times one training step, on a small model on the CPU."""

import runpy
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.contest import Contestant
from benchmarks.ledger import ELEMENTWISE, FORWARD, total
from benchmarks.measure import Row, Sizes, count_tokens
from benchmarks.models import diffusers_trainee, our_trainee, random_inputs
from tests.families import RELEASES
from tests.tiny import tiny_shape
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.training.memory import Memory
from wan.configs import FAMILIES
from wan.modules.model import WanShape

CPU = torch.device("cpu")
FAMILY = "wan2.1-t2v-1.3B"
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=24, freq_dim=32)
ARGUMENTS = ["--tokens", "12", "--steps", "3", "--warmups", "1", "--rank", "4"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, FAMILY, replace(FAMILIES[FAMILY], shape=SHAPE))
    monkeypatch.setattr(step, "CPU_GEMM_SIDE", 32)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def timed(*arguments: str) -> dict[str, Row]:
    opts = parse_options(step.Options, [*ARGUMENTS, *arguments])
    sizes = step.sizes_of(opts, on_gpu=False)
    return {row.name: row for row in step.timed(opts, sizes, CPU, {})}


@pytest.mark.parametrize("release", RELEASES)
def test_every_family_takes_the_same_step_as_in_diffusers(release):
    # diffusers finds the tokens of the picture behind 512 rows of text.
    shape = replace(tiny_shape(FAMILIES[release]), text_len=512)
    sizes = Sizes(shape=shape, rank=4, text_tokens=8)
    inputs = random_inputs(sizes, (2, 4, 6), CPU)
    ours = our_trainee(shape, sizes, CPU, torch.float32, Memory(fuse=True))
    theirs = diffusers_trainee(shape, sizes, CPU, torch.float32, checkpointing=False)
    losses = [trainee.loss(inputs) for trainee in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    gradients = zip(*map(torch.autograd.grad, losses, (ours.parameters, theirs.parameters)), strict=True)
    assert all((mine - other).norm() <= 1e-4 * other.norm() for mine, other in gradients)


def test_without_seconds_only_the_ledger_is_printed(capsys):
    step.main(ARGUMENTS)
    out = capsys.readouterr().out
    for printed in ("ours", "diffusers + PEFT", "wan/modules/model.py:", "nothing was timed"):
        assert printed in out
    assert "step, median" not in out


def test_the_ledger_of_every_strategy_is_printed_on_demand(capsys):
    step.main([*ARGUMENTS, "--no-lines", "--strategies"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fused,")]
    kept = {row.split("  ")[0]: row.split()[-10] for row in rows}
    assert list(kept) == ["fused, none", "fused, selective", "fused, full", "fused, offload"]
    assert kept["fused, offload"] == "0" and kept["fused, full"] == "2.0"


def test_with_seconds_the_record_has_agreement_speed_and_ratio(capsys):
    step.main([*ARGUMENTS, "--seconds", "--no-lines"])
    out = capsys.readouterr().out
    assert "wan/modules/model.py:" not in out
    assert "`python -m benchmarks.step --tokens 12" in out
    for printed in ("cosine of all LoRA gradients", "ours: step, median", "ours: times the speed of diffusers + PEFT"):
        assert printed in out


def test_a_step_is_timed_against_the_peer_and_against_the_device():
    rows = timed()
    assert "3 steps of 12 tokens" in rows["ours: step, median"].comparison
    ratio = rows["ours: times the speed of diffusers + PEFT"].value
    assert ratio == pytest.approx(rows["diffusers + PEFT: step, median"].value / rows["ours: step, median"].value)
    parts = [row.value for name, row in rows.items() if row.comparison.startswith("at ")]
    share = rows["ours: share of the step that these take"].value
    assert len(parts) == 3
    assert share == pytest.approx(100 * sum(parts) / rows["ours: step, median"].value)
    assert "ours: exposed transfer" not in rows


def test_where_ours_and_the_peer_disagree_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(Contestant, "begin", wrong(Contestant.begin))
    rows = timed()
    assert any(row.failed for row in rows.values())
    assert not any("median" in name for name in rows)


def wrong(begin):
    def changed(contestant, inputs, device):
        begin(contestant, inputs, device)
        if contestant.name == step.OURS:
            contestant.gradients = [-gradient for gradient in contestant.gradients]

    return changed


def test_a_failed_row_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(Contestant, "begin", wrong(Contestant.begin))
    with pytest.raises(SystemExit) as stopped:
        step.main([*ARGUMENTS, "--seconds"])
    assert stopped.value.code == 1


def test_without_diffusers_ours_is_counted_and_timed_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = timed()
    assert rows["diffusers + PEFT"].verdict == "skipped: diffusers is not installed"
    assert "ours: step, median" in rows and not any("times the speed" in name for name in rows)


def test_the_options_choose_shape_depth_size_and_memory():
    opts = parse_options(step.Options, ["--layers", "4", "--grid", "3", "4", "6", "--checkpointing", "full"])
    sizes = step.sizes_of(opts, on_gpu=True)
    assert (sizes.shape, sizes.video) == (replace(SHAPE, num_layers=4), (3, 4, 6))
    assert opts.memory == Memory("full", compile=False, fuse=True, stream=torch.bfloat16)
    assert step.sizes_of(parse_options(step.Options, []), on_gpu=True).shape.num_layers == SHAPE.num_layers
    assert step.sizes_of(parse_options(step.Options, []), on_gpu=False).shape.num_layers == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "3", "4", "6", "--tokens", "12"], "say the same"),
        (["--grid", "3", "5", "6"], "an even height"),
        (["--grid", "4", "6"], "three numbers"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        step.sizes_of(parse_options(step.Options, arguments), on_gpu=False)


@pytest.mark.parametrize(
    ("tokens", "grid"), [(1, (1, 2, 2)), (7, (1, 2, 14)), (1024, (1, 64, 64)), (2560, (1, 80, 128))]
)
def test_a_grid_has_exactly_the_tokens_and_is_nearly_square(tokens, grid):
    assert step.grid_of(tokens) == grid and count_tokens(grid) == tokens


def test_checkpointing_of_ours_and_of_the_peer_are_chosen_apart():
    opts = parse_options(step.Options, [*ARGUMENTS, "--checkpointing", "full", "--no-peer_checkpointing"])
    ledgers = step.count(opts, step.sizes_of(opts, on_gpu=False), CPU)
    again = {name: total(ledger, ELEMENTWISE, "recompute") for name, ledger in ledgers.items()}
    assert again["ours"] > 0 and again["diffusers + PEFT"] == 0
    assert total(ledgers["diffusers + PEFT"], ELEMENTWISE, FORWARD) > total(ledgers["ours"], ELEMENTWISE, FORWARD)


def test_the_command_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--help"])
    monkeypatch.delitem(sys.modules, "benchmarks.step")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.step", run_name="__main__")
    assert ended.value.code == 0 and "--checkpointing" in capsys.readouterr().out

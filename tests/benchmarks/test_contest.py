"""What a contest measures, and what it takes for an agreement."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contest import Contestant, admit, agreement, ratio_rows, speed_rows, take_turns
from benchmarks.measure import Clock, Row, Sizes, cosine
from benchmarks.models import Trainee, diffusers_trainee, our_trainee, random_inputs
from wan.modules.model import WanShape

CPU = torch.device("cpu")
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=24, freq_dim=32)
SIZES = Sizes(shape=SHAPE, rank=4, text_tokens=10, video=(2, 4, 6), warmups=1, steps=3)
INPUTS = random_inputs(SIZES, SIZES.video, CPU)


def begun(name: str, trainee: Trainee[nn.Module]) -> Contestant:
    contestant = Contestant(name, trainee)
    contestant.begin(INPUTS, CPU)
    return contestant


def verdicts(ours: Contestant, peer: Contestant, dtype: torch.dtype) -> list[str]:
    return [row.verdict for row in agreement(ours, peer, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_and_diffusers_agree_on_loss_and_gradients(dtype):
    pytest.importorskip("diffusers")
    ours = begun("ours", our_trainee(SHAPE, SIZES, CPU, dtype))
    peer = begun("peer", diffusers_trainee(SHAPE, SIZES, CPU, dtype))
    assert set(verdicts(ours, peer, dtype)) == {"ok"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["loss", "gradients"])
def test_another_loss_or_another_gradient_fails(dtype, wrong):
    ours, peer = (begun(name, our_trainee(SHAPE, SIZES, CPU, dtype)) for name in ("ours", "peer"))
    assert set(verdicts(ours, peer, dtype)) == {"ok"}
    if wrong == "loss":
        ours.loss *= 1.02
    else:
        ours.gradients[0] = ours.gradients[0].flip(0)
    assert verdicts(ours, peer, dtype).count("failed") == 1


def test_a_loss_that_is_no_number_fails():
    ours, peer = (begun(name, our_trainee(SHAPE, SIZES, CPU)) for name in ("ours", "peer"))
    ours.loss = float("nan")
    assert verdicts(ours, peer, torch.bfloat16)[0] == "failed"


def test_the_first_pass_updates_nothing_and_leaves_no_gradients():
    trainee = our_trainee(SHAPE, SIZES, CPU)
    before = [parameter.clone() for parameter in trainee.parameters]
    contestant = begun("ours", trainee)
    assert contestant.first > 0 and len(contestant.gradients) == len(before)
    assert all(torch.equal(old, new) for old, new in zip(before, trainee.parameters, strict=True))
    assert all(parameter.grad is None for parameter in trainee.parameters)


def test_contestants_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(Contestant, "turn", lambda self, inputs, device: order.append(self.name) or 1.0)
    builders = {name: lambda: our_trainee(SHAPE, SIZES, CPU) for name in "ab"}
    contestants = [one for one in admit(builders, INPUTS, SIZES, CPU) if isinstance(one, Contestant)]
    assert order == ["a", "b"]  # the warm-up
    assert list(take_turns(contestants, INPUTS, 3, CPU, Clock(60))) == []
    assert order[2:] == ["a", "b"] * 3
    assert [contestant.times for contestant in contestants] == [[1.0] * 3] * 2


def test_a_speed_is_tokens_over_the_median_and_its_spread_is_reported():
    contestant = Contestant("ours", our_trainee(SHAPE, SIZES, CPU), times=[1.0, 2.0, 9.0])
    rows = {row.name: row for row in speed_rows(contestant, flops=4.0, tokens=12, ceiling=8.0)}
    assert rows["ours: speed"] == Row("ours: speed", 6.0, "tokens/s")
    assert rows["ours: model FLOP utilisation"].value == 25.0
    assert rows["ours: step, median"].comparison == "p90 7.6 s, 1 to 9 s, 3 steps of 12 tokens"


def test_the_ratio_is_to_the_peer_and_absent_without_it():
    ours = Contestant("ours", our_trainee(SHAPE, SIZES, CPU), times=[1.0])
    peer = replace(ours, name="peer", times=[2.0])
    assert [row.value for row in ratio_rows([ours, peer], "peer")] == [2.0]
    assert [row.verdict for row in ratio_rows([ours, peer], "peer", target=3)] == ["missed"]
    assert list(ratio_rows([ours], "peer")) == []


def test_the_cosine_of_opposite_tensors_is_minus_one():
    a: Tensor = torch.tensor([[1.0, 2.0]])
    assert cosine(a, -3 * a) == pytest.approx(-1)
    assert cosine(a, torch.tensor([-2.0, 1.0])) == pytest.approx(0)

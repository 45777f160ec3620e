"""The groups of the GPU check, with their own functions, on a small model on the CPU."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_wan_lora
from benchmarks import gpu_check
from benchmarks.checks import environment, equality, numbers, plan, step, stream, synchronisations, vae
from benchmarks.measure import FAILED, Clock, Row, Sizes, at_least, count_tokens, skipped
from benchmarks.models import fused, our_trainee, random_inputs, step_flops
from tests.limits import GRID
from tests.sizes import CPU, SHAPE, TINY, values
from utils.data.buckets import count_tokens as tokens_of
from utils.data.buckets import max_frames
from utils.training.memory import Memory
from wan.modules.attention import attention
from wan.modules.model import WanShape

OURS, LEAN, PEER = "fused, full", "fused, none", step.PEER


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)


@pytest.fixture(scope="module")
def compared() -> dict[str, Row]:
    return values(numbers.check(TINY, CPU, Clock(60)))


def test_bf16_of_ours_and_of_diffusers_agrees_with_fp32_on_the_same_weights(compared):
    assert compared["depth"].value == 2
    for name in ("plain", "fused, fp32 stream", "fused", "diffusers + PEFT"):
        assert 0 < compared[f"{name}: relative loss difference"].value < 1e-2
        worst = compared[f"{name}: worst cosine of one matrix"].value
        assert 0.99 < worst < compared[f"{name}: cosine of all LoRA gradients"].value < 1


def test_only_the_cosines_of_ours_have_a_limit(compared):
    judged = {name: row.verdict for name, row in compared.items() if row.verdict}
    ours = ("plain", "fused, fp32 stream", "fused")
    assert judged == {f"{name}: cosine of all LoRA gradients": "ok" for name in ours}


def test_rounding_the_residual_stream_changes_the_numbers(compared):
    label = "relative loss difference"
    assert compared[f"fused, fp32 stream: {label}"].value != compared[f"fused: {label}"].value


def test_compiled_blocks_are_compared_with_fp32(monkeypatch):
    asked = []
    monkeypatch.setattr(numbers, "compiled", lambda strategy: asked.append(strategy) or fused(strategy))
    rows = values(numbers.compiled_blocks(TINY, CPU, Clock(60)))
    judged = {name: row.verdict for name, row in rows.items() if row.verdict}
    assert judged == {f"compiled, {name}: cosine of all LoRA gradients": "ok" for name in ("none", "full")}
    assert asked == ["none", "full"]


def test_strategies_that_compute_the_same_bits_are_equal():
    rows = values(equality.check(TINY, CPU, Clock(60)))
    assert [row.value for row in rows.values()] == [0, 0, 0, 0]
    assert {row.verdict for row in rows.values()} == {"equal"}


@pytest.mark.parametrize(("wrong", "verdict"), [((3,), FAILED), ((2, 3), "as two runs of one")])
def test_strategies_that_differ_fail_only_where_one_alone_repeats_its_bits(monkeypatch, wrong, verdict):
    runs, grads = [], [torch.ones(3)] * 32

    def measured(build, inputs):
        runs.append(build)
        return 0.5, [torch.zeros(3), *grads[1:]] if len(runs) in wrong else grads

    monkeypatch.setattr(equality, "measure", measured)
    rows = values(equality.check(TINY, CPU, Clock(60)))
    row = rows["selective and none: that differ"]
    assert (row.value, row.verdict) == (1, verdict)
    assert "of 32 gradients" in row.comparison and "the loss equal" in row.comparison


def test_wrong_gradients_fail_the_limit(monkeypatch):
    measured = iter([1.0, -1.0, 1.0, 1.0, 1.0])  # of the reference, of ours and of the peer
    monkeypatch.setattr(numbers, "measure", lambda build, inputs: (0.5, [torch.full((3,), next(measured))]))
    rows = values(numbers.check(TINY, CPU, Clock(60)))
    assert rows["plain: cosine of all LoRA gradients"].failed
    assert not rows["fused: cosine of all LoRA gradients"].failed


def test_nan_misses_its_limit():
    assert at_least("x", float("nan"), 0.5).failed
    assert not at_least("x", 0.5, 0.5).failed


def test_without_diffusers_ours_is_still_compared_with_fp32(without_diffusers):
    rows = values(numbers.check(TINY, CPU, Clock(60)))
    assert rows["diffusers + PEFT"] == skipped("diffusers + PEFT", "diffusers is not installed")
    assert rows["plain: cosine of all LoRA gradients"].verdict == "ok"


@pytest.mark.parametrize(("contest", "tokens", "target"), [(step.video, 12, "1.6"), (step.images, 4, "2")])
def test_a_step_is_timed_for_ours_and_diffusers(contest, tokens, target):
    rows = values(contest(TINY, CPU, Clock(60)))
    for name in (OURS, LEAN, PEER):
        assert rows[f"{name}: step, median"].value > 0
        assert f"3 steps of {tokens} tokens" in rows[f"{name}: step, median"].comparison
        speed = tokens / rows[f"{name}: step, median"].value
        assert rows[f"{name}: speed"].value == pytest.approx(speed)
        assert rows[f"{name}: model FLOP utilisation"].value > 0
    for name in (OURS, LEAN):
        ratio = rows[f"{name}: times the speed of {PEER}"]
        assert ratio.value == pytest.approx(rows[f"{name}: speed"].value / rows[f"{PEER}: speed"].value)
        assert ratio.comparison == f"target >= {target} on an H200"
        assert ratio.verdict in ("reached", "missed") and not ratio.failed


def test_without_diffusers_our_steps_are_timed_alone(without_diffusers):
    rows = values(step.images(TINY, CPU, Clock(60)))
    assert rows[PEER] == skipped(PEER, "diffusers is not installed")
    assert f"{OURS}: step, median" in rows
    assert not any("times the speed" in name for name in rows)


def test_steps_that_would_exceed_the_time_limit_are_skipped():
    rows = values(step.images(TINY, CPU, Clock(0)))
    assert {name for name in rows if "first pass" not in name} >= {"steps"}
    assert not any("median" in name for name in rows)
    assert rows["steps"].verdict.startswith("skipped: 3 rounds")


def test_the_others_are_timed_if_one_runs_out_of_memory(monkeypatch):
    build = step.our_trainee

    def greedy(*args, memory=None):
        if memory == fused("none"):
            raise torch.OutOfMemoryError("too much")
        return build(*args)

    monkeypatch.setattr(step, "our_trainee", greedy)
    rows = values(step.images(TINY, CPU, Clock(60)))
    assert rows[LEAN] == skipped(LEAN, "out of memory")
    assert f"{OURS}: times the speed of {PEER}" in rows


def test_a_step_trains_the_adapter_and_nothing_else():
    contestant = step.Contestant("ours", our_trainee(SHAPE, TINY, CPU))
    before = {name: tensor.clone() for name, tensor in contestant.trainee.model.state_dict().items()}
    contestant.step(random_inputs(TINY, TINY.image, CPU))
    after = contestant.trainee.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert len(changed) == 2 * 8 * SHAPE.num_layers


def test_memory_between_steps_is_the_weights_and_two_moments_per_parameter():
    contestant = step.Contestant("ours", our_trainee(SHAPE, TINY, CPU))
    contestant.step(random_inputs(TINY, TINY.image, CPU))
    parameters = contestant.trainee.parameters
    weights = sum(tensor.nbytes for tensor in contestant.trainee.model.state_dict().values())
    moments = sum(2 * parameter.nbytes + 4 for parameter in parameters)  # and a step count each
    assert contestant.resident == weights + moments


def test_the_default_sizes_are_a_bucket_of_the_trainer_at_its_token_limit():
    full = Sizes()
    frames, height, width = full.video
    assert max_frames(8 * width, 8 * height, 10_000, GRID) == 4 * (frames - 1) + 1
    assert count_tokens(full.video) == tokens_of(832, 480, 21, GRID) == 9360
    assert count_tokens(full.image) == 1024


def counts_attention() -> bool:
    x = torch.ones(1, 1, 4, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    return counter.get_total_flops() > 0


@pytest.mark.skipif(not counts_attention(), reason="this torch does not count attention on the CPU")
def test_the_counted_operations_are_those_of_the_model():
    shape, grid = replace(SHAPE, dim=96, ffn_dim=480, num_layers=4, text_len=128), (4, 16, 16)
    sizes = Sizes(shape=shape, rank=4, text_tokens=10)
    trainee = our_trainee(shape, sizes, CPU, torch.float32, memory=Memory("none"))
    inputs = random_inputs(sizes, grid, CPU)
    # torch counts the backward pass of a fused kernel as 2.5 forwards, as the formula does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        trainee.loss(inputs).backward()
    assert step_flops(shape, count_tokens(grid), sizes.rank) == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_a_step_of_ten_thousand_tokens_takes_the_operations_of_the_performance_model():
    assert step_flops(WanShape(), 10_000, 16) == pytest.approx(118.5e12, rel=0.01)


def test_the_vae_needs_neither_peft_nor_diffusers():
    blocked = "import sys; sys.modules['peft'] = sys.modules['diffusers'] = None; import benchmarks.checks.vae"
    subprocess.run([sys.executable, "-c", blocked], cwd=gpu_check.ROOT, check=True)


def test_the_vae_is_timed_and_its_bf16_latents_are_compared():
    rows = values(vae.check(TINY, CPU, Clock(60)))
    assert rows["encode, fp32"].value > 0 and rows["encode, bf16"].value > 0
    assert rows["encode, fp32"].comparison == "5 frames of 16x16"
    for name, most in (("fp32", 1e-4), ("bf16", 1e-1)):
        row = rows[f"encode, {name}, channels last"]
        assert row.value > 0 and float(row.comparison.split()[-1]) < most
    assert 1e-4 < rows["bf16: relative error of the latents"].value < 0.1


def test_the_environment_check_reports_the_attention_kernel_and_the_speeds():
    rows = values(environment.check(TINY, CPU, Clock(60)))
    assert rows["torch"].value == torch.__version__
    assert rows["attention kernel"].value == "ScaledDotProductFlashAttentionForCpu"
    assert rows["bf16 matrix product"].value > 0
    assert rows["copy on the device"].value > 0


def test_attention_without_a_fused_kernel_is_reported_as_math():
    q, k, v = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        assert environment.attention_kernel(attention(q, k, v)) == "math"


def wait(times: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(times):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    return step


def test_each_wait_in_a_step_is_counted_and_the_first_one_located():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = synchronisations.count("step", wait(2), CPU, limit=1)
        free = synchronisations.count("step", wait(2), CPU)
        none = synchronisations.count("step", wait(0), CPU, limit=0)
    assert row.value == 2 and row.failed
    assert re.fullmatch(r"limit 1; first at test_gpu_check\.py:\d+", row.comparison)
    assert free.value == 2 and not free.failed
    assert none.value == 0 and none.verdict == "ok"


def test_steps_in_a_row_are_timed_together():
    taken = []
    assert 0 <= synchronisations.in_a_row(lambda: taken.append(1), CPU) < 1
    assert len(taken) == synchronisations.IN_A_ROW


def test_the_training_scripts_own_functions_take_the_steps_in_which_waits_are_counted(tmp_path, monkeypatch):
    computed, training_loss = [], train_wan_lora.training_loss

    def counted_loss(*args, **kwargs):
        computed.append(training_loss(*args, **kwargs))
        return computed[-1]

    monkeypatch.setattr(train_wan_lora, "training_loss", counted_loss)
    trainee = our_trainee(SHAPE, TINY, CPU)
    updater, inputs = step.Contestant("ours", trainee).updater, random_inputs(TINY, TINY.video, CPU)
    for number, take_step in enumerate(synchronisations.script_steps(TINY, trainee, updater, inputs, tmp_path), 1):
        before = trainee.parameters[0].clone()
        take_step()
        assert not torch.equal(before, trainee.parameters[0])
        assert len(computed) == number


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SHAPES", dict.fromkeys(step.SHAPES, SHAPE))


@pytest.mark.parametrize("group", [step.long, step.of_5b, step.of_14b])
def test_longer_clips_and_larger_models_take_fewer_steps(small_shapes, group):
    rows = values(group(TINY, CPU, Clock(60)))
    assert "2 steps of 18 tokens" in rows["fused, full: step, median"].comparison
    assert f"fused, full: times the speed of {PEER}" in rows
    assert ("depth" in rows) == (group is not step.long)


@pytest.mark.parametrize(("group", "tokens"), [(stream.offload, 12), (stream.offload_long, 18)])
def test_inputs_in_main_memory_are_timed_against_those_that_stay(group, tokens):
    rows = values(group(TINY, CPU, Clock(60)))
    assert f"of {tokens} tokens" in rows["fused, offload: step, median"].comparison
    assert rows["fused, offload: times the speed of fused, full"].value > 0
    assert rows["fused, offload: exposed transfer"].value == 0
    assert "fused, full: exposed transfer" not in rows


def test_the_link_to_main_memory_is_only_measured_on_a_gpu():
    assert list(stream.link(TINY, CPU, Clock(60))) == [skipped("link", "no GPU")]


@pytest.mark.parametrize(("group", "tokens"), [(plan.check, 12), (plan.long, 18)])
def test_what_auto_chooses_is_told_for_each_size_of_a_gpu(group, tokens):
    rows = values(group(TINY, CPU, Clock(60)))
    for name in ("1 GB", "the whole device"):
        assert rows[f"{name}: chosen"].value == "2 none"
        assert rows[f"{name}: chosen"].comparison.startswith(f"{tokens} tokens")
        assert rows[f"{name}: predicted peak"].value > 0 and rows[f"{name}: forecast peak"].value > 0
        assert rows[f"{name}: steps that fit"].verdict == "ok"


def test_steps_that_do_not_fit_after_the_choice_fail(monkeypatch):
    def greedy(contestant, inputs):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(step.Contestant, "step", greedy)
    rows = values(plan.check(TINY, CPU, Clock(60)))
    row = rows["1 GB: steps that fit"]
    assert row.failed and row.value == 0
    assert "the whole device: chosen" in rows


def test_a_size_of_a_gpu_in_which_nothing_fits_is_skipped(monkeypatch):
    monkeypatch.setattr(plan, "measure_room", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too much")))
    rows = values(plan.check(TINY, CPU, Clock(60)))
    assert rows["1 GB"].verdict.startswith("skipped: out of memory")


def test_inside_a_limit_the_gpu_has_no_more_memory_than_that(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with plan.capped(20, torch.device("cuda")):
        assert fractions == [0.25]
    assert fractions == [0.25, 1.0]

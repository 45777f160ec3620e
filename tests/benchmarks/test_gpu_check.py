"""The GPU check, with its own functions, on a small model on the CPU."""

import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_wan_lora
from benchmarks import gpu_check
from benchmarks.checks import environment, numbers, step, synchronisations, vae
from benchmarks.measure import FAILED, Clock, Row, Sizes, at_least, count_tokens, p90, skipped
from benchmarks.models import our_trainee, random_inputs, step_flops
from tests.limits import GRID
from utils.data.buckets import count_tokens as tokens_of
from utils.data.buckets import max_frames
from utils.training.memory import Memory
from wan.modules.attention import attention
from wan.modules.model import WanShape

CPU = torch.device("cpu")
SHAPE = WanShape(dim=48, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, text_len=24, freq_dim=32)
TINY = Sizes(
    shape=SHAPE,
    reference_layers=2,
    vae_dim=8,
    rank=4,
    text_tokens=10,
    video=(2, 4, 6),
    image=(1, 4, 4),
    clip=(5, 16, 16),
    gemm_side=32,
    warmups=1,
    steps=3,
)
OURS, LEAN, PEER = "ours, checkpointing", "ours, no checkpointing", step.PEER


def values(rows: Iterator[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


@pytest.fixture
def without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)


@pytest.fixture(scope="module")
def compared() -> dict[str, Row]:
    return values(numbers.check(TINY, CPU, Clock(60)))


def test_bf16_of_ours_and_of_diffusers_agrees_with_fp32_on_the_same_weights(compared):
    assert compared["depth"].value == 2
    for name in ("ours", "ours, bf16 residual", "diffusers + PEFT"):
        assert 0 < compared[f"{name}: relative loss difference"].value < 1e-2
        worst = compared[f"{name}: worst cosine of one matrix"].value
        assert 0.99 < worst < compared[f"{name}: cosine of all LoRA gradients"].value < 1


def test_only_the_cosine_of_ours_has_a_limit(compared):
    judged = {name for name, row in compared.items() if row.verdict}
    assert judged == {"ours: cosine of all LoRA gradients"}
    assert compared["ours: cosine of all LoRA gradients"].verdict == "ok"


def test_rounding_the_residual_stream_changes_the_numbers(compared):
    label = "relative loss difference"
    assert compared[f"ours: {label}"].value != compared[f"ours, bf16 residual: {label}"].value


def test_wrong_gradients_fail_the_limit(monkeypatch):
    measure = numbers._measure
    losses = []

    def flipped(build, inputs):
        loss, grads = measure(build, inputs)
        losses.append(loss)
        return loss, grads if len(losses) == 1 else [-grad for grad in grads]

    monkeypatch.setattr(numbers, "_measure", flipped)
    rows = values(numbers.check(TINY, CPU, Clock(60)))
    assert rows["ours: cosine of all LoRA gradients"].failed


def test_nan_misses_its_limit():
    assert at_least("x", float("nan"), 0.5).failed
    assert not at_least("x", 0.5, 0.5).failed


def test_without_diffusers_ours_is_still_compared_with_fp32(without_diffusers):
    rows = values(numbers.check(TINY, CPU, Clock(60)))
    assert rows["diffusers + PEFT"] == skipped("diffusers + PEFT", "diffusers is not installed")
    assert rows["ours: cosine of all LoRA gradients"].verdict == "ok"


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
    assert rows.keys() == {"steps"}
    assert rows["steps"].verdict.startswith("skipped: 3 rounds")


def test_the_others_are_timed_if_one_runs_out_of_memory(monkeypatch):
    build = step.our_trainee

    def greedy(*args, memory=None):
        if memory == Memory("none"):
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


def fake_check(monkeypatch: pytest.MonkeyPatch, name: str, check: Callable) -> None:
    monkeypatch.setattr(f"benchmarks.checks.{name}.check", check)


def test_an_exception_in_a_check_becomes_a_row_and_the_other_checks_run(monkeypatch, capsys):
    def broken(sizes, device, clock):
        yield Row("before", 1.0)
        raise ValueError("no such thing\nand more")

    fake_check(monkeypatch, "numbers", broken)
    fake_check(monkeypatch, "vae", lambda *_: iter([Row("fine", 2.0)]))
    rows = gpu_check.run_checks(("numbers", "vae"), TINY, CPU, Clock(60))
    assert rows == [
        ("numbers", Row("before", 1.0)),
        ("numbers", Row("numbers", verdict=f"{FAILED}: ValueError: no such thing")),
        ("vae", Row("fine", 2.0)),
    ]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "verdict"), [("peft.x", "skipped: peft.x is not installed"), ("wan.x", FAILED)])
def test_a_check_is_skipped_for_a_missing_package_but_fails_for_one_of_our_own(monkeypatch, name, verdict):
    def lacking(sizes, device, clock):
        raise ModuleNotFoundError("gone", name=name)

    fake_check(monkeypatch, "vae", lacking)
    [(_, row)] = gpu_check.run_checks(("vae",), TINY, CPU, Clock(60))
    assert row.verdict.startswith(verdict)


def test_a_check_that_runs_out_of_memory_is_skipped(monkeypatch):
    def greedy(sizes, device, clock):
        raise torch.OutOfMemoryError("too much")

    fake_check(monkeypatch, "vae", greedy)
    [(_, row)] = gpu_check.run_checks(("vae",), TINY, CPU, Clock(60))
    assert row == skipped("vae", "out of memory")


def test_at_the_time_limit_the_running_check_stops_and_the_others_are_skipped(monkeypatch):
    def slow(sizes, device, clock):
        yield Row("before", 1.0)
        time.sleep(20)

    fake_check(monkeypatch, "vae", slow)
    start = time.monotonic()
    rows = gpu_check.run_checks(("vae", "environment"), TINY, CPU, Clock(0.3))
    assert time.monotonic() - start < 5
    assert [name for name, _ in rows] == ["vae", "vae", "environment"]
    assert rows[1][1].verdict == rows[2][1].verdict == "skipped: the time limit of 0 s has passed"


def test_every_check_exists():
    for module, function in gpu_check.CHECKS.values():
        assert callable(getattr(sys.modules[f"benchmarks.checks.{module}"], function))


def test_the_record_is_a_table_with_date_machine_commit_and_command(monkeypatch):
    monkeypatch.setattr(gpu_check, "commit", lambda folder: "abc1234")
    text = gpu_check.format_record([("vae", Row("a | b", 0.123456789, "s", "limit >= 1", FAILED))], "H200", "python x")
    heading, command, *table = [line for line in text.splitlines() if line]
    assert re.fullmatch(r"### \d{4}-\d\d-\d\d, H200, commit abc1234", heading)
    assert command == "`python x`"
    assert table[2] == "| vae | a / b | 0.123457 | s | limit >= 1 | failed |"
    assert len({line.count("|") for line in table}) == 1


def test_the_commit_is_unknown_outside_a_checkout(tmp_path):
    assert gpu_check.commit(tmp_path) == "unknown"
    assert gpu_check.commit(tmp_path / "missing") == "unknown"


def test_p90_is_near_the_slowest_of_ten():
    assert p90([float(n) for n in range(1, 12)]) == 10


def test_main_exits_with_1_only_if_a_row_failed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--quick", "--only", "vae"])
    seen = []

    def run_checks(names, sizes, device, clock):
        seen.append((names, sizes, clock.limit))
        return [("vae", Row("x", verdict=verdict))]

    monkeypatch.setattr(gpu_check, "run_checks", run_checks)
    verdict = "missed"
    gpu_check.main()
    assert "`python benchmarks/gpu_check.py --quick --only vae`" in capsys.readouterr().out
    assert seen == [(("vae",), gpu_check.QUICK, 120)]
    verdict = FAILED
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 1


def test_without_a_gpu_the_script_says_so_and_exits_0(tmp_path):
    script = Path(gpu_check.__file__)
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "no CUDA GPU here: nothing was measured\n"

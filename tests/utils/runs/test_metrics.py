"""What a run logs, when it reads it, and when its numbers end it."""

import json
import math

import pytest
import torch

import utils.runs.metrics
from tests.runs import log, open_a_run, scalars
from utils.common.errors import RunError
from utils.diffusion.objectives import Loss
from utils.runs.metrics import FEWEST, Losses, Metrics
from utils.runs.run import Run
from utils.training.learner import Update


@pytest.fixture
def run(tmp_path):
    with open_a_run(tmp_path) as run:
        yield run


def test_every_step_is_in_tensorboard(tmp_path):
    with open_a_run(tmp_path) as run:
        for loss in (4.0, 2.0, 3.0):
            log(run, loss, grad_norm=10 * loss)
        run.metrics.flush()
    found = scalars(run.folder)
    assert run.step == 3
    assert found["train/loss"] == {1: 4.0, 2: 2.0, 3: 3.0}
    assert found["train/grad_norm"] == {1: 40.0, 2: 20.0, 3: 30.0}
    assert found["train/learning_rate"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert found["speed/seconds_per_step"][3] > 0 and found["speed/tokens_per_second"][3] > 0


def test_the_smooth_loss_is_an_unbiased_running_mean(run):
    assert math.isnan(run.metrics.means().loss)
    losses = [4.0, 2.0, 3.0]
    for loss in losses:
        log(run, loss)
    run.metrics.flush()
    weights = [0.98**2, 0.98, 1.0]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert run.metrics.means().loss == pytest.approx(expected, rel=1e-6)


def test_steps_wait_on_the_device_until_about_a_second_has_passed(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(utils.runs.metrics.time, "perf_counter", lambda: now[0])
    run.metrics.restart_clock()
    log(run, 4.0)
    assert math.isnan(run.metrics.means().loss)
    now[0] += 1.5
    log(run, 2.0)
    assert run.metrics.means().loss == pytest.approx((0.98 * 4 + 2) / 1.98)


def test_speed_leaves_out_validation_and_saving(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(utils.runs.metrics.time, "perf_counter", lambda: now[0])
    with open_a_run(tmp_path) as run:
        log(run, 4.0)
        now[0] += 0.5
        run.metrics.flush()
        now[0] += 100
        run.metrics.log_validation({"train": Losses(torch.ones(2), (0.1, 0.9))})
        for seconds in (0.25, 0.125):
            log(run, 4.0)
            now[0] += seconds
            run.metrics.flush()
    found = scalars(run.folder)
    assert found["speed/seconds_per_step"] == {1: 0.5, 2: 0.25, 3: 0.125}
    assert found["speed/tokens_per_second"] == {1: 200, 2: 400, 3: 800}


def test_validation_writes_each_sigma_and_the_mean(tmp_path, capsys):
    with open_a_run(tmp_path) as run:
        log(run, 4.0)
        run.metrics.log_validation({"train": Losses(torch.tensor([0.5, 1.5]), (0.1, 0.9))})
    found = scalars(run.folder)
    assert found["val/loss"] == {1: 1.0}
    assert found["val/loss_sigma_0.1"] == {1: 0.5} and found["val/loss_sigma_0.9"] == {1: 1.5}
    assert found["train/loss"] == {1: 4.0}
    assert "step 1: validation loss 1.0000  (by sigma 0.1: 0.5000, 0.9: 1.5000)" in "".join(capsys.readouterr())


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_one_step_that_is_not_finite_is_reported_counted_and_left_out(tmp_path, capsys, loss, grad_norm):
    with open_a_run(tmp_path) as run:
        log(run, 4.0)
        log(run, loss, grad_norm)
        log(run, 4.0)
        run.metrics.flush()
    found = scalars(run.folder)
    assert found["train/loss"] == {1: 4.0, 3: 4.0} and run.metrics.means().loss == pytest.approx(4.0)
    assert list(found["train/learning_rate"]) == [1, 2, 3] and run.step == 3
    said = "".join(capsys.readouterr())
    assert said.count("not finite, the update was skipped") == 1 and "step 2: loss" in said


def test_steps_that_are_not_finite_only_count_in_a_row(run):
    for loss in [math.nan, math.nan, 1.0] * 3:
        log(run, loss)
    run.metrics.flush()


def test_the_share_of_clipped_steps_is_logged(tmp_path):
    with open_a_run(tmp_path, max_grad_norm=1.0) as run:
        for norm in (0.5, 2.0, 0.5, 3.0):
            log(run, 1.0, norm)
        run.metrics.flush()
    shares = scalars(run.folder)["train/clipped_share"]
    assert shares[1] == 0 and 0.45 < shares[4] < 0.55


def test_events_that_cannot_be_written_are_reported_once_and_the_run_continues(run, monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.metrics.board._writer, "add_scalar", full)
    for _ in range(3):
        log(run, 1.0)
        run.metrics.flush()
    assert run.save()[0].exists()
    assert capsys.readouterr().out.count("the run continues without them: [Errno 28] No space left on device") == 1


def test_a_step_is_validated_once_also_after_a_resume(run):
    log(run, 1.0)
    assert not run.metrics.is_validated
    run.metrics.log_validation({"train": Losses(torch.ones(2), (0.1, 0.9))})
    assert run.metrics.is_validated
    saved = run.metrics.state_dict()
    again = Metrics(run.folder, total_steps=10, step=1)
    assert not again.is_validated
    again.load_state_dict(saved)
    assert again.is_validated
    again.end_step(tokens=1)
    assert not again.is_validated
    again.close()


def test_a_step_has_previews_once_their_sheet_is_written(run):
    log(run, 1.0)
    assert not run.metrics.has_previews
    run.metrics.log_previews([("a fox", torch.zeros(1, 3, 16, 16, dtype=torch.uint8))], fps=16)
    assert run.metrics.has_previews
    log(run, 1.0)
    assert not run.metrics.has_previews


def test_each_phase_has_its_own_means_under_its_own_name(tmp_path):
    with open_a_run(tmp_path, max_grad_norm=1.0) as run:
        for loss, phase, norm in ((4.0, "high_noise", 2.0), (1.0, "low_noise", 0.5), (2.0, "high_noise", 2.0)):
            log(run, loss, norm, phase)
        run.metrics.flush()
    found = scalars(run.folder)
    assert found["high_noise/loss"] == {1: 4.0, 3: 2.0} and found["low_noise/loss"] == {2: 1.0}
    assert found["high_noise/loss_smooth"][3] == pytest.approx((0.98 * 4 + 2) / 1.98)
    assert found["low_noise/loss_smooth"] == {2: pytest.approx(1.0)}
    assert found["high_noise/clipped_share"][3] == pytest.approx(1.0) and found["low_noise/clipped_share"] == {2: 0.0}
    assert math.isnan(run.metrics.means().loss) and not any(tag.startswith("train/") for tag in found)


def test_the_bar_shows_the_loss_of_the_phase_in_turn(run):
    shown = []
    for loss, phase in ((4.0, "train"), (3.0, "high_noise"), (1.0, "low_noise"), (3.0, "high_noise")):
        log(run, loss, phase=phase)
        run.metrics.flush()
        shown.append(run.metrics.bar.postfix.split(",")[0])
    assert shown == ["loss 4.0000", "high_noise loss 3.0000", "low_noise loss 1.0000", "high_noise loss 3.0000"]


def test_steps_that_are_not_finite_count_in_a_row_whatever_their_phase(run):
    for phase in ("high_noise", "low_noise", "high_noise"):
        log(run, math.nan, phase=phase)
    with pytest.raises(RunError, match="3 steps in a row were not finite"):
        run.metrics.flush()


def test_the_phases_of_a_step_are_validated_together_and_named(tmp_path, capsys):
    high, low = Losses(torch.tensor([1.0, 2.0]), (0.9, 0.95)), Losses(torch.tensor([0.25, 0.75]), (0.1, 0.5))
    with open_a_run(tmp_path) as run:
        log(run, 4.0)
        run.metrics.log_validation({"high_noise": high, "low_noise": low})
        assert run.metrics.is_validated
    found = scalars(run.folder)
    assert found["val/high_noise/loss"] == {1: 1.5} and found["val/high_noise/loss_sigma_0.95"] == {1: 2.0}
    assert found["val/low_noise/loss"] == {1: 0.5} and found["val/low_noise/loss_sigma_0.1"] == {1: 0.25}
    assert "val/loss" not in found
    said = "".join(capsys.readouterr())
    assert "step 1: validation loss of high_noise 1.5000  (by sigma 0.9: 1.0000, 0.95: 2.0000)" in said
    assert "step 1: validation loss of low_noise 0.5000  (by sigma 0.1: 0.2500, 0.5: 0.7500)" in said


def test_the_means_of_each_phase_are_restored(run):
    for loss, phase in ((4.0, "high_noise"), (1.0, "low_noise"), (math.nan, "low_noise")):
        log(run, loss, phase=phase)
    run.metrics.flush()
    saved = json.loads(json.dumps(run.metrics.state_dict()))
    again = Metrics(run.folder, total_steps=10, step=3)
    again.load_state_dict(saved)
    again.close()
    assert again.state_dict() == saved and again.means("high_noise") == run.metrics.means("high_noise")
    assert saved["means"].keys() == {"high_noise", "low_noise"} and saved["bad_steps"] == 1


# ------------------------------------------------------------------------------------------- a student and its critic


def log_critic(run: Run, loss: float, limit: float) -> None:
    """A step of a critic, whose loss would be the limit if it answered zero."""
    run.metrics.log("critic", Loss(torch.tensor(loss), torch.tensor(limit)), Update(torch.tensor(1.0), 0.5))
    run.metrics.end_step(tokens=1)


def test_what_is_watched_beside_a_loss_is_in_tensorboard_under_its_phase(tmp_path):
    with open_a_run(tmp_path) as run:
        for distance in (0.25, None, 0.5):  # in the second step the student is not due
            if distance is not None:
                loss = Loss(torch.tensor(4.0), watched={"distance": torch.tensor(distance)})
                run.metrics.log("student", loss, Update(torch.tensor(1.0), 0.5))
            log_critic(run, 1.0, 2.0)
        run.metrics.flush()
    found = scalars(run.folder)
    assert found["student/distance"] == {1: 0.25, 3: 0.5} and found["student/loss"] == {1: 4.0, 3: 4.0}
    assert found["critic/loss"] == dict.fromkeys((1, 2, 3), 1.0)
    assert found["critic/loss_limit"] == dict.fromkeys((1, 2, 3), 2.0)
    assert "student/loss_limit" not in found and "critic/distance" not in found


def test_a_critic_that_was_never_better_than_an_answer_of_zero_has_not_diverged(run):
    for _ in range(3 * FEWEST):
        log_critic(run, 2.5, 1.25)
    run.metrics.flush()
    assert run.metrics.means("critic").loss == pytest.approx(2.5)


def test_a_few_good_steps_are_not_yet_a_critic_that_was_better(run):
    for _ in range(FEWEST - 1):
        log_critic(run, 0.5, 1.25)
    for _ in range(FEWEST):
        log_critic(run, 25.0, 1.25)
    run.metrics.flush()
    assert run.metrics.means("critic").below == 0


def test_a_student_whose_updates_are_not_finite_ends_the_run_although_its_critic_learns(run):
    for _ in range(3):
        log(run, math.nan, phase="student")
        log_critic(run, 1.0, 2.0)
    with pytest.raises(RunError, match="3 steps in a row were not finite"):
        run.metrics.flush()


def test_a_loss_that_is_large_but_below_its_limit_or_has_none_ends_nothing(run):
    for step in range(3 * FEWEST):
        log_critic(run, 99.0, 100.0)
        log(run, 1e6, phase="student")
        log_critic(run, 101.0 if step % 3 else 0.0, 100.0)  # its mean counts
    run.metrics.flush()
    assert run.metrics.means("critic").weight > 1 - 0.98**FEWEST


def test_a_critic_that_begins_to_diverge_late_ends_the_run_when_its_mean_does(run):
    for _ in range(50):
        log_critic(run, 0.5, 1.0)
    run.metrics.flush()
    smooth = run.metrics.means("critic")
    steps = 0
    with pytest.raises(RunError, match="the critic diverges"):
        while steps < 100:
            log_critic(run, 1.5, 1.0)
            steps += 1
            run.metrics.flush()
    # 0.5 (0.98^n (1 - 0.98^50)) + 1.5 (1 - 0.98^n) passes 1 - 0.98^(n + 50) after n = 25 steps.
    assert steps == 25 and smooth.loss == pytest.approx(0.5)


def test_a_resumed_run_knows_that_the_critic_was_better(run):
    for _ in range(FEWEST):
        log_critic(run, 0.5, 1.25)
    run.metrics.flush()
    again = Metrics(run.folder, total_steps=99, step=FEWEST)
    again.load_state_dict(json.loads(json.dumps(run.metrics.state_dict())))
    again.log("critic", Loss(torch.tensor(250.0), torch.tensor(1.25)), Update(torch.tensor(1.0), 0.5))
    with pytest.raises(
        RunError, match="the critic diverges: its mean loss is .*, and would be 1.250 if it answered zero"
    ):
        again.flush()
    again.close()


def test_means_of_earlier_versions_have_no_limit_and_go_on(run):
    former = {"smooth": 0.08, "weight": 0.02, "clipped": 0.0}
    run.metrics.load_state_dict({"bad_steps": 0, "validated_at": -1, "means": {"train": former}})
    assert run.metrics.means().loss == pytest.approx(4.0) and run.metrics.means().limit == 0.0
    log(run, 2.0)
    run.metrics.flush()
    assert run.metrics.means().loss == pytest.approx((0.98 * 4 + 2) / 1.98) and not run.metrics.means().diverges


def test_the_variety_of_students_is_logged_and_said_and_a_collapse_ends_the_run(tmp_path, capsys):
    with open_a_run(tmp_path) as run:
        log(run, 4.0)
        run.metrics.log_validation({}, {"high_noise_student": 0.25, "low_noise_student": 1.5})
        log(run, 4.0)
        with pytest.raises(RunError, match="step 2: the low_noise_student has collapsed: .* 1.50 .* now 0.25"):
            run.metrics.log_validation({}, {"high_noise_student": 1.0, "low_noise_student": 0.2499})
        assert run.metrics.is_validated
        with pytest.raises(RunError, match="the student has collapsed"):
            run.metrics.log_validation({}, {"student": math.nan})
    assert scalars(run.folder)["val/low_noise_student/variety"] == pytest.approx({1: 1.5, 2: 0.2499})
    said = "".join(capsys.readouterr())
    assert "step 1: samples of the high_noise_student differ 0.25 times as much as the teacher's" in said


def test_a_student_that_differs_little_before_it_learns_has_not_collapsed_until_it_has_lost_that(run):
    for share in (0.08, 0.021, 0.4, 0.11):
        run.metrics.log_validation({}, {"student": share})
    again = Metrics(run.folder, total_steps=99)
    again.load_state_dict(json.loads(json.dumps(run.metrics.state_dict())))
    with pytest.raises(RunError, match="the student has collapsed: its samples differed 0.40 times .* now 0.09 times"):
        again.log_validation({}, {"student": 0.09})
    again.close()

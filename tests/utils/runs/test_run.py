"""A run's folder, its numbers, its checkpoints, and when it gives up."""

import json
import math
import signal
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import utils.runs.run
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_reader import read_lora
from utils.common.errors import RunError, UserError
from utils.common.signals import Stop
from utils.media.probing import MediaError
from utils.runs.run import Run, open_run, resume_command, save_on_exit
from utils.runs.state import State

NAMES = ["state-00000001.safetensors", "wan-lora-00000001.safetensors"]


@pytest.fixture
def frozen_clock(monkeypatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(utils.runs.run, "datetime", Clock)


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path, 10, '{"seed": 42}') as run:
        yield run


def log(run: Run, loss: float, grad_norm: float = 1.0, idle: int = 0) -> None:
    run.log(torch.tensor(loss), torch.tensor(grad_norm), torch.tensor(float(idle)), learning_rate=0.5, tokens=100)


def make_lora(value: float = 1.0) -> LoraFile:
    pair = LoraPair(torch.full((2, 4), value), torch.ones(6, 2), 2.0)
    return LoraFile({"blocks.0.self_attn.q": pair}, metadata={"step": "1"})


def save(run: Run, value: float = 1.0) -> Path:
    return run.save(make_lora(value), None, Path.touch)


class Learnt:
    """As much of a learner as there is in a run without a model: it is as far as the run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.in_mid_update = False

    @property
    def steps(self) -> int | None:
        return None if self.in_mid_update else self.run.step


def keeping(run: Run, learner: Learnt | None = None, stop: Stop | None = None) -> AbstractContextManager:
    return save_on_exit(run, learner or Learnt(run), stop or Stop(), partial(save, run))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar TensorBoard would show: tag -> step -> value."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


# ------------------------------------------------------------------------------------------------------------ folder


def test_a_run_has_a_dated_folder_with_its_options(run):
    datetime.strptime(run.folder.name, "%Y-%m-%d_%H-%M-%S")
    assert json.loads((run.folder / "command_args.json").read_text()) == {"seed": 42}
    assert run.checkpoints.is_dir() and run.step == 0


def test_runs_of_the_same_second_get_a_number(tmp_path, frozen_clock):
    names = []
    for _ in range(3):
        with open_run(tmp_path / "deep" / "outputs", 10, "{}") as run:
            names.append(run.folder.name)
    assert names == ["2026-01-02_03-04-05", "2026-01-02_03-04-05-2", "2026-01-02_03-04-05-3"]


def test_an_output_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="output_dir") as caught:
            open_run(output_dir, 10, "{}")
        assert str(tmp_path / "file") in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- metrics


def test_every_step_is_in_tensorboard(tmp_path):
    with open_run(tmp_path, 10, "{}") as run:
        for loss in (4.0, 2.0, 3.0):
            log(run, loss, grad_norm=10 * loss)
        run.flush()
    found = scalars(run.folder)
    assert run.step == 3
    assert found["train/loss"] == {1: 4.0, 2: 2.0, 3: 3.0}
    assert found["train/grad_norm"] == {1: 40.0, 2: 20.0, 3: 30.0}
    assert found["train/learning_rate"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert found["speed/seconds_per_step"][3] > 0 and found["speed/tokens_per_second"][3] > 0


def test_the_smooth_loss_is_an_unbiased_running_mean(run):
    assert math.isnan(run.smooth_loss)
    losses = [4.0, 2.0, 3.0]
    for loss in losses:
        log(run, loss)
    run.flush()
    weights = [0.98**2, 0.98, 1.0]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert run.smooth_loss == pytest.approx(expected, rel=1e-6)


def test_steps_wait_on_the_device_until_about_a_second_has_passed(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(utils.runs.run.time, "perf_counter", lambda: now[0])
    run._restart_clock()
    log(run, 4.0)
    assert math.isnan(run.smooth_loss)
    now[0] += 1.5
    log(run, 2.0)
    assert run.smooth_loss == pytest.approx((0.98 * 4 + 2) / 1.98)


def test_speed_leaves_out_validation_and_saving(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(utils.runs.run.time, "perf_counter", lambda: now[0])
    with open_run(tmp_path, 10, "{}") as run:
        log(run, 4.0)
        now[0] += 0.5
        run.flush()
        now[0] += 100
        run.log_validation(torch.ones(2), (0.1, 0.9))
        for seconds in (0.25, 0.125):
            log(run, 4.0)
            now[0] += seconds
            run.flush()
    found = scalars(run.folder)
    assert found["speed/seconds_per_step"] == {1: 0.5, 2: 0.25, 3: 0.125}
    assert found["speed/tokens_per_second"] == {1: 200, 2: 400, 3: 800}


def test_validation_writes_each_sigma_and_the_mean(tmp_path, capsys):
    with open_run(tmp_path, 10, "{}") as run:
        log(run, 4.0)
        run.log_validation(torch.tensor([0.5, 1.5]), (0.1, 0.9))
    found = scalars(run.folder)
    assert found["val/loss"] == {1: 1.0}
    assert found["val/loss_sigma_0.1"] == {1: 0.5} and found["val/loss_sigma_0.9"] == {1: 1.5}
    assert found["train/loss"] == {1: 4.0}
    assert "step 1: validation loss 1.0000  (by sigma 0.1: 0.5000, 0.9: 1.5000)" in "".join(capsys.readouterr())


# ---------------------------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_one_step_that_is_not_finite_is_told_counted_and_left_out(tmp_path, capsys, loss, grad_norm):
    with open_run(tmp_path, 10, "{}") as run:
        log(run, 4.0)
        log(run, loss, grad_norm)
        log(run, 4.0)
        run.flush()
    found = scalars(run.folder)
    assert found["train/loss"] == {1: 4.0, 3: 4.0} and run.smooth_loss == pytest.approx(4.0)
    assert list(found["train/learning_rate"]) == [1, 2, 3] and run.step == 3
    said = "".join(capsys.readouterr())
    assert said.count("not finite, the update was skipped") == 1 and "step 2: loss" in said


def test_steps_that_are_not_finite_only_count_in_a_row(run):
    for loss in [math.nan, math.nan, 1.0] * 3:
        log(run, loss)
    run.flush()


def test_three_in_a_row_end_the_run_and_name_the_last_checkpoint(run):
    log(run, 1.0)
    path = save(run)
    for _ in range(3):
        log(run, math.nan)
    with pytest.raises(RunError) as caught:
        run.flush()
    assert str(caught.value) == (
        f"3 steps in a row were not finite; try a lower --learning_rate\nthe last checkpoint is {path}"
    )


def test_three_in_a_row_without_a_checkpoint_say_so_also_when_read_apart(run):
    with pytest.raises(RunError, match="no checkpoint was written yet"):
        for _ in range(3):
            log(run, math.nan)
            run.flush()
    assert run.step == 3


def test_a_lora_that_stays_zero_ends_the_run(run):
    log(run, 1.0)
    log(run, 1.0, idle=3)
    with pytest.raises(RunError, match="after 2 steps 3 matrices of the LoRA are still zero"):
        run.flush()


def test_the_share_of_clipped_steps_is_logged(tmp_path):
    with open_run(tmp_path, 10, "{}", max_grad_norm=1.0) as run:
        for norm in (0.5, 2.0, 0.5, 3.0):
            log(run, 1.0, norm)
        run.flush()
    shares = scalars(run.folder)["train/clipped_share"]
    assert shares[1] == 0 and 0.45 < shares[4] < 0.55


def test_an_interrupted_run_saves_what_it_has_learnt(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        open_run(tmp_path, 10, "{}") as run,
        keeping(run),
    ):
        log(run, 1.0)
        raise KeyboardInterrupt
    assert sorted(path.name for path in run.checkpoints.iterdir()) == NAMES
    assert scalars(run.folder)["train/loss"] == {1: 1.0}


def test_the_resume_command_is_the_one_that_started_the_run(tmp_path):
    folder = tmp_path / "my runs" / "a"
    started = ["train_wan_lora.py", "--dataset", "clips", "--seed", "7"]
    expected = f"python train_wan_lora.py --dataset clips --seed 7 --resume_from_checkpoint '{folder}'"
    assert resume_command(started, folder) == expected
    again = [*started[:3], "--resume_from_checkpoint", "latest", *started[3:]]
    assert resume_command(again, folder) == expected
    assert resume_command([*started, "--resume_from_checkpoint=latest"], folder) == expected


def test_a_clip_that_became_unreadable_ends_the_run_with_what_is_left(run):
    log(run, 1.0)
    path = save(run)
    with pytest.raises(RunError) as caught, keeping(run):
        raise MediaError(Path("clips/fox.mp4"), "not a readable video")
    assert str(caught.value) == f"clips/fox.mp4: not a readable video\nthe last checkpoint is {path}"


def test_a_gpu_that_fills_up_in_mid_run_costs_nothing_of_what_was_learnt(run):
    log(run, 1.0)
    with pytest.raises(RunError, match="fewer tokens") as caught, keeping(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    (path,) = run.checkpoints.glob("wan-lora-*")
    assert str(path) in str(caught.value)


DIED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


def test_a_loading_process_that_dies_in_the_middle_of_a_step_costs_nothing_of_what_was_learnt(run):
    log(run, 1.0)
    with pytest.raises(RunError, match="loading the next clips failed: DataLoader worker") as caught, keeping(run):
        raise DIED
    assert str(run.last_saved) in str(caught.value)


def test_a_loading_process_that_is_stopped_with_the_run_is_no_failure(run, capsys):
    log(run, 1.0)
    stop = Stop()
    stop.asked = True
    with pytest.raises(KeyboardInterrupt), keeping(run, stop=stop):
        raise DIED
    assert run.last_saved.exists() and "go on with: " in capsys.readouterr().out


def test_an_error_of_the_program_itself_is_not_taken_for_one_of_the_loader(run):
    log(run, 1.0)
    with pytest.raises(RuntimeError, match="shapes"), keeping(run):
        raise RuntimeError("shapes do not match")


def test_what_is_interrupted_in_the_middle_of_an_update_is_not_saved(run, capsys):
    log(run, 1.0)
    learner = Learnt(run)
    learner.in_mid_update = True
    with pytest.raises(KeyboardInterrupt), keeping(run, learner):
        raise KeyboardInterrupt
    assert not list(run.checkpoints.iterdir())
    said = capsys.readouterr().out
    assert "in the middle of an update, which is not saved" in said and "go on with" not in said


def test_saving_what_is_learnt_is_not_interrupted_again(run):
    log(run, 1.0)

    def slowly() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        save(run)

    with pytest.raises(KeyboardInterrupt), save_on_exit(run, Learnt(run), Stop(), slowly):
        raise KeyboardInterrupt
    assert run.last_saved.exists()


def test_events_that_cannot_be_written_are_told_once_and_the_run_goes_on(run, monkeypatch, capsys):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.board._writer, "add_scalar", full)
    for _ in range(3):
        log(run, 1.0)
        run.flush()
    assert save(run).exists()
    assert capsys.readouterr().out.count("the run goes on without: [Errno 28] No space left on device") == 1


def test_a_run_that_went_bad_writes_no_checkpoint(run):
    for _ in range(3):
        log(run, math.nan)
    with pytest.raises(RunError):
        save(run)
    assert not list(run.checkpoints.iterdir())


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_named_by_its_step_and_holds_the_lora(run):
    log(run, 1.0)
    path = save(run)
    assert path == run.checkpoints / "wan-lora-00000001.safetensors"
    lora = read_lora(path)
    assert lora.metadata["step"] == "1"
    assert torch.equal(lora.pairs["blocks.0.self_attn.q"].down, torch.ones(2, 4))


def test_pruning_keeps_the_newest_and_leaves_other_peoples_files_alone(run):
    others = ["wan-lora-best.safetensors", "wan-lora-00000009_comfy.safetensors", "state-old.safetensors"]
    for name in others:
        (run.checkpoints / name).touch()
    for _ in range(4):
        log(run, 1.0)
        save(run)
    (run.checkpoints / "wan-lora-00000002-ema.safetensors").touch()
    own = [f"{kind}-0000000{step}.safetensors" for kind in ("state", "wan-lora") for step in (3, 4)]
    run.prune(2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(own + others)
    run.prune(0)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(own + others)


def test_a_run_that_goes_on_from_an_earlier_state_sets_later_files_aside(tmp_path, capsys):
    with open_run(tmp_path, 10, "{}") as run:
        for _ in range(3):
            log(run, 1.0)
            save(run)
    (run.checkpoints / ".wan-lora-00000003.77.partial.safetensors").touch()
    state = State(run.checkpoints / "state-00000001.safetensors", run.facts | {"step": 1})
    with open_run(tmp_path, 10, "{}", state=state) as again:
        assert again.last_saved == run.checkpoints / "wan-lora-00000001.safetensors"
        assert sorted(path.name for path in again.checkpoints.iterdir()) == ["aside-1", *NAMES]
    aside = {path.name for path in (run.checkpoints / "aside-1").iterdir()}
    assert aside == {f"{kind}-0000000{step}.safetensors" for kind in ("state", "wan-lora") for step in (2, 3)}
    assert "moved 4 files of later steps to" in capsys.readouterr().out


def test_a_run_folder_on_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device"):
        open_run(tmp_path, 10, "{}")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matrices_that_are_not_finite_are_not_saved(run, bad):
    log(run, 1.0)
    good = save(run)
    log(run, 1.0)
    with pytest.raises(RunError, match="not finite") as caught:
        save(run, bad)
    assert list(run.checkpoints.glob("wan-lora-*")) == [good] and str(good) in str(caught.value)

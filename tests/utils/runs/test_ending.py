"""However a run ends early, what it has learned is saved first."""

import math
import signal
from pathlib import Path

import pytest
import torch

from tests.runs import log, open_a_run, scalars
from utils.common.errors import OutOfMemory, RunError
from utils.common.signals import Stop
from utils.media.probing import MediaError
from utils.runs.ending import resume_command, save_on_exit

NAMES = ["state-00000001.safetensors", "wan-lora-00000001.safetensors"]
DIED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.fixture
def run(tmp_path):
    with open_a_run(tmp_path) as run:
        yield run


def test_three_steps_in_a_row_that_are_not_finite_end_the_run_and_name_the_last_checkpoint(run):
    log(run, 1.0)
    (path,) = run.save()
    with pytest.raises(RunError) as caught, save_on_exit(run, Stop()):
        for _ in range(3):
            log(run, math.nan)
        run.metrics.flush()
    assert str(caught.value) == (
        f"3 steps in a row were not finite; try a lower learning rate\nthe last checkpoint is {path}"
    )


def test_three_in_a_row_without_a_checkpoint_say_so_also_when_read_apart(run):
    with pytest.raises(RunError, match="no checkpoint was written yet"), save_on_exit(run, Stop()):
        for _ in range(3):
            log(run, math.nan)
            run.metrics.flush()
    assert run.step == 3


def test_a_lora_that_stays_zero_ends_the_run_and_is_not_saved(run):
    for parameter in run.learner.trainables["lora"].adapter.parameters.values():
        parameter.data.zero_()
    reason = "after 10 updates 2 matrices of the lora are still zero"
    with pytest.raises(RunError, match=reason) as caught, save_on_exit(run, Stop()):
        for _ in range(11):
            run.learner.begin_step()
            for parameter in run.learner.trainables["lora"].adapter.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            run.learner.update("lora", 1.0)
    assert "no checkpoint was written yet" in str(caught.value) and not list(run.checkpoints.iterdir())


def test_an_interrupted_run_saves_what_it_has_learned(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        open_a_run(tmp_path) as run,
        save_on_exit(run, Stop()),
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
    (path,) = run.save()
    with pytest.raises(RunError) as caught, save_on_exit(run, Stop()):
        raise MediaError(Path("clips/fox.mp4"), "not a readable video")
    assert str(caught.value) == f"clips/fox.mp4: not a readable video\nthe last checkpoint is {path}"


def test_a_gpu_that_fills_up_in_mid_run_costs_nothing_of_what_was_learned(run):
    log(run, 1.0)
    with pytest.raises(RunError, match="fewer tokens") as caught, save_on_exit(run, Stop()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    (path,) = run.checkpoints.glob("wan-lora-*")
    assert str(path) in str(caught.value)


def test_a_loading_process_that_dies_in_the_middle_of_a_step_costs_nothing_of_what_was_learned(run):
    log(run, 1.0)
    with (
        pytest.raises(RunError, match="loading the next clips failed: DataLoader worker") as caught,
        save_on_exit(run, Stop()),
    ):
        raise DIED
    assert str(run.last_saved_files[0]) in str(caught.value)


def test_a_loading_process_that_is_stopped_with_the_run_is_no_failure(run, capsys):
    log(run, 1.0)
    stop = Stop()
    stop.requested = True
    with pytest.raises(KeyboardInterrupt), save_on_exit(run, stop):
        raise DIED
    assert run.last_saved_files[0].exists() and "resume with: " in capsys.readouterr().out


def test_an_error_of_the_program_itself_is_not_taken_for_one_of_the_loader(run):
    log(run, 1.0)
    with pytest.raises(RuntimeError, match="shapes"), save_on_exit(run, Stop()):
        raise RuntimeError("shapes do not match")


def test_what_is_interrupted_in_the_middle_of_an_update_is_not_saved(run, capsys):
    log(run, 1.0)
    with pytest.raises(KeyboardInterrupt), save_on_exit(run, Stop()):
        run.learner.begin_step(num_updates=2)
        for parameter in run.learner.trainables["lora"].adapter.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        run.learner.update("lora", 1.0)  # the other update of this step never comes
        raise KeyboardInterrupt
    assert not list(run.checkpoints.iterdir())
    said = capsys.readouterr().out
    assert "in the middle of an update, which is not saved" in said and "resume with" not in said


def test_saving_what_is_learned_is_not_interrupted_again(run, monkeypatch):
    log(run, 1.0)
    save = run.save

    def slowly() -> list[Path]:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        return save()

    monkeypatch.setattr(run, "save", slowly)
    with pytest.raises(KeyboardInterrupt), save_on_exit(run, Stop()):
        raise KeyboardInterrupt
    assert run.last_saved_files[0].exists()


@pytest.mark.parametrize("requested", [False, True])
def test_a_full_gpu_ends_the_run_with_what_is_left_of_it_unless_it_was_asked_to_stop(run, requested, capsys):
    log(run, 1.0)
    stop = Stop()
    stop.requested = requested
    with pytest.raises(KeyboardInterrupt if requested else OutOfMemory) as caught, save_on_exit(run, stop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == NAMES
    if requested:
        assert "resume with: " in capsys.readouterr().out
    else:
        assert caught.value.run_folder == run.folder
        assert caught.value.reason.startswith("CUDA out of memory\nthe last checkpoint is ")


def test_a_run_without_a_checkpoint_starts_again_where_the_gpu_is_full(run):
    with pytest.raises(OutOfMemory) as caught, save_on_exit(run, Stop()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert caught.value.run_folder is None

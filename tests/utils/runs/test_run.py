"""A run's folder and its checkpoints."""

import json
import math
from datetime import datetime
from pathlib import Path

import pytest
import torch

from tests.model_lists import header_of, size_of
from tests.runs import log, open_a_run, settings, small_learner, take_step
from utils.adapters.lora_reader import read_lora
from utils.common.checkpoint_names import EXPERTS
from utils.common.errors import RunError, UserError
from utils.common.options import parse_options
from utils.common.signals import Stop
from utils.runs.ending import save_on_exit
from utils.runs.run import RunOptions, open_run
from utils.runs.state import read_state
from wan.configs import FAMILIES

NAMES = ["state-00000001.safetensors", "wan-lora-00000001.safetensors"]


@pytest.fixture
def run(tmp_path):
    with open_a_run(tmp_path) as run:
        yield run


def test_a_run_has_a_dated_folder_with_its_options(run):
    datetime.strptime(run.folder.name, "%Y-%m-%d_%H-%M-%S")
    assert json.loads((run.folder / "command_args.json").read_text()) == {"seed": 42}
    assert run.checkpoints.is_dir() and run.step == 0


def test_a_run_that_went_bad_writes_no_checkpoint(run):
    for _ in range(3):
        log(run, math.nan)
    with pytest.raises(RunError):
        run.save()
    assert not list(run.checkpoints.iterdir())


def test_a_checkpoint_is_named_by_its_step_and_holds_the_lora(run):
    log(run, 1.0)
    (path,) = run.save()
    assert path == run.checkpoints / "wan-lora-00000001.safetensors"
    lora = read_lora(path)
    assert lora.metadata["steps"] == "1" and lora.metadata["base_model"] == "model"
    assert torch.equal(lora.pairs["blocks.0.self_attn.q"].down, torch.ones(2, 4))


def test_a_run_that_resumes_from_an_earlier_state_archives_later_files(tmp_path, capsys):
    with open_a_run(tmp_path) as run:
        for _ in range(3):
            log(run, 1.0)
            run.save()
    (run.checkpoints / ".wan-lora-00000003.77.partial.safetensors").touch()
    state = read_state(run.checkpoints / "state-00000001.safetensors")
    with open_a_run(tmp_path, state) as again:
        assert again.last_saved_files == [run.checkpoints / "wan-lora-00000001.safetensors"]
        assert sorted(path.name for path in again.checkpoints.iterdir()) == ["aside-1", *NAMES]
    aside = {path.name for path in (run.checkpoints / "aside-1").iterdir()}
    assert aside == {f"{kind}-0000000{step}.safetensors" for kind in ("state", "wan-lora") for step in (2, 3)}
    assert "moved 4 files of later steps to" in capsys.readouterr().out


def test_a_run_folder_on_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device"):
        open_a_run(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matrices_that_are_not_finite_are_not_saved(run, bad):
    log(run, 1.0)
    (good,) = run.save()
    log(run, 1.0)
    run.learner.trainables["lora"].adapter.parameters["down"].data.fill_(bad)
    with pytest.raises(RunError, match="not finite") as caught, save_on_exit(run, Stop()):
        run.save()
    assert list(run.checkpoints.glob("wan-lora-*")) == [good] and str(good) in str(caught.value)


def test_a_period_is_due_at_its_multiples_and_at_the_last_step(run):
    assert run.is_due(3) and not run.is_due(0)
    due = []
    for step in range(1, 11):
        run.learner.step = step
        due.append((run.is_due(4), run.is_due(0)))
    assert [step for step, (periodic, _) in enumerate(due, 1) if periodic] == [4, 8, 10]
    assert [step for step, (_, never) in enumerate(due, 1) if never] == [10]


def test_a_step_is_saved_once_when_it_is_due(run):
    assert not run.saving_is_due(1, minutes=0)  # there is nothing at step 0
    log(run, 1.0)
    assert run.saving_is_due(1, minutes=0) and not run.saving_is_due(2, 0, minutes=0)
    run.save()
    assert not run.saving_is_due(1, minutes=0)
    with open_a_run(run.folder.parent, read_state(run.checkpoints / "state-00000001.safetensors")) as again:
        assert not again.saving_is_due(1, minutes=0)


def test_previews_of_later_steps_are_archived_with_the_checkpoints(tmp_path):
    with open_a_run(tmp_path) as run:
        for _ in range(2):
            log(run, 1.0)
            run.save()
            run.metrics.log_previews([("a fox", torch.zeros(1, 3, 16, 16, dtype=torch.uint8))], fps=16)
    (run.folder / "samples" / "notes.txt").touch()
    with open_a_run(tmp_path, read_state(run.checkpoints / "state-00000001.safetensors")) as again:
        names = {path.name for path in (again.folder / "samples").iterdir()}
    assert names == {"00000001.png", "00000001-01.mp4", "notes.txt"}
    assert {"00000002.png", "00000002-01.mp4"} < {path.name for path in (run.checkpoints / "aside-1").iterdir()}


def test_a_checkpoint_has_the_average_of_each_trainable_and_its_own_values(tmp_path):
    learner = small_learner(EXPERTS, ema_decay=0.9)
    take_step(learner)
    with open_run(settings(tmp_path), learner) as run:
        run.save()
        names = {path.name for path in run.checkpoints.iterdir()}
    kinds = {f"wan-lora-00000001{average}_{name}.safetensors" for name in EXPERTS for average in ("", "-ema")}
    assert names == {*kinds, "state-00000001.safetensors"}
    for name, trainable in learner.trainables.items():
        values = {"": trainable.adapter.parameters, "-ema": trainable.ema.values}
        for average, expected in values.items():
            (pair,) = read_lora(run.checkpoints / f"wan-lora-00000001{average}_{name}.safetensors").pairs.values()
            assert torch.equal(pair.down, expected["down"]) and torch.equal(pair.up, expected["up"])
        assert not torch.equal(trainable.ema.values["down"], trainable.adapter.parameters["down"])


def test_a_resumed_run_continues_the_means_of_the_saved_one(run):
    for loss in (4.0, 2.0):
        log(run, loss)
    run.save()
    with open_a_run(run.folder.parent, read_state(run.checkpoints / "state-00000002.safetensors")) as again:
        assert again.metrics.means() == run.metrics.means() and again.metrics.step == 2


def test_the_pair_of_two_experts_is_one_checkpoint_and_each_file_says_which_it_is(tmp_path, capsys):
    chosen = settings(tmp_path, name="fox")
    learner = small_learner(EXPERTS, ema_decay=0.9)
    take_step(learner)
    with open_run(chosen, learner) as run:
        assert run.last_saved_files == []
        files = run.save()
    assert files == [run.checkpoints / f"fox-00000001_{name}.safetensors" for name in EXPERTS]
    assert f"step 1: saved {files[0]} and fox-00000001_low_noise.safetensors\n" in capsys.readouterr().out
    assert f"the last checkpoint is {files[0]} and {files[1].name}" in str(run.failure("no more"))
    for name in EXPERTS:
        for average in ("", "-ema"):
            path = run.checkpoints / f"fox-00000001{average}_{name}.safetensors"
            assert read_lora(path).metadata["expert"] == name
    state = read_state(run.checkpoints / "state-00000001.safetensors")
    with open_run(chosen, small_learner(EXPERTS, ema_decay=0.9), state) as again:
        assert again.last_saved_files == files and not again.saving_is_due(1, minutes=0)
    files[1].unlink()
    with open_run(chosen, small_learner(EXPERTS, ema_decay=0.9), state) as again:
        assert again.last_saved_files == [] and again.saving_is_due(1, minutes=0)


def test_the_file_of_a_single_lora_says_nothing_of_experts(run):
    log(run, 1.0)
    (path,) = run.save()
    metadata = read_lora(path).metadata
    assert {"steps", "base_model"} <= metadata.keys() and not {"expert", "modelspec.timestep_range"} & metadata.keys()


def test_the_checkpoint_of_a_step_shows_its_first_preview_but_no_average_does(tmp_path):
    learner = small_learner(EXPERTS, ema_decay=0.9)
    video = torch.zeros(3, 3, 32, 48, dtype=torch.uint8)
    with open_run(settings(tmp_path, name="fox"), learner) as run:
        for step in (1, 2):
            take_step(learner)
            run.metrics.end_step(tokens=1)
            if step == 1:
                run.log_previews([("a fox", video), ("a wolf", video[:, :, :16])], fps=16)
            run.save()
        shown = {path.name: header_of(path)[0] for path in run.checkpoints.glob("fox-*")}
    assert len(shown) == 8 and (run.folder / "samples" / "00000001-02.mp4").exists()
    for name, metadata in shown.items():
        is_shown = name.startswith("fox-00000001_")
        assert size_of(metadata.get("modelspec.thumbnail", "")) == ((48, 32) if is_shown else None), name
        assert metadata["modelspec.date"] == run.folder.name[:10]
        assert ("moving average" in metadata["modelspec.title"]) == ("-ema_" in name)


def test_a_run_of_the_earlier_form_of_names_continues(tmp_path):
    with open_run(settings(tmp_path, name="fox"), small_learner(EXPERTS)) as run:
        for _ in range(3):
            log(run, 1.0)
            for path in run.save():
                step, _, expert = path.stem.removeprefix("fox-").partition("_")
                path.rename(path.with_name(f"fox_{expert}-{step}.safetensors"))
    state = read_state(run.checkpoints / "state-00000002.safetensors")
    with open_run(settings(tmp_path, name="fox"), small_learner(EXPERTS), state) as again:
        former = [run.checkpoints / f"fox_{expert}-00000002.safetensors" for expert in EXPERTS]
        assert again.last_saved_files == former and not again.saving_is_due(1, minutes=0)
        aside = {path.name for path in (run.checkpoints / "aside-1").glob("fox*")}
        assert aside == {f"fox_{expert}-00000003.safetensors" for expert in EXPERTS}
        log(again, 1.0)
        again.save()
        again.prune(2)
    names = {path.name for path in again.checkpoints.glob("fox*")}
    assert names == {path.name for path in former} | {f"fox-00000003_{expert}.safetensors" for expert in EXPERTS}


def test_a_run_that_resumes_under_another_name_keeps_what_it_had_and_archives_later_files_of_both(tmp_path):
    with open_run(settings(tmp_path, name="fox"), small_learner()) as run:
        for _ in range(3):
            log(run, 1.0)
            run.save()
    others = ["character-20251125.safetensors", "fox-00000003_comfy.safetensors"]
    for name in others:
        (run.checkpoints / name).touch()
    state = read_state(run.checkpoints / "state-00000002.safetensors")
    with open_run(settings(tmp_path, name="wolf"), small_learner(), state) as again:
        log(again, 1.0)
        again.save()
        again.prune(1)
    names = {path.name for path in again.checkpoints.iterdir() if path.is_file()}
    fox = {"fox-00000001.safetensors", "fox-00000002.safetensors"}
    assert names == {*others, *fox, "wolf-00000003.safetensors", "state-00000003.safetensors"}
    aside = {path.name for path in (again.checkpoints / "aside-1").iterdir()}
    assert aside == {"fox-00000003.safetensors", "state-00000003.safetensors"}


def test_a_name_that_cannot_be_is_found_among_the_options():
    assert parse_options(RunOptions, ["--name", "fox"]).name == "fox"
    with pytest.raises(UserError, match="--name 'a/b' names files"):
        parse_options(RunOptions, ["--name", "a/b"]).check_names()
    yellow = parse_options(RunOptions, ["--name", "yellow"])
    yellow.check_names()
    yellow.check_name_for(FAMILIES["wan2.1-t2v-14B"])
    with pytest.raises(UserError, match="--name 'yellow' holds 'low'.* Try --name yell0w"):
        yellow.check_name_for(FAMILIES["wan2.2-t2v-A14B"])
    with pytest.raises(UserError, match="--trigger is empty"):
        parse_options(RunOptions, ["--trigger", " ,"]).check_names()

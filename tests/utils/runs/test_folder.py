"""How a run's folder is named, and which of its files stay."""

from datetime import datetime

import pytest

import utils.runs.folder
from tests.runs import log, open_a_run, settings, small_learner
from utils.common.checkpoint_names import EXPERTS
from utils.common.errors import UserError
from utils.runs.folder import day_of, names_used, new_folder, prune
from utils.runs.run import open_run


@pytest.fixture
def run(tmp_path):
    with open_a_run(tmp_path) as run:
        yield run


@pytest.fixture
def frozen_clock(monkeypatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(utils.runs.folder, "datetime", Clock)


def test_runs_of_the_same_second_get_a_number(tmp_path, frozen_clock):
    names = []
    for _ in range(3):
        with open_a_run(tmp_path / "deep" / "outputs") as run:
            names.append(run.folder.name)
    assert names == ["2026-01-02_03-04-05", "2026-01-02_03-04-05-2", "2026-01-02_03-04-05-3"]


def test_an_output_folder_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="output_dir") as caught:
            open_a_run(output_dir)
        assert str(tmp_path / "file") in str(caught.value)


def test_pruning_keeps_the_newest_and_leaves_other_peoples_files_alone(run):
    others = ["wan-lora-best.safetensors", "wan-lora-00000009_comfy.safetensors", "state-old.safetensors"]
    others += ["fox-00000001.safetensors", "fox-00000009_high_noise.safetensors"]
    for name in others:
        (run.checkpoints / name).touch()
    for _ in range(4):
        log(run, 1.0)
        run.save()
    (run.checkpoints / "wan-lora-00000002-ema.safetensors").touch()
    own = [f"{kind}-0000000{step}.safetensors" for kind in ("state", "wan-lora") for step in (3, 4)]
    run.prune(2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(own + others)
    run.prune(0)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(own + others)


def test_pruning_keeps_the_pairs_of_the_newest_steps(tmp_path):
    with open_run(settings(tmp_path, name="fox"), small_learner(EXPERTS)) as run:
        for _ in range(3):
            log(run, 1.0)
            run.save()
    run.prune(2)
    kept = {f"fox-0000000{step}_{expert}.safetensors" for expert in EXPERTS for step in (2, 3)}
    kept |= {f"state-0000000{step}.safetensors" for step in (2, 3)}
    assert {path.name for path in run.checkpoints.iterdir()} == kept


def test_pruning_knows_the_earlier_form_of_names_and_a_run_that_is_called_like_one(tmp_path):
    names = [f"fox_{expert}-00000001{average}.safetensors" for expert in EXPERTS for average in ("", "-ema")]
    names += ["fox-00000002_high_noise.safetensors", "wolf_high_noise-00000001.safetensors"]
    for name in names:
        (tmp_path / name).touch()
    prune(tmp_path, 1, "fox")
    assert {path.name for path in tmp_path.iterdir()} == set(names[-2:])
    (tmp_path / "wolf_high_noise-00000002.safetensors").touch()
    prune(tmp_path, 1, "wolf_high_noise")
    assert {path.name for path in tmp_path.iterdir()} == {names[-2], "wolf_high_noise-00000002.safetensors"}


def test_the_day_of_a_run_is_in_the_name_of_its_folder(tmp_path, frozen_clock):
    folders = [new_folder(tmp_path) for _ in range(2)]
    assert [day_of(folder) for folder in folders] == ["2026-01-02"] * 2
    for name in ("mine", "2026-13-02_00-00-00", "2026-01-02", ""):
        assert day_of(tmp_path / name) == ""


def test_the_names_that_a_run_has_used_are_those_of_its_options_and_the_old_one_where_there_was_no_option(tmp_path):
    files = {"": '{"output_name": "fox"}', "-00000100": '{"name": "wolf"}', "-00000200": '{"seed": 42}'}
    files |= {"-00000300": '{"name": ["bear"]}', "-00000400": "[]", "-00000500": "{", "-00000600": "[" * 100_000}
    for suffix, text in files.items():
        (tmp_path / f"command_args{suffix}.json").write_text(text)
    (tmp_path / "command_args-00000700.json").mkdir()
    assert names_used(tmp_path) == {"fox", "wolf", "wan-lora"}

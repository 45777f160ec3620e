"""How a run's folder is named, and which of its files stay."""

from datetime import datetime

import pytest

import utils.runs.folder
from tests.runs import log, open_a_run
from utils.common.errors import UserError


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

"""An experiment that was interrupted continues, and one that is finished is not repeated."""

from pathlib import Path

import pytest

import train_wan_lora
from tests.experiments import PAIR, experiment_folder, once, trained


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trainer(calls: list[list[str]], name: str):
    """Stands for the trainer: writes the LoRAs and the state of step 300 into a run, unless it resumes another."""

    def main(arguments: list[str]) -> None:
        calls.append(arguments)
        folder = Path("runs") / name / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("state-00000300", "wan-lora-00000300_high_noise", "wan-lora-00000300_low_noise"):
            (folder / f"{file}.safetensors").touch()

    return main


def test_a_run_is_resumed_where_it_has_a_state(monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr(train_wan_lora, "main", trainer(calls, "a"))
    found = trained("--max_train_steps 150", PAIR)
    assert found == {name: Path(f"runs/a/checkpoints/wan-lora-00000300_{name}.safetensors") for name in PAIR}
    assert trained("--max_train_steps 150", PAIR) == found
    assert ["--resume_from_checkpoint" in call for call in calls] == [False, True]
    assert calls[0] == calls[1][: len(calls[0])]


@pytest.mark.parametrize("other", ["0", "b"])
def test_a_run_that_was_killed_before_its_first_state_is_left_alone(monkeypatch, other):
    """Its LoRAs are written before its state, and an unfinished state has another name."""
    calls: list[list[str]] = []
    killed = Path("runs") / other / "checkpoints"
    killed.mkdir(parents=True)
    names = ("wan-lora-00000050_high_noise", "wan-lora-00000050_low_noise", ".state-00000050.1.partial")
    for name in names:
        (killed / f"{name}.safetensors").touch()
    monkeypatch.setattr(train_wan_lora, "main", trainer(calls, "a"))
    assert {path.parent.parent.name for path in trained("", PAIR).values()} == {"a"}
    assert "--resume_from_checkpoint" not in calls[0]


def test_what_is_measured_is_kept(capsys):
    figures = {"before": {"motion": 0.25}}
    assert once(lambda: figures) == figures
    assert once(lambda: pytest.fail("measured again")) == figures
    assert capsys.readouterr().out.split() == 2 * ["before:", "motion", "0.25"]


def test_a_folder_belongs_to_a_commit_and_an_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.experiments.ROOT", tmp_path)
    monkeypatch.setattr("tests.experiments.commit", lambda root: "1234567 with local changes 89abcde")
    folder = experiment_folder("one", tmp_path)
    assert folder.is_dir() and folder.parts[-2:] == ("1234567_with_local_changes_89abcde", "one")
    monkeypatch.setattr("tests.experiments.commit", lambda root: "unknown")
    assert experiment_folder("one", tmp_path) == tmp_path


def test_what_several_experiments_need_is_measured_once_in_a_folder_of_its_own(folder):
    measured = []
    for _ in range(2):
        figures = once(lambda: measured.append(1) or {"teacher": {"speed": 2.0}}, Path("shared") / "teacher")
        assert figures == {"teacher": {"speed": 2.0}}
    assert measured == [1] and not Path("figures.json").exists()

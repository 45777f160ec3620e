"""Which state a run is resumed from: of a run that with the highest step, of several runs the one trained last."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.runs import FACTS, small_learner
from utils.common.errors import UserError
from utils.common.tensor_files import file_metadata, write_tensors
from utils.runs.state import MEANS, find_state, write_state

METRICS = {"bad_steps": 0, "validated_at": -1, "means": {}}
OLD, LATER = "2026-01-01_00-00-00", "2026-01-02_00-00-00"


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs of two states each, one written after the other in the order of their steps and dates."""
    learner = small_learner()
    for hour, (run, step) in enumerate([(OLD, 100), (OLD, 200), (LATER, 10), (LATER, 20)]):
        path = state_of(tmp_path, run, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        learner.step = step
        write_state(path, learner.state_dict(), FACTS, METRICS)
        date(path, hour)
    return tmp_path


def state_of(runs: Path, run: str, step: int) -> Path:
    return runs / run / "checkpoints" / f"state-{step:08d}.safetensors"


def date(path: Path, hour: int) -> None:
    os.utime(path, (hour * 3600, hour * 3600))


def latest(runs: Path) -> tuple[str, int]:
    state = find_state("latest", runs)
    return state.run_folder.name, state.step


def test_latest_is_the_highest_step_of_the_run_that_was_trained_last(runs):
    assert latest(runs) == (LATER, 20)


def test_an_older_state_that_was_touched_or_restored_does_not_win(runs):
    date(state_of(runs, LATER, 10), 50)
    assert latest(runs) == (LATER, 20)
    date(state_of(runs, OLD, 100), 60)  # nor does its run
    assert latest(runs) == (LATER, 20)


def test_a_run_that_was_resumed_later_wins_whatever_its_folder_is_called(runs):
    date(state_of(runs, OLD, 200), 50)
    assert latest(runs) == (OLD, 200)
    (runs / OLD).rename(runs / "my run")
    assert latest(runs) == ("my run", 200)


def test_of_runs_of_the_same_time_the_later_folder_wins(runs):
    date(state_of(runs, OLD, 200), 3)
    assert latest(runs) == (LATER, 20)
    (runs / LATER).rename(runs / "2025-12-31_00-00-00")
    assert latest(runs) == (OLD, 200)


def test_the_step_is_what_the_file_holds_and_not_what_it_is_called(runs):
    own = state_of(runs, LATER, 20)
    for copy in ("state-00000900.safetensors", "state-00000020 (1).safetensors", "state-zzz.safetensors"):
        shutil.copy(state_of(runs, LATER, 10), own.with_name(copy))
    assert find_state("latest", runs).path == own
    shutil.copy(own, own.with_name("state-99999999 (1).safetensors"))
    assert find_state("latest", runs).path == own  # of a copy and the original the original


def test_a_damaged_state_is_skipped_where_its_name_places_it(runs, capsys):
    state_of(runs, LATER, 30).write_bytes(b"cut short")
    state_of(runs, LATER, 5).write_bytes(b"cut short")
    assert latest(runs) == (LATER, 20)
    said = capsys.readouterr().out
    assert "skipped: " in said and "state-00000030" in said and "state-00000005" not in said


def test_a_run_without_a_usable_state_gives_way_to_the_one_before(runs, capsys):
    for step in (10, 20):
        state_of(runs, LATER, step).write_bytes(b"cut short")
    assert latest(runs) == (OLD, 200)
    assert capsys.readouterr().out.count("skipped: ") == 2
    shutil.rmtree(runs / OLD)
    with pytest.raises(UserError, match="there is no usable training state in"):
        find_state("latest", runs)


@pytest.mark.parametrize("step", [21, 19])
def test_a_link_to_nothing_is_skipped_and_does_not_date_its_run(runs, capsys, step):
    state_of(runs, LATER, step).symlink_to("gone")
    assert latest(runs) == (LATER, 20)
    assert ("skipped: " in capsys.readouterr().out) == (step == 21)
    for each in (10, 20):
        state_of(runs, LATER, each).unlink()
    assert latest(runs) == (OLD, 200)


def test_a_state_that_is_removed_meanwhile_is_skipped(runs, monkeypatch):
    glob = Path.glob

    def and_remove(folder, pattern):
        found = list(glob(folder, pattern))
        state_of(runs, LATER, 20).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", and_remove)
    assert latest(runs) == (LATER, 10)


@pytest.mark.parametrize("path", [("step",), ("learner", "step"), ("metrics", "bad_steps"), ("metrics", "means", "x")])
@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_skipped(runs, capsys, path, number):
    last = state_of(runs, LATER, 30)
    content = json.loads(file_metadata(state_of(runs, LATER, 20))["facts"])
    if path == ("step",):
        content |= {"learner": None, "step": 0}
    if path[-1] == "x":
        content["metrics"]["means"]["x"] = dict.fromkeys(MEANS, "NUMBER")
    else:
        (content[path[0]] if path[1:] else content)[path[-1]] = "NUMBER"
    write_tensors(last, {}, {"facts": json.dumps(content).replace('"NUMBER"', number)})
    assert latest(runs) == (LATER, 20)
    if "step" not in path:
        assert "state-00000030.safetensors is not a training state" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_of_a_run_that_is_named_the_highest_step_is_resumed(runs, below):
    date(state_of(runs, OLD, 100), 50)
    assert find_state(str(runs / OLD / below), runs).step == 200
    assert find_state(str(state_of(runs, OLD, 100)), runs).step == 100


def test_a_name_that_is_not_there_such_as_those_of_other_trainers_is_answered_with_what_to_give(runs):
    with pytest.raises(UserError, match="in checkpoint-50: it does not exist; give latest, or the folder of a run"):
        find_state("checkpoint-50", runs)

"""The options of a run are found from any file in its folder, the newest first."""

from pathlib import Path

import pytest

from utils.common.run_options import options_name, options_of_run, read_options


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / options_name()).write_text('{"seed": 1}')
    for step, text in ((2, '{"seed": 2}'), (10, "{"), (9, "[1]"), (7, "9" * 9), (700, "[" * 100_000)):
        (tmp_path / options_name(step)).write_text(text)
    (tmp_path / options_name(800)).mkdir()
    return tmp_path


def test_the_newest_come_first_and_damaged_ones_are_passed_over(run):
    assert read_options(run) == [{"seed": 2}, {"seed": 1}]
    assert read_options(run / "nowhere") == []


def test_those_of_a_file_are_of_the_nearest_run_up_to_its_folder_of_files_that_were_moved_aside(run):
    for place in ("", "checkpoints", "checkpoints/aside-1"):
        assert options_of_run(run / place / "fox.safetensors") == [{"seed": 2}, {"seed": 1}]
    assert options_of_run(run / "a" / "b" / "c" / "fox.safetensors") == []
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / options_name(3)).write_text("[]")
    assert options_of_run(run / "checkpoints" / "fox.safetensors") == []

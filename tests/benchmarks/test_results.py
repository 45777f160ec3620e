"""The file of what has been measured."""

import json

import pytest

from benchmarks.measure import FAILED, Row
from benchmarks.results import Results

RUN = ("abc1234", "a GPU", "full")
ROWS = [Row("speed", 1.5, "x", "limit >= 1", "ok"), Row("kernel", "flash"), Row("nothing", verdict=f"{FAILED}: so")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results" / "gpu.jsonl"


def write(path, group, rows, complete=True, run=RUN):
    results = Results(path, run)
    results.begin(group)
    for row in rows:
        results.add(group, row)
    if complete:
        results.end(group)


def test_a_later_process_reads_what_was_written(path):
    write(path, "a", ROWS)
    write(path, "b", ROWS[:1], complete=False)
    read = Results(path, RUN)
    assert read.rows == {"a": ROWS, "b": ROWS[:1]}
    assert read.complete == {"a"}
    assert read.attempts == {"b": 1}


def test_another_commit_device_or_size_has_nothing_yet(path):
    write(path, "a", ROWS)
    for run in (("abc1235", *RUN[1:]), (RUN[0], "another", RUN[2]), (*RUN[:2], "quick")):
        read = Results(path, run)
        assert not read.rows and not read.complete


def test_a_group_that_is_begun_again_starts_empty(path):
    write(path, "a", ROWS, complete=False)
    write(path, "a", ROWS[:1], complete=False)
    assert Results(path, RUN).attempts == {"a": 2}
    write(path, "a", ROWS[1:])
    read = Results(path, RUN)
    assert (read.rows, read.complete, read.attempts) == ({"a": ROWS[1:]}, {"a"}, {})


def test_a_row_is_in_the_file_when_it_has_been_measured(path):
    results = Results(path, RUN)
    results.begin("a")
    results.add("a", ROWS[0])
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["row"] == {"name": "speed", "value": 1.5, "unit": "x", "comparison": "limit >= 1", "verdict": "ok"}


def test_a_line_that_was_cut_off_costs_that_line_alone(path):
    write(path, "a", ROWS)
    write(path, "b", ROWS[:2], complete=False)
    path.write_text(path.read_text()[:-20])
    write(path, "c", ROWS)
    read = Results(path, RUN)
    assert read.rows == {"a": ROWS, "b": ROWS[:1], "c": ROWS}

"""The parts of a step, on a tiny model, and the ledger by itself."""

import threading
import time
from pathlib import Path

import pytest

import train_wan_lora
from benchmarks import bookkeeping
from benchmarks.bookkeeping import (
    COLLATE,
    GRADIENTS,
    LOAD,
    LOG,
    OPTIMIZER,
    PARTS,
    RANDOM,
    RELEASE,
    REST,
    WHOLE,
    Ledger,
    Options,
)
from tests.tiny import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_every_part_of_a_step_takes_time_and_all_of_them_add_up_to_the_step(model):
    before = train_wan_lora.take_step
    runs = bookkeeping.measure(Options(model, runs=2, steps=3, warmup=1))
    assert train_wan_lora.take_step is before, "the script is left as it was"
    assert [len(steps) for steps in runs] == [4, 4]
    for step in runs[0] + runs[1]:
        assert all(step[part] > 0 for part in PARTS)
        assert sum(step[part] for part in PARTS) == pytest.approx(step[WHOLE], rel=0.01)
        assert max(PARTS, key=step.__getitem__) == GRADIENTS


def test_the_table_names_the_parts_and_their_sums(model, capsys):
    bookkeeping.main(["--model", str(model), "--runs", "1", "--steps", "2", "--warmup", "0"])
    title, header, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "ms per step, 1 run of 2 steps" and header.startswith("main thread's CPU time")
    assert [line.split("  ")[0] for line in lines] == [
        "load",
        "collate",
        "forward and backward",
        "release of their graph",
        "optimizer: norm, clip, AdamW, schedule",
        "log",
        "random states",
        "rest",
        "outside forward, backward and optimizer",
        "whole step",
        "wall time",
        "CPU time of all other threads",
    ]


def burn(seconds: float) -> None:
    """Uses the processor for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_an_inner_part_counts_for_itself_alone_and_another_thread_for_none():
    ledger = Ledger()
    inner = ledger.timed(COLLATE, burn)
    outer = ledger.timed(LOAD, lambda: (burn(0.01), inner(0.03)))
    elsewhere = threading.Thread(target=ledger.timed(LOG, burn), args=(0.02,))
    elsewhere.start()
    elsewhere.join()
    outer()
    ledger.end_step()
    (step,) = ledger.steps
    assert step[LOAD] == pytest.approx(10, abs=4) and step[COLLATE] == pytest.approx(30, abs=4)
    assert step[LOG] == step[OPTIMIZER] == step[RANDOM] == 0 and step[REST] < 4
    assert step[bookkeeping.OTHERS] == pytest.approx(20, abs=8)


def test_what_belongs_to_no_part_counts_for_the_rest_or_what_is_named_for_the_end_of_the_step():
    ledger = Ledger()
    burn(0.03)
    ledger.count_rest_for(RELEASE)
    burn(0.01)
    ledger.end_step()
    burn(0.02)
    ledger.end_step()
    first, second = ledger.steps
    assert first[REST] == pytest.approx(30, abs=4) and first[RELEASE] == pytest.approx(10, abs=4)
    assert second[REST] == pytest.approx(20, abs=4) and second[RELEASE] == 0


def test_the_figures_are_medians_of_runs_and_their_shares():
    runs = [dict.fromkeys((*PARTS, bookkeeping.WALL, bookkeeping.OTHERS), n) | {WHOLE: 7 * n} for n in (3.0, 1.0, 2.0)]
    table = {row[0]: row[1:] for row in bookkeeping.rows([bookkeeping.mean([run]) for run in runs])}
    assert table[LOAD] == (2.0, 1.0, 3.0, 14.286, 0.667)
    assert table[bookkeeping.SUM_OUTSIDE] == (10.0, 5.0, 15.0, 71.429, 3.333)

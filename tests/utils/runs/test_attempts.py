"""A run is tried with less as long as memory is full, and with the state that it has left."""

import weakref

import pytest
import torch

from tests.runs import log, open_a_run
from utils.common.device import explain_out_of_memory
from utils.common.errors import OutOfMemory, RunError, UserError
from utils.runs.attempts import run_until_it_fits


class Ladder:
    """Settings by number, the last of which is 2."""

    def __init__(self, number: int = 0, kept: tuple[bool, ...] = ()) -> None:
        self.number, self.kept = number, kept
        self.flags, self.exact_flags = f"--weight_dtype int8 --blocks_to_swap {number}", f"--blocks_to_swap {number}"

    def less(self, keeps_weights: bool) -> "Ladder":
        if self.number == 2:
            raise UserError("10 tokens do not fit")
        return Ladder(self.number + 1, (*self.kept, keeps_weights))


class Runs:
    """Memory is full as often as is said; then what it was called with is known."""

    def __init__(self, *failures: OutOfMemory) -> None:
        self.failures, self.calls = list(failures), []

    def __call__(self, fit, state) -> None:
        self.calls.append((fit, state))
        if self.failures:
            raise self.failures.pop(0)


FULL = OutOfMemory("CUDA out of memory, while training")


def test_what_fits_runs_once():
    runs = Runs()
    run_until_it_fits(runs, None, None, retries=True)
    assert runs.calls == [(None, None)]


def test_less_is_tried_until_it_fits(capsys):
    runs = Runs(FULL, FULL)
    run_until_it_fits(runs, Ladder(), None, retries=True)
    assert [(fit.number, state) for fit, state in runs.calls] == [(0, None), (1, None), (2, None)]
    assert runs.calls[-1][0].kept == (False, False)
    said = capsys.readouterr().out
    assert (
        "CUDA out of memory, while training\ntrying again with less: --weight_dtype int8 --blocks_to_swap 1\n" in said
    )
    assert "fewer tokens" not in said


def test_a_run_that_has_taken_steps_keeps_its_weights_and_goes_on_from_its_state(tmp_path):
    with open_a_run(tmp_path) as run:
        log(run, 1.0)
        run.save()
    runs = Runs(OutOfMemory("full", run.folder))
    run_until_it_fits(runs, Ladder(), None, retries=True)
    ((_, first), (fit, second)) = runs.calls
    assert first is None and second.step == 1 and second.run_folder == run.folder and fit.kept == (True,)
    resumed = Runs(FULL)
    run_until_it_fits(resumed, Ladder(), second, retries=True)
    assert resumed.calls[1][0].kept == (True,) and resumed.calls[1][1] is second


def test_without_retries_the_next_setting_is_said():
    with pytest.raises(RunError) as caught:
        run_until_it_fits(Runs(FULL), Ladder(), None, retries=False)
    assert str(caught.value).splitlines() == [
        "CUDA out of memory, while training",
        "what fits next, by forecast: --weight_dtype int8 --blocks_to_swap 1",
        "--oom retry takes that by itself",
    ]


def test_without_retries_a_run_that_has_taken_steps_says_how_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_wan_lora.py", "--dataset", "my clips"])
    with open_a_run(tmp_path) as run:
        log(run, 1.0)
        run.save()
    with pytest.raises(RunError) as caught:
        run_until_it_fits(Runs(OutOfMemory("full", run.folder)), Ladder(), None, retries=False)
    command = f"python train_wan_lora.py --dataset 'my clips' --resume_from_checkpoint {run.folder} --blocks_to_swap 1"
    assert str(caught.value).splitlines()[1] == f"what fits next, by forecast: {command}"


def test_where_nothing_else_fits_both_are_said(tmp_path):
    for retries in (False, True):
        with pytest.raises(RunError, match="^CUDA out .*\nno other setting fits: 10 tokens do not fit$"):
            run_until_it_fits(Runs(FULL), Ladder(2), None, retries)
    with pytest.raises(RunError, match="^full\nno other setting fits: .*no usable training state"):
        run_until_it_fits(Runs(OutOfMemory("full", tmp_path)), Ladder(), None, retries=True)


def test_where_nothing_was_chosen_the_error_stays():
    for retries in (False, True):
        with pytest.raises(OutOfMemory) as caught:
            run_until_it_fits(Runs(FULL), None, None, retries)
        assert caught.value is FULL


def test_what_fills_the_memory_is_let_go_before_the_next_try():
    large, alive = [], []

    def train() -> None:
        model = torch.nn.Linear(1, 1)
        large.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def run(fit, state) -> None:
        alive.append([ref() for ref in large])
        if fit.number == 0:
            with explain_out_of_memory():
                train()

    run_until_it_fits(run, Ladder(), None, retries=True)
    assert alive == [[], [None]]

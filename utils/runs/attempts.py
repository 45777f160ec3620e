"""A run that is tried with less where it does not fit."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from utils.common.console import say
from utils.common.errors import OutOfMemory, RunError, UserError
from utils.runs.ending import resume_command
from utils.runs.state import State, find_state
from utils.training.fit import Fit

Run = Callable[[Fit | None, State | None], None]


def run_until_it_fits(run: Run, fit: Fit | None, state: State | None, retries: bool) -> None:
    """Calls `run` with a setting and with the state that it resumes, again with less where that did not fit.

    Without `retries`, the error says which setting would be next. A run that has taken a step keeps the format of its
    weights, so that the numbers are the same. Raises RunError where nothing else fits, or nothing was chosen.
    """
    while True:
        try:
            return run(fit, state)
        except OutOfMemory as error:
            # The frames of their tracebacks hold the tensors that fill the memory.
            full = error.with_traceback(None)
            full.__context__ = full.__cause__ = None
        if fit is None:
            raise full
        try:
            if full.run_folder is not None:
                state = find_state(str(full.run_folder), full.run_folder)
            fit = fit.less(keeps_weights=state is not None)
        except UserError as error:
            raise RunError(f"{full.reason}\nno other setting fits: {error}") from None
        if not retries:
            raise RunError(f"{full.reason}\n{_advice(fit, full.run_folder)}")
        say(f"{full.reason.splitlines()[0]}\ntrying again with less: {fit.flags}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _advice(fit: Fit, run_folder: Path | None) -> str:
    """What the user can do next."""
    if run_folder is None:
        return f"what fits next, by forecast: {fit.flags}\n--oom retry takes that by itself"
    command = f"{resume_command(sys.argv, run_folder)} {fit.exact_flags}".strip()
    return f"what fits next, by forecast: {command}\n--oom retry does that by itself"

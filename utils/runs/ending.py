"""How a run ends early: with everything saved, and a sentence about how to resume it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.common.device import what_did_not_fit
from utils.common.errors import LoaderError, OutOfMemory, RunError, UserError
from utils.common.signals import Stop, signals_ignored
from utils.data.loading import loader_failure
from utils.runs.run import Run

RESUME = "--resume_from_checkpoint"


@contextmanager
def save_on_exit(run: Run, stop: Stop) -> Iterator[None]:
    """Saves the run first, whatever ends it early, where the device still answers, and says how to resume it.

    Ctrl-C stays a KeyboardInterrupt; an unreadable file, a dead loading process and a full GPU become a RunError. So
    does what the run itself found wrong, which is not saved. Each RunError names the last checkpoint.
    """
    is_full = False
    try:
        yield
        return
    except KeyboardInterrupt:
        reason = None
    except (UserError, LoaderError) as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason, is_full = None if stop.requested else what_did_not_fit(error), not stop.requested
    except RunError as error:
        raise run.failure(error) from None
    except RuntimeError as error:
        # A signal handler of torch's raises it in the middle of anything, also where the whole process group was
        # asked to stop and the loading process was only the first to do so.
        if (failure := loader_failure(error)) is None:
            raise
        reason = None if stop.requested else str(failure)
    # Not inside the handlers: there the exception still holds the tensors of the step.
    with signals_ignored():
        _save_interrupted(run)
        if is_full:
            raise OutOfMemory(str(run.failure(reason)), run.folder if run.last_saved_files else None)
        if reason is not None:
            raise run.failure(reason)
        if run.last_saved_files:
            run.metrics.say(f"resume with: {resume_command(sys.argv, run.folder)}")
        raise KeyboardInterrupt


def _save_interrupted(run: Run) -> None:
    if not run.learner.is_whole:
        run.metrics.say("interrupted in the middle of an update, which is not saved")
    elif run.step:
        try:
            run.save()
        except RunError as error:
            raise run.failure(error) from None


def resume_command(argv: Sequence[str], folder: Path) -> str:
    """The command line that resumes the run in this folder: the one that started it, and where it was."""
    words = list(argv)
    if RESUME in words:
        at = words.index(RESUME)
        del words[at : at + 2]
    words = [word for word in words if not word.startswith(f"{RESUME}=")]
    return shlex.join(["python", *words, RESUME, str(folder)])

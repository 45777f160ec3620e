"""Checks the accuracy, speed and memory of training on a GPU, in one command.

    python benchmarks/gpu_check.py            at most eight minutes on one GPU
    python benchmarks/gpu_check.py --quick    at most two minutes

Uses random weights with the shape of the 1.3B model, so nothing is downloaded. Progress is printed to stderr, and one
table for benchmarks/RECORDS.md to stdout. A check is skipped if a package that it needs is not installed. The exit code
is 1 if a check misses its limit or raises an exception, and 0 otherwise, also without a GPU.
"""

import gc
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from utils.common.options import option, parse_options, run_script

ROOT = Path(__file__).resolve().parents[1]

# Module and function of each check: (sizes, device, clock) -> rows. It is imported just before it runs.
CHECKS = {
    "environment": ("environment", "check"),
    "numbers": ("numbers", "check"),
    "step": ("step", "video"),
    "images": ("step", "images"),
    "vae": ("vae", "check"),
    "synchronisations": ("synchronisations", "check"),
}
OWN_PACKAGES = ("benchmarks", "utils", "wan", "train_wan_lora")
FULL, FULL_SECONDS = Sizes(), 480
QUICK, QUICK_SECONDS = Sizes(reference_layers=8, warmups=3, steps=10), 120
HEADER = ("check", "measured", "value", "unit", "limit or comparison", "verdict")


@dataclass(frozen=True)
class Options:
    """Check the accuracy, speed and memory of training on this machine's GPU."""

    quick: bool = option(False, "two minutes: fewer steps, and the accuracy of a shallower model")
    only: tuple[str, ...] = option((), "the checks to run (default: all)", choices=tuple(CHECKS))


class OutOfTime(Exception):
    """The limit of the whole run has passed."""


def run_checks(names: Sequence[str], sizes: Sizes, device: torch.device, clock: Clock) -> list[tuple[str, Row]]:
    """The rows of these checks, each with the name of its check. An exception in one check does not stop the others."""
    rows: list[tuple[str, Row]] = []
    for name in names:

        def report(row: Row, name: str = name) -> None:
            rows.append((name, row))
            print(f"[{clock.limit - clock.left():5.0f} s] {' | '.join(cells(name, row))}", file=sys.stderr)

        _run_check(name, sizes, device, clock, report)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _run_check(name: str, sizes: Sizes, device: torch.device, clock: Clock, report: Callable[[Row], None]) -> None:
    """Reports the rows of a check one by one; if it ends early, the last row gives the reason."""
    module, function = CHECKS[name]
    try:
        with _time_limit(clock):
            for row in getattr(import_module(f"benchmarks.checks.{module}"), function)(sizes, device, clock):
                report(row)
    except OutOfTime:
        report(skipped(name, f"the time limit of {clock.limit:.0f} s has passed"))
    except torch.OutOfMemoryError:
        report(skipped(name, "out of memory"))
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and missing.split(".")[0] not in OWN_PACKAGES:
            report(skipped(name, f"{missing} is not installed"))
            return
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0]
        report(Row(name, verdict=f"{FAILED}: {type(error).__name__}: {reason}"))


@contextmanager
def _time_limit(clock: Clock) -> Iterator[None]:
    """Raises OutOfTime in the block after the time limit: at once, or as soon as a wait for the device ends."""
    if clock.left() <= 0:
        raise OutOfTime
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, clock.left())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def format_record(rows: Sequence[tuple[str, Row]], where: str, command: str) -> str:
    """A record in Markdown: a heading with date, machine and commit, the exact command, and a table of the rows."""
    lines = [HEADER, ("---",) * len(HEADER), *(cells(name, row) for name, row in rows)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"### {date.today().isoformat()}, {where}, commit {commit(ROOT)}\n\n`{command}`\n\n{table}\n"


def cells(name: str, row: Row) -> tuple[str, ...]:
    """A row of the check of this name as text, below HEADER."""
    value = f"{row.value:.6g}" if isinstance(row.value, float) else str(row.value)
    return name, row.name, value, row.unit, row.comparison, row.verdict


def commit(folder: Path) -> str:
    """The commit of a checkout, with a note if there are local changes; "unknown" without git."""
    try:
        head, changes = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=20).stdout
            for args in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + (" with local changes" if changes.strip() else "")


def main() -> None:
    """Exits with 1 if a row failed."""
    opts = parse_options(Options)
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    sizes, limit = (QUICK, QUICK_SECONDS) if opts.quick else (FULL, FULL_SECONDS)
    rows = run_checks(opts.only or tuple(CHECKS), sizes, device, Clock(limit))
    command = shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])
    print(format_record(rows, torch.cuda.get_device_name(device), command))
    if any(row.failed for _, row in rows):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_script(main))

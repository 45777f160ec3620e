"""Checks the accuracy, speed and memory of training on a GPU, part by part.

    python benchmarks/gpu_check.py --part numbers    at most eight minutes on one GPU
    python benchmarks/gpu_check.py                   all parts, each in a process of its own
    python benchmarks/gpu_check.py --quick           fewer steps and shallower models, two minutes for each part

Uses random weights with the shapes of released models, so nothing is downloaded. A part is made of groups of rows. Each
row is printed to stderr and appended to a file as it is measured. What that file has for this commit and this device is
not measured again, so that an interrupted part continues with its next group. Everything that was measured is
printed to stdout, as one table for benchmarks/RECORDS.md. The exit code is 1 if a row missed its limit or a group
raised an exception, and 0 otherwise, also without a GPU.
"""

import gc
import hashlib
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import FAILED, Clock, Row, Sizes, skipped
from benchmarks.results import Results
from utils.common.options import option, parse_options, run_script

ROOT = Path(__file__).resolve().parents[1]

# Module and function of each group of each part: (sizes, device, clock) -> rows. It is imported just before it runs.
PARTS = {
    "numbers": {
        "environment": ("environment", "check"),
        "precision": ("numbers", "check"),
        "precision_compiled": ("numbers", "compiled_blocks"),
        "equality": ("equality", "check"),
    },
    "step": {
        "video": ("step", "video"),
        "images": ("step", "images"),
        "synchronisations": ("synchronisations", "check"),
        "video_compiled": ("step", "video_compiled"),
        "images_compiled": ("step", "images_compiled"),
        "vae": ("vae", "check"),
        "long": ("step", "long"),
        "5B": ("step", "of_5b"),
        "14B": ("step", "of_14b"),
    },
    "stream": {
        "link": ("stream", "link"),
        "offload": ("stream", "offload"),
        "offload_long": ("stream", "offload_long"),
        "weights": ("waiting_weights", "weights"),
        "weights_14B": ("waiting_weights", "weights_14b"),
        "weights_capped": ("waiting_weights", "weights_capped"),
    },
    "quantised": {
        "dequantise": ("quantised", "dequantised"),
        "codes": ("quantised", "stored"),
        "quantised_accuracy": ("quantised", "accuracy"),
        "quantised_step": ("quantised", "step"),
    },
    "plan": {
        "plan": ("plan", "check"),
        "plan_long": ("plan", "long"),
    },
}
OWN_PACKAGES = ("benchmarks", "utils", "wan", "train_wan_lora")
FULL, FULL_SECONDS = Sizes(), 480
QUICK, QUICK_SECONDS = Sizes(reference_layers=8, warmups=3, steps=10), 120
GROUP_SHARE = 0.75  # of the time of a part that one group may take
LEAST_SECONDS = 20  # a group is not begun with less
MOST_ATTEMPTS = 2  # a group that twice ended its process is given up
STICKY = ("AcceleratorError", "CUDA error")  # after these nothing works on the GPU in this process
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.jsonl"
HEADER = ("check", "measured", "value", "unit", "limit or comparison", "verdict")


@dataclass(frozen=True)
class Options:
    """Check the accuracy, speed and memory of training on this machine's GPU."""

    part: str | None = option(None, "the part to run (default: all)", choices=tuple(PARTS))
    quick: bool = option(False, "fewer steps, shallower models, and two minutes for each part")
    only: tuple[str, ...] = option(
        (), "the groups to measure, also again", choices=tuple(group for groups in PARTS.values() for group in groups)
    )
    results: Path = option(RESULTS, "the file of what has been measured")


class OutOfTime(BaseException):
    """The time limit has passed. No library may take it for a fault of what it runs."""


class Unusable(Exception):
    """The GPU is of no more use to this process."""


def run_groups(
    groups: Mapping[str, tuple[str, str]], sizes: Sizes, device: torch.device, clock: Clock, results: Results
) -> None:
    """Adds the rows of these groups, as long as there is time. What ends one group does not stop the others."""
    for name, place in groups.items():
        limit = min(clock.left(), GROUP_SHARE * clock.limit)
        if limit < min(LEAST_SECONDS, clock.limit / 2):
            print("the time of this part has passed: run it again for the rest", file=sys.stderr)
            return
        given_up = results.attempts.get(name, 0) >= MOST_ATTEMPTS
        results.begin(name)
        if given_up:
            _add(results, name, Row(name, verdict=f"{FAILED}: it ended the process {MOST_ATTEMPTS} times"), clock)
            results.end(name)
            continue
        try:
            # What had less than its share of the time is measured again in the next run.
            if _run_group(name, place, (sizes, device, Clock(limit)), results) or limit == GROUP_SHARE * clock.limit:
                results.end(name)
        except Unusable:
            results.end(name)
            print("this process cannot use the GPU any more: run it again for the rest", file=sys.stderr)
            return
        torch.compiler.reset()  # else compiled code of all groups would add up to torch's limit
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run_group(name: str, place: tuple[str, str], given: tuple[Sizes, torch.device, Clock], results: Results) -> bool:
    """Adds the rows of a group one by one; if it ends early, the last row gives the reason. Whether it had the time."""
    module, function = place
    clock = given[-1]
    try:
        with _time_limit(clock):
            for row in getattr(import_module(f"benchmarks.checks.{module}"), function)(*given):
                _add(results, name, row, clock)
    except OutOfTime:
        _add(results, name, skipped(name, f"the time limit of {clock.limit:.0f} s has passed"), clock)
        return False
    except torch.OutOfMemoryError:
        _add(results, name, skipped(name, "out of memory"), clock)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and missing.split(".")[0] not in OWN_PACKAGES:
            _add(results, name, skipped(name, f"{missing} is not installed"), clock)
            return True
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        _add(results, name, Row(name, verdict=f"{FAILED}: {reason}"), clock)
        if any(mark in reason for mark in STICKY):
            raise Unusable from error
    return True


def _add(results: Results, name: str, row: Row, clock: Clock) -> None:
    results.add(name, row)
    print(f"[{clock.limit - clock.left():5.0f} s] {' | '.join(cells(name, row))}", file=sys.stderr, flush=True)


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
    """A row of the group of this name as text, below HEADER."""
    value = f"{row.value:.6g}" if isinstance(row.value, float) else str(row.value)
    return name, row.name, value, row.unit, row.comparison, row.verdict


def commit(folder: Path) -> str:
    """The commit of a checkout, with a digest of local changes if there are any; "unknown" without git."""
    try:
        head, status, changes, new = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=20).stdout
            for args in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain"),
                ("diff", "HEAD"),
                ("ls-files", "--others", "--exclude-standard", "-z"),
            )
        )
        digest = hashlib.sha256((status + changes).encode())
        for name in filter(None, new.split("\0")):
            digest.update((folder / name).read_bytes())
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + (f" with local changes {digest.hexdigest()[:7]}" if status.strip() else "")


def chosen(part: str, only: Sequence[str], results: Results) -> dict[str, tuple[str, str]]:
    """The groups of a part that are asked for: those of `only`, otherwise those that are not complete."""
    groups = PARTS[part]
    return {name: place for name, place in groups.items() if (name in only if only else name not in results.complete)}


def main() -> None:
    """Exits with 1 if a row failed."""
    opts = parse_options(Options)
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was measured")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    name, limit = torch.cuda.get_device_name(device), QUICK_SECONDS if opts.quick else FULL_SECONDS
    run = (commit(ROOT), name, "quick" if opts.quick else "full")
    results = Results(opts.results, run)
    if opts.part is None:
        for part in PARTS:
            if chosen(part, opts.only, results):
                _run_apart(part, 2 * limit)
        results = Results(opts.results, run)
    else:
        groups = chosen(opts.part, opts.only, results)
        run_groups(groups, QUICK if opts.quick else FULL, device, Clock(limit), results)
    rows = [(group, row) for groups in PARTS.values() for group in groups for row in results.rows.get(group, [])]
    print(format_record(rows, name, shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]])))
    if any(row.failed for _, row in rows):
        sys.exit(1)


def _run_apart(part: str, seconds: float) -> None:
    """One part in a process of its own: its allocator is empty, and what it breaks does not reach the others."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--part", part]
    try:
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        print(f"the part {part} took more than {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main))

"""What a training step costs the host, part by part.

    python -m benchmarks.bookkeeping            on Wan-Nano and clips of its world

Runs the training script a few times with cached latents, in batches of 4 clips of 17x64x64, on one torch thread. Prints
the CPU time of the main thread for a table of benchmarks/RECORDS.md. The script is not changed: its functions are
wrapped from outside. On a GPU the host only launches forward and backward, and its time overlaps with the device's.
"""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_wan_lora
from nano.world import write_dataset
from utils.common.formatting import counted, format_table
from utils.common.options import option, parse_options, run_script
from utils.data.plan import Plan
from utils.encoding.conditioning import Batch
from utils.encoding.samples import CachedSamples
from utils.runs.metrics import Metrics
from utils.training.learner import Trainable

MODEL = Path(__file__).resolve().parents[1] / "nano" / "model"
CLIPS, BATCH_SIZE = 16, 4
LOAD, COLLATE, GRADIENTS, RELEASE, OPTIMIZER, LOG, RANDOM, REST = PARTS = (
    "load",
    "collate",
    "forward and backward",
    "release of their graph",
    "optimizer: norm, clip, AdamW, schedule",
    "log",
    "random states",
    "rest",
)
OUTSIDE = tuple(part for part in PARTS if part not in (GRADIENTS, RELEASE, OPTIMIZER))
SUM_OUTSIDE, WHOLE = "outside forward, backward and optimizer", "whole step"
WALL, OTHERS = "wall time", "CPU time of all other threads"
REFERENCE = 300.0  # ms of the step that the share of the bookkeeping is stated for
P = ParamSpec("P")
T = TypeVar("T")
Costs = dict[str, float]  # ms of a step: of each part, of the whole, and WALL and OTHERS


@dataclass(frozen=True)
class Options:
    """Measure what a training step costs the host."""

    model: Path = option(MODEL, "folder of the base model")
    runs: int = option(5, "runs of the training script", minimum=1)
    steps: int = option(60, "steps of each run that are measured", minimum=1)
    warmup: int = option(10, "steps before them", minimum=0)


class Ledger:
    """The CPU time of the thread that makes it, step by step: a part inside another one counts for itself alone."""

    def __init__(self) -> None:
        self.steps: list[Costs] = []
        self._thread = threading.get_ident()
        self.begin_step()

    def timed(self, part: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, its time counted for this part. Calls by other threads are not counted."""

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._charge()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return call

    def begin_step(self) -> None:
        self._spent, self._open = dict.fromkeys(PARTS, 0.0), [REST]
        self._began = self._now = time.thread_time()
        self._wall, self._process = time.perf_counter(), time.process_time()

    def count_rest_for(self, part: str) -> None:
        """Until the end of the step, what belongs to no other part counts for this one."""
        self._charge()
        self._open[0] = part

    def end_step(self) -> None:
        """Notes the step. It ends where the next one begins."""
        self._charge()
        whole, process = self._now - self._began, time.process_time() - self._process
        seconds = self._spent | {WHOLE: whole, WALL: time.perf_counter() - self._wall, OTHERS: process - whole}
        self.steps.append({name: 1000 * value for name, value in seconds.items()})
        self.begin_step()

    def _charge(self) -> None:
        now = time.thread_time()
        self._spent[self._open[-1]] += now - self._now
        self._now = now


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    runs = [mean(steps[opts.warmup :]) for steps in measure(opts)]
    print(f"ms per step, {counted(opts.runs, 'run')} of {counted(opts.steps, 'step')}")
    print(format_table(("main thread's CPU time", "median", "min", "max", "% of the step", "% of 0.3 s"), rows(runs)))


def measure(opts: Options) -> list[list[Costs]]:
    """What each step of each run cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory(prefix="bookkeeping-") as folder:
            write_dataset(Path(folder) / "clips", CLIPS, seed=0)
            return [measure_run(opts, Path(folder)) for _ in range(opts.runs)]
    finally:
        torch.set_num_threads(threads)


def measure_run(opts: Options, folder: Path) -> list[Costs]:
    """What each step of a run cost. What the run prints is left out."""
    steps = opts.steps + opts.warmup
    argv = (
        f"--cache_latents 1 --base_res 64 --batch_size {BATCH_SIZE} --val_samples 0 --max_train_steps {steps}".split()
    )
    argv += ["--dataset", str(folder / "clips"), "--pretrained_model_name_or_path", str(opts.model)]
    argv += ["--checkpointing_steps", str(steps), "--output_dir", str(folder / "outputs")]
    ledger = Ledger()
    with wrapped(ledger), redirect_stdout(StringIO()):
        train_wan_lora.main(argv)
    return ledger.steps


@contextmanager
def wrapped(ledger: Ledger) -> Iterator[None]:
    """The functions of the training script fill the ledger."""
    take_step, stream = train_wan_lora.take_step, CachedSamples.stream
    end_log = ledger.timed(LOG, Metrics.end_step)

    def counted_step(*args: object) -> None:
        if not ledger.steps:
            ledger.begin_step()  # what came before the first step is no part of it
        take_step(*args)  # type: ignore[arg-type]  # handed on as they came
        ledger.end_step()

    def timed_end(metrics: Metrics, tokens: int) -> None:
        end_log(metrics, tokens)
        ledger.count_rest_for(RELEASE)  # the step returns, and with its variables goes the graph

    def timed_stream(samples: CachedSamples, plan: Plan, start_batch: int = 0) -> Generator[Batch, None, None]:
        with closing(stream(samples, plan, start_batch)) as batches:
            advance = ledger.timed(LOAD, batches.__next__)
            while True:
                yield advance()

    with ExitStack() as patches:
        for owner, name, replacement in (
            (train_wan_lora, "take_step", counted_step),
            (CachedSamples, "stream", timed_stream),
            (CachedSamples, "batch", ledger.timed(COLLATE, CachedSamples.batch)),
            (train_wan_lora, "training_loss", ledger.timed(GRADIENTS, train_wan_lora.training_loss)),
            (torch.Tensor, "backward", ledger.timed(GRADIENTS, torch.Tensor.backward)),
            (Trainable, "step", ledger.timed(OPTIMIZER, Trainable.step)),
            (Metrics, "log", ledger.timed(LOG, Metrics.log)),
            (Metrics, "end_step", timed_end),
            (torch, "get_rng_state", ledger.timed(RANDOM, torch.get_rng_state)),
        ):
            patches.enter_context(patch.object(owner, name, replacement))
        yield


def mean(steps: Sequence[Costs]) -> Costs:
    """What a step cost on average. Means, not medians: the log is written about once a second."""
    means = {name: fmean(step[name] for step in steps) for name in steps[0]}
    return means | {SUM_OUTSIDE: sum(means[part] for part in OUTSIDE)}


def rows(runs: Sequence[Costs]) -> list[tuple[object, ...]]:
    """A row for each part, then the sums: median, least and most of the runs, and shares of the median."""
    whole = median(run[WHOLE] for run in runs)
    return [_row(name, [run[name] for run in runs], whole) for name in (*PARTS, SUM_OUTSIDE, WHOLE, WALL, OTHERS)]


def _row(name: str, values: Sequence[float], whole: float) -> tuple[object, ...]:
    middle = median(values)
    numbers = (middle, min(values), max(values), 100 * middle / whole, 100 * middle / REFERENCE)
    return name, *(round(number, 3) for number in numbers)


if __name__ == "__main__":
    sys.exit(run_script(main))

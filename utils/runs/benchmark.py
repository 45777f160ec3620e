"""`--benchmark`: steps on the largest batch of a run, and a table of them that can be compared with those of others."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import describe
from utils.common.formatting import counted
from utils.encoding.conditioning import Batch
from utils.runs.inputs import InputOptions, Inputs, workload
from utils.runs.session import Session
from utils.training.calibration import Workload
from utils.training.cards import find_card
from utils.training.forecast import Setting, needed_flops
from utils.training.learner import Learner
from utils.training.phases import Phase

WARM_UP, STEPS, WATCHED = 2, 10, 3  # steps that are not timed, that are, and that a profiler watches


@dataclass(frozen=True)
class Steps:
    """What steps have taken."""

    seconds: list[float]  # of each
    peak: int | None  # bytes of GPU memory that tensors had; None without a GPU
    busy: float  # the share of the time in which the device computed


def benchmark(opts: InputOptions, inputs: Inputs, session: Session, compiled: bool, decisions: Decisions) -> None:
    """Trains a few steps on the largest batch, and says what they take; `opts` have the setting of the run."""
    files, plan, device = inputs.files, inputs.plan, session.experts.device
    window, work = plan.largest_batch[0], workload(opts, files.family, files.shape, plan)
    batch, phase = session.samples.load_batch(plan.largest_batch), session.schedule.phases[0]
    steps = time_steps(session.learner, phase, batch, device)
    weights = decisions.made["weight_dtype"] if opts.weight_dtype == "auto" else opts.weight_dtype
    streamed, kept = opts.count_streamed(work.shape.num_layers), session.kept.strategies(work.batch * work.tokens)
    sample = f"{window.width}x{window.height}, {counted(window.frames, 'frame')}"
    expert = f", {phase.name} expert" * (len(session.schedule.phases) > 1)
    setting = Setting(weights, streamed, tuple(kept), compiled)
    say(f"\n{benchmark_table(files.family.name + expert, sample, work, setting, device, steps)}")


def time_steps(learner: Learner, phase: Phase, batch: Batch, device: torch.device) -> Steps:
    """Steps on one batch: the first ones to warm up, then timed ones, then some whose kernels are looked at.

    The learner is as it was before.
    """

    def step() -> None:
        learner.begin_step()
        with phase.speaking():
            phase.loss(batch).value.backward()
        phase.step()

    with learner.unchanged():
        return _time(step, device)


def _time(step: Callable[[], object], device: torch.device) -> Steps:
    """Times a step, which may leave work to the device: each is waited for."""
    is_gpu = device.type == "cuda"

    def run(count: int, words: str) -> list[float]:
        seconds = []
        for _ in tqdm(range(count), words, unit="step", leave=False):
            started = time.perf_counter()
            step()
            if is_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds

    run(WARM_UP, "warming up")
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    cpu = time.process_time()
    seconds = run(STEPS, "timing steps")
    if not is_gpu:
        busy = (time.process_time() - cpu) / (sum(seconds) * torch.get_num_threads())
        return Steps(seconds, None, min(1.0, busy))
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        watched_seconds = sum(run(WATCHED, "watching kernels"))
    kernels = (
        (event.time_range.start, event.time_range.end)
        for event in watched.events() or ()
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    )
    return Steps(seconds, peak, min(1.0, covered(kernels) / 1e6 / watched_seconds))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    ordered = sorted(spans)
    ends = accumulate((end for _, end in ordered), max, initial=float("-inf"))
    return sum(max(0.0, end - max(start, before)) for (start, end), before in zip(ordered, ends, strict=False))


def benchmark_table(model: str, size: str, work: Workload, setting: Setting, device: torch.device, steps: Steps) -> str:
    """The figures as a table in Markdown. `size` says what a sample is, such as "832x480, 81 frames"."""
    seconds, tokens = median(steps.seconds), work.batch * work.tokens
    card = find_card(describe(device)) if device.type == "cuda" else None
    flops = needed_flops(work, setting.dtype) / seconds
    reached = f"{flops / 1e12:.3g} TFLOP/s"
    if card is not None:
        reached = f"{flops / card.peak:.1%} of {card.peak / 1e12:.0f} TFLOP/s"
    trained = f"LoRA of rank {work.rank} on {' '.join(work.targets)}"
    rows = {
        "device": describe(device),
        "model": f"{model}: {work.shape.num_layers} blocks, width {work.shape.dim}",
        "batch": f"{counted(work.batch, 'clip')} of {size}: {tokens:,} tokens",
        "setting": f"{setting.describe(work.shape.num_layers)}; {trained}",
        "s/step": f"{seconds:.3g} ({min(steps.seconds):.3g} to {max(steps.seconds):.3g}, {len(steps.seconds)} steps)",
        "tokens/s": f"{tokens / seconds:,.0f}",
        "utilisation": reached,
        "GPU memory": "none" if steps.peak is None else f"{steps.peak / 1e9:.2f} GB at the peak",
        "main memory": f"{psutil.Process().memory_info().rss / 1e9:.2f} GB after the last step",
        "busy": f"{steps.busy:.0%}",
        "software": f"torch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""),
    }
    width = max(map(len, rows))
    lines = [f"| {name.ljust(width)} | {value} |" for name, value in rows.items()]
    return "\n".join([lines[0], f"|{'-' * (width + 2)}|---|", *lines[1:]])

"""How many steps optimizers need to teach the small Wan the demo's style.

    python -m benchmarks.optimizers [--output_dir outputs/optimizers]

AdamW, AdamW with moments of 8 bits, LoRA+ (up matrices at 8 times the rate) and Muon for up matrices, each at three
learning rates and with three seeds: a dataset as the demo writes it, and a run of the trainer at a constant rate with a
checkpoint every 10 steps. What counts is the first checkpoint with which the style is in 80% of the videos of 64
prompts, of combinations that were withheld from the base; prompts and noises are the same for all. The share rises with
the steps: the first is looked for from where it was with the seed before. Videos are short, since a style shows in any
frame, and of a checkpoint no more are made than decide whether it has 80%.

The best rate of an optimizer is the one that needs the fewest steps on average over the seeds; a run that does not get
there counts as one step more than it has taken. Runs and figures are kept in the output folder. The same command
continues with what is missing.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from benchmarks.gpu_check import commit
from benchmarks.learning import claim, write_clips, write_json
from benchmarks.training import LOG, run_trainer
from nano.demo import MODEL, ROOT, STYLE, make_trials
from nano.probe import read
from nano.sampling import SAMPLER, generate, load, noise_of
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.common.console import say
from utils.common.device import describe, pick_device
from utils.common.errors import RunError
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script
from wan.checkpoints import CheckpointError, load_transformer, open_model

SEEDS = (0, 1, 2)
EVERY, STEPS = 10, 160
PROMPTS, WANTED = 64, 52  # 80%
AT_ONCE = 16  # videos
FRAMES, QUICK = 9, replace(SAMPLER, steps=10)  # enough to see the style
RANK = 32  # smaller matrices of the small Wan would not be quantised
TRAINING = (
    f"--base_res 64 --batch_size 4 --cache_latents --lora_rank {RANK} --max_train_steps {STEPS} "
    f"--checkpointing_steps {EVERY}"
).split()
HEADER = ("optimizer", "learning rate", "steps until the style is in 80% of the videos", "by seed")


@dataclass(frozen=True)
class Kind:
    """An optimizer with its options, and the rates that are tried."""

    name: str
    flags: str
    rates: tuple[float, float, float]


KINDS = (
    Kind("AdamW", "--optimizer adamw", (1e-3, 2e-3, 4e-3)),
    Kind("AdamW, 8 bits", "--optimizer adamw8bit", (1e-3, 2e-3, 4e-3)),
    Kind("LoRA+, ratio 8", "--optimizer adamw --lora_plus_ratio 8", (2.5e-4, 5e-4, 1e-3)),
    Kind("Muon for up matrices", "--optimizer muon", (1e-3, 2e-3, 4e-3)),
)


@dataclass(frozen=True)
class Options:
    """Measure how many steps optimizers need."""

    output_dir: Path = option(Path("outputs/optimizers"), "where runs, figures and the table are written, and kept")


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError for a folder that holds what another commit or device has measured, RunError as `train`."""
    opts = parse_options(Options, argv)
    folder, device = opts.output_dir, pick_device()
    check_writable(folder)
    claim(folder, {"commit": commit(ROOT), "device": describe(device), "torch": torch.__version__})
    started, studio = time.perf_counter(), Studio(device)
    for seed in SEEDS:
        for kind in KINDS:
            for rate in kind.rates:
                path = figures_file(folder, seed, kind, rate)
                if not path.exists():
                    say(f"seed {seed}, {kind.name}, learning rate {rate:g}")
                    loras = train(folder, seed, kind, rate)
                    known = figures_file(folder, seed - 1, kind, rate)
                    guess = steps_of(known) if known.exists() else STEPS // 2
                    write_json(path, measured(loras, studio.shown, guess))
                    shutil.rmtree(path.with_suffix(""))
    say(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    report(folder)


def figures_file(folder: Path, seed: int, kind: Kind, rate: float) -> Path:
    name = "_".join(kind.flags.replace("--", "").split())
    return folder / f"seed_{seed}" / f"{name}_{rate:g}.json"


def train(folder: Path, seed: int, kind: Kind, rate: float) -> dict[int, Path]:
    """The LoRA of each checkpoint, by its step. Raises RunError where the trainer fails."""
    runs = figures_file(folder, seed, kind, rate).with_suffix("")
    clips = runs.parent / "clips"
    write_clips(clips, seed)
    loras = run_trainer(runs, clips, seed, *TRAINING, *kind.flags.split(), "--learning_rate", rate)
    found = {checkpoint.step: path for path, checkpoint in loras.items()}
    if sorted(found) != list(range(EVERY, STEPS + 1, EVERY)):
        raise RunError(f"train_wan_lora.py has written checkpoints of the steps {sorted(found)}, see {runs / LOG}")
    return found


def measured(loras: dict[int, Path], shown: Callable[[Path], Sequence[bool]], guess: int) -> dict[str, object]:
    """The first step from which the style is shown, None where it never is, and what was counted at which steps.

    `shown` says of some videos of a LoRA, enough to decide, whether they show the style.
    """
    steps, counted = sorted(loras), dict[str, str]()
    low, high = 0, len(steps)  # all before `low` are too early, all from `high` on are late enough
    middle, stride = guess // EVERY - 1, 1
    while low < high:
        if not low <= middle < high:
            middle = (low + high) // 2
        videos = shown(loras[steps[middle]])
        counted[str(steps[middle])] = f"{sum(videos)} of {len(videos)}"
        if sum(videos) >= WANTED:
            high, middle = middle, middle - stride
        else:
            low, middle = middle + 1, middle + stride
        stride *= 2
    return {"steps": steps[low] if low < len(steps) else None, "counted": counted}


class Studio:
    """What all runs share: prompts, noises, encoders."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.files = device, open_model(MODEL)
        _, self.vae, encoder = load(MODEL, device)
        trials = make_trials(PROMPTS, 0)
        self.texts = encoder.encode([trial.styled for trial in trials])
        (self.negative,) = encoder.encode([""])
        self.noise: Tensor = noise_of(self.vae, [trial.seed for trial in trials], FRAMES)

    def shown(self, lora: Path) -> list[bool]:
        """Whether videos show the style, of as many as decide whether at least WANTED of PROMPTS do."""
        model = load_transformer(self.files.transformer, torch.float32, self.device)
        fuse_lora(model, read_lora(lora))
        found: list[bool] = []
        for begin in range(0, PROMPTS, AT_ONCE):
            some = slice(begin, begin + AT_ONCE)
            videos = generate(model, self.vae, self.texts[some], self.noise[some], self.negative, sampler=QUICK)
            found += [read(video).style == STYLE for video in videos]
            if sum(found) >= WANTED or found.count(False) > PROMPTS - WANTED:
                break
        return found


def report(folder: Path) -> None:
    """Prints the table, and writes optimizers.json."""
    rows, entries = [HEADER, ("---",) * len(HEADER)], []
    for kind in KINDS:
        steps = {rate: [steps_of(figures_file(folder, seed, kind, rate)) for seed in SEEDS] for rate in kind.rates}
        best = min(kind.rates, key=lambda rate: fmean(steps[rate]))
        for rate, counts in steps.items():
            mark = " (best)" if rate == best else ""
            mean = f"{fmean(counts):.0f} ± {stdev(counts):.0f}"
            by_seed = ", ".join(str(count) if count <= STEPS else f"more than {STEPS}" for count in counts)
            rows.append((kind.name, f"{rate:g}{mark}", mean, by_seed))
        by_rate = {str(rate): counts for rate, counts in steps.items()}
        entries.append({"name": kind.name, "flags": kind.flags, "best": best, "steps": by_rate})
    say("\n".join(f"| {' | '.join(row)} |" for row in rows))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "optimizers.json", run | {"seeds": SEEDS, "rows": entries})


def steps_of(path: Path) -> int:
    """The first step that was found, or one step more than was taken."""
    found: int | None = json.loads(path.read_text(encoding="utf-8"))["steps"]
    return STEPS + 1 if found is None else found


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""At which noise levels the LoRAs of two experts should be trained: on the small Wan with two experts.

    python -m benchmarks.expert_range [--output_dir outputs/expert_range]

For each of three seeds a dataset as the demo writes it, and on it a pair of LoRAs for each --expert_range, trained with
the trainer's command line and the demo's settings, with the same number of steps for each expert. Beside the pairs one
LoRA for both experts, trained at every noise level on the small Wan, in as many steps as the two of a pair together.

Each is measured twice. The validation loss of each expert, at five noise levels of its own interval, on clips of
combinations that were withheld from the base, in the demo's style; clips and noise are the same for all. And the
probe's share of videos that show the style, from prompts of the same combinations. Means and deviations are over the
seeds.

Each LoRA and the figures of each row are kept in the output folder. The same command continues with what is missing.
"""

import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from benchmarks.gpu_check import commit
from benchmarks.learning import claim, write_clips, write_json
from benchmarks.training import LOG, run_trainer
from nano.demo import MODEL, ROOT, STYLE, TRAINING, make_trials
from nano.pretrain_families import sampler_of
from nano.probe import adherence
from nano.sampling import generate, noise_of
from nano.world import caption, render, split
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.common.checkpoint_names import LORA
from utils.common.console import say
from utils.common.device import describe, pick_device
from utils.common.errors import RunError, UserError
from utils.common.files import check_writable, replacing
from utils.common.options import option, parse_options, run_script
from utils.encoding.conditioning import Batch, Cond, Encoded, collate, encode_video, make_predict, to_unit_range
from utils.training.experts import RANGES
from utils.training.validation import quantiles, validation_loss
from wan.checkpoints import (
    TRANSFORMER,
    CheckpointError,
    ModelFiles,
    load_text_encoder,
    load_transformer,
    load_vae,
    open_model,
)
from wan.modules.model import WanModel
from wan.modules.vae import WanVAE

HIGH_NOISE = MODEL.parent / "high_noise"
SEEDS = (0, 1, 2)
STEPS = 150  # of each expert
CLIPS, PROMPTS = 32, 96
SHARED = "one LoRA"
KINDS = (*RANGES, SHARED)
EXPERTS = ("high_noise", "low_noise")
HEADER = ("LoRAs", "loss, high noise", "loss, low noise", "videos that show the style", "and motion and shape too")


@dataclass(frozen=True)
class Options:
    """Measure at which noise levels the LoRAs of two experts should be trained."""

    output_dir: Path = option(Path("outputs/expert_range"), "where LoRAs, figures and the table are written, and kept")


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError for a folder that holds what another commit or device has measured, RunError as `train` does.

    UserError, too, where the high-noise expert has not been trained yet.
    """
    opts = parse_options(Options, argv)
    folder, device = opts.output_dir, pick_device()
    check_writable(folder)
    if not (HIGH_NOISE / TRANSFORMER).exists():
        raise UserError(f"{HIGH_NOISE} is not there: train it with python -m nano.pretrain_families --only high_noise")
    claim(folder, {"commit": commit(ROOT), "device": describe(device), "torch": torch.__version__})
    started = time.perf_counter()
    studio = Studio(open_model(MODEL, high_noise=HIGH_NOISE, low_noise=MODEL), device)
    for seed in SEEDS:
        for kind in KINDS:
            loras, figures = train(folder, seed, kind), figures_file(folder, seed, kind)
            if not figures.exists():
                say(f"seed {seed}, measuring {kind}")
                write_json(figures, studio.measure(loras))
    say(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    report(folder)


def lora_file(folder: Path, seed: int, kind: str, trainable: str) -> Path:
    return folder / f"seed_{seed}" / f"{kind.replace(' ', '_')}_{trainable}.safetensors"


def figures_file(folder: Path, seed: int, kind: str) -> Path:
    return folder / f"seed_{seed}" / f"{kind.replace(' ', '_')}.json"


def train(folder: Path, seed: int, kind: str) -> dict[str, Path]:
    """The LoRA of each expert, trained unless they are there. Raises RunError where the trainer fails."""
    names = {expert: LORA if kind == SHARED else expert for expert in EXPERTS}
    targets = {expert: lora_file(folder, seed, kind, name) for expert, name in names.items()}
    if all(path.exists() for path in targets.values()):
        return targets
    seeded = folder / f"seed_{seed}"
    clips, runs = seeded / "clips", seeded / f"{kind.replace(' ', '_')}_runs"
    write_clips(clips, seed)
    shutil.rmtree(runs, ignore_errors=True)  # of a start that was interrupted
    say(f"seed {seed}, training {kind}")
    experts = () if kind == SHARED else ("--high_noise", HIGH_NOISE, "--low_noise", MODEL, "--expert_range", kind)
    steps = 2 * STEPS if kind == SHARED else STEPS
    loras = run_trainer(runs, clips, seed, *TRAINING, "--max_train_steps", steps, *experts)
    found = {checkpoint.trainable: path for path, checkpoint in loras.items() if checkpoint.step == 2 * STEPS}
    if not found.keys() >= set(names.values()):
        raise RunError(f"train_wan_lora.py has not written the LoRAs of step {2 * STEPS}, see {runs / LOG}")
    for expert, target in targets.items():
        with replacing(target) as unfinished:
            shutil.copyfile(found[names[expert]], unfinished)
    return targets


class Studio:
    """What all rows share: clips, prompts, noises, encoders."""

    def __init__(self, files: ModelFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        encoder = load_text_encoder(files, torch.float32, device)
        self.trials = make_trials(PROMPTS, 0)
        self.texts = encoder.encode([trial.styled for trial in self.trials])
        (self.negative,) = encoder.encode([""])
        self.vae: WanVAE = load_vae(files, device)
        self.noise: Tensor = noise_of(self.vae, [trial.seed for trial in self.trials])
        rng, self.clips = random.Random("validation"), list[Batch]()
        for scene in split()[1][:CLIPS]:
            video = to_unit_range(render(scene, rng, STYLE)).to(device)
            (text,) = encoder.encode([caption(scene, rng, STYLE)])
            self.clips.append(collate([Encoded(encode_video(video, self.vae), Cond(text))]))

    def measure(self, loras: dict[str, Path]) -> dict[str, float]:
        """The loss of each expert with its LoRA, and the shares of the videos that both make."""
        models, figures = list[WanModel](), dict[str, float]()
        for expert in self.files.family.experts:
            model = load_transformer(self.files.transformers[expert.name], torch.float32, self.device)
            fuse_lora(model, read_lora(loras[expert.name]))
            losses = validation_loss(make_predict(model), self.clips, 0, quantiles(*expert.sigmas))
            figures[expert.name] = losses.mean().item()
            models.append(model)
        sampler = sampler_of(self.files.family)
        videos = generate(models, self.vae, self.texts, self.noise, self.negative, sampler=sampler)
        shares = adherence(videos, [trial.scene for trial in self.trials], STYLE)
        return figures | {name: shares[name] for name in ("style", "all")}


def report(folder: Path) -> None:
    """Prints the table, and writes expert_range.json."""
    figures = {
        kind: [json.loads(figures_file(folder, seed, kind).read_text(encoding="utf-8")) for seed in SEEDS]
        for kind in KINDS
    }
    rows = [HEADER, ("---",) * len(HEADER)]
    for kind, seeds in figures.items():
        losses = [_spread([seed[expert] for seed in seeds], "{:.4f}") for expert in EXPERTS]
        shares = [_spread([100 * seed[name] for seed in seeds], "{:.1f}") + "%" for name in ("style", "all")]
        rows.append((kind, *losses, *shares))
    say("\n".join(f"| {' | '.join(row)} |" for row in rows))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "expert_range.json", run | {"seeds": SEEDS, "steps": STEPS, "rows": figures})


def _spread(values: Sequence[float], pattern: str) -> str:
    """The mean and the standard deviation of a sample."""
    return f"{pattern.format(fmean(values))} ± {pattern.format(stdev(values))}"


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""The whole project on two CPU cores in minutes: a dataset, a LoRA trained on it, and videos that show its effect.

    python -m nano.demo [--output_dir outputs/nano_demo]

Writes a dataset in a style that Wan-Nano has never seen, caches its captions and trains a LoRA, with the command line
of the trainer. Then generates the same prompts from the same noise without and with the LoRA. The probe measures how
often the videos show the style, and whether prompts without the trigger word are still followed.
"""

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nano.picture import comparison
from nano.probe import adherence
from nano.sampling import SAMPLER, generate, load, noise_of
from nano.world import FPS, STYLES, Scene, caption, split, write_dataset
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.common.checkpoint_names import list_checkpoints
from utils.common.device import pick_device
from utils.common.errors import RunError
from utils.common.files import check_writable
from utils.common.formatting import format_table
from utils.common.options import option, parse_options, run_script
from utils.media.frames import save_image, write_video
from wan.checkpoints import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "nano" / "model"
STYLE = "sunset"
CLIPS, HELD_OUT = 48, 4
SHOWN = 6
MOMENTS = ("before", "after")
TRAINING = (
    "--base_res 64 --batch_size 4 --cache_latents --max_train_steps 300 --learning_rate 2e-3 --lr_scheduler linear "
    "--lora_rank 8 --val_steps 150 --checkpointing_steps 150"
).split()


@dataclass(frozen=True)
class Options:
    """Teach Wan-Nano a new style, and show the result."""

    output_dir: Path = option(Path("outputs/nano_demo"), "where everything is written, in a new folder")
    samples: int = option(32, "number of prompts that are measured", minimum=1)
    seed: int = option(0, "seed of the dataset, the training and the prompts", minimum=0, maximum=2**31)


@dataclass(frozen=True)
class Trial:
    """One scene, its prompts without and with the trigger word, and the seed of the noise that all its videos share."""

    scene: Scene
    plain: str
    styled: str
    seed: int


# For each kind of prompt, "plain" and "styled" (with the trigger word), a video (F, 3, H, W) uint8 per trial.
Videos = dict[str, list[Tensor]]


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    check_writable(opts.output_dir)
    started = time.perf_counter()
    folder = opts.output_dir / time.strftime("%Y-%m-%d_%H-%M-%S")
    lora, comfy = train(folder, opts.seed), folder / f"{STYLE}_comfy.safetensors"
    run("convert_lora_to_comfy.py", "--input_lora", lora, "--output_lora", comfy)
    trials = make_trials(opts.samples, opts.seed)
    before, after = show(trials, lora)
    write(folder, trials, before, after)
    styled, plain = measure(trials, before, after)
    print_table(styled, plain)
    print(f"\nfinished in {time.perf_counter() - started:.0f} seconds; the trigger word is {STYLES[STYLE].trigger!r}")
    print(f"  picture       {folder / 'demo.png'}")
    print(f"  videos        {folder / 'videos'}")
    print(f"  LoRA          {lora}")
    print(f"  for ComfyUI   {comfy}")
    print(f"  TensorBoard   tensorboard --logdir {folder / 'runs'}")
    figures = {"concept": [shares["style"] for shares in styled], "adherence": [shares["all"] for shares in plain]}
    named = {
        f"{name}_{moment}": value for name, pair in figures.items() for moment, value in zip(MOMENTS, pair, strict=True)
    }
    print(json.dumps({name: round(value, 4) for name, value in named.items()}))


def train(folder: Path, seed: int) -> Path:
    """Writes the dataset, trains on it with the trainer's command line, and returns the file of the LoRA."""
    write_dataset(folder / "clips" / "train", CLIPS, seed, STYLE)
    write_dataset(folder / "clips" / "val", HELD_OUT, seed + 1, STYLE)
    print(f"wrote {CLIPS + HELD_OUT} clips to {folder / 'clips'}")
    preview = caption(split()[0][0], random.Random(seed), STYLE)
    watching = ["--sample_prompts", preview, "--sample_every", 150, "--sample_guidance", *SAMPLER.guidance]
    common = ["--dataset", folder / "clips", "--pretrained_model_name_or_path", MODEL, *watching]
    run("train_wan_lora.py", *common, "--cache_embeddings")
    run("train_wan_lora.py", *common, *TRAINING, "--output_dir", folder / "runs", "--seed", seed)
    return newest_lora(folder / "runs")


def newest_lora(output_dir: Path) -> Path:
    """The LoRA of the highest step that the runs in this folder have saved; averages do not count."""
    steps = {
        path: checkpoint.step
        for folder in output_dir.glob("*/checkpoints")
        for path, checkpoint in list_checkpoints(folder).items()
        if checkpoint.trainable == "lora" and not checkpoint.average
    }
    return max(steps, key=steps.__getitem__)


def run(script: str, *arguments: object) -> None:
    """Runs one of the project's scripts as a user would. Raises RunError if it fails."""
    given = [str(argument) for argument in arguments]
    shown = subprocess.list2cmdline(given) if os.name == "nt" else shlex.join(given)
    print(f"\n$ python {script} {shown}", flush=True)
    if subprocess.run([sys.executable, str(ROOT / script), *given], check=False).returncode:
        raise RunError(f"{script} ended with an error, see above")


def make_trials(count: int, seed: int) -> list[Trial]:
    """Trials of scenes that were withheld from the base model and are not in the dataset."""
    rng = random.Random(f"trials {seed}")
    _, withheld = split()
    trials = []
    for index in range(count):
        scene, phrasing = withheld[index % len(withheld)], rng.getrandbits(32)
        plain, styled = (caption(scene, random.Random(phrasing), style) for style in (None, STYLE))
        trials.append(Trial(scene, plain, styled, seed + index))
    return trials


def show(trials: Sequence[Trial], lora: Path) -> tuple[Videos, Videos]:
    """Generates the videos of all trials from the same noise: those without the LoRA, and those with it."""
    model, vae, encoder = load(MODEL, pick_device())
    noise = noise_of(vae, [trial.seed for trial in trials])
    texts = {kind: encoder.encode([getattr(trial, kind) for trial in trials]) for kind in ("styled", "plain")}
    (negative,) = encoder.encode([""])
    kinds = "with and without the trigger word, with and without the LoRA"
    print(f"\ngenerating {4 * len(trials)} videos: {kinds}", flush=True)
    before = {kind: generate(model, vae, rows, noise, negative) for kind, rows in texts.items()}
    fuse_lora(model, read_lora(lora))
    return before, {kind: generate(model, vae, rows, noise, negative) for kind, rows in texts.items()}


def measure(trials: Sequence[Trial], *moments: Videos) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The probe's figures before and after: for prompts with the trigger word, and for prompts without it.

    Prompts without the trigger word ask for shape, colours, motion, and no style.
    """
    scenes = [trial.scene for trial in trials]
    styled = [adherence(videos["styled"], scenes, STYLE) for videos in moments]
    return styled, [adherence(videos["plain"], scenes) for videos in moments]


def print_table(styled: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> None:
    """Prints every figure of the probe without and with the LoRA."""
    rows = [
        (f"{kind}: {name}", *(f"{shares[name]:.0%}" for shares in moments))
        for kind, moments in (("with the trigger word", styled), ("without it", plain))
        for name in moments[0]
    ]
    print("\n" + format_table(("videos that show what was asked", "without the LoRA", "with the LoRA"), rows))


def write(folder: Path, trials: Sequence[Trial], before: Videos, after: Videos) -> None:
    """Writes the picture and both videos of each of its rows. Every third row is a prompt without the trigger word."""
    rows = []
    for index, trial in enumerate(trials[:SHOWN]):
        kind = "plain" if index % 3 == 2 else "styled"
        rows.append((getattr(trial, kind), [before[kind][index], after[kind][index]]))
    save_image(folder / "demo.png", comparison(rows, ("without the LoRA", "with the LoRA")))
    (folder / "videos").mkdir()
    for number, (_, sides) in enumerate(rows, 1):
        for label, frames in zip(("without", "with"), sides, strict=True):
            write_video(folder / "videos" / f"{number}-{label}.mp4", frames, FPS)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""Experiments on small Wans, each in a folder of its own, where an interrupted one continues."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_wan_lora
from benchmarks.gpu_check import commit
from nano.demo import MODEL, ROOT
from nano.picture import comparison
from nano.pretrain_families import NANO, channels_of, first_frames, sampler_of
from nano.sampling import generate, noise_of
from nano.world import Scene, caption
from tests.checkout import copy_prompts
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_reader import read_lora
from utils.common.checkpoint_names import CHECKPOINTS, LORA, STATES, list_checkpoints
from utils.common.device import pick_device
from utils.common.files import replacing
from utils.media.frames import save_image
from wan.checkpoints import ModelFiles, load_text_encoder, load_transformer, load_vae, open_model
from wan.modules.model import WanModel
from wan.text2video import Sampler

PAIR = {"high_noise": NANO / "high_noise", "low_noise": MODEL}
COMMON = (
    "--output_dir runs --base_res 64 --batch_size 4 --lr_scheduler linear --val_samples 0 "
    "--checkpointing_steps 50 --keep_checkpoints 1"
)
ROWS = 6  # of a sheet

Figures = dict[str, dict[str, float]]


def experiment_folder(name: str, fallback: Path) -> Path:
    """Where an experiment on this commit, with its local changes, is kept; the `fallback` where that is not known."""
    version = commit(ROOT)
    if version == "unknown":
        return fallback
    folder = ROOT / "outputs" / "nano_families" / version.replace(" ", "_") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def enter_experiment(name: str, fallback: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an experiment's folder the working folder; embeddings of negative prompts are written beside a copy."""
    folder = experiment_folder(name, fallback)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(fallback / "embeddings"))
    return folder


def once(measure: Callable[[], Figures], folder: Path = Path()) -> Figures:
    """What is measured, now or by an earlier start, which has left it in the folder: the working folder by default."""
    path = folder / "figures.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure()
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures = json.loads(path.read_text(encoding="utf-8"))
    print()
    for name, values in figures.items():
        print(f"{name}: {', '.join(f'{what} {value:.3g}' for what, value in values.items())}")
    return figures


def image_to_video() -> dict[str, Path]:
    """The experts of the image-to-video model: its one transformer and a copy in the working folder."""
    copy = Path("low_noise").absolute()
    return {"high_noise": NANO / "i2v", "low_noise": shutil.copytree(NANO / "i2v", copy, dirs_exist_ok=True)}


def trained(flags: str, parts: dict[str, Path], source: str = "--dataset clips --cache_latents 1") -> dict[str, Path]:
    """The LoRA of each expert, or "lora", trained by the command line, on ./clips; an interrupted one continues."""
    given = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    model = [*source.split(), "--pretrained_model_name_or_path", str(MODEL), *given]
    resume = ["--resume_from_checkpoint", "latest"] if any(Path("runs").glob(f"*/{CHECKPOINTS}/{STATES}")) else []
    train_wan_lora.main([*model, *COMMON.split(), *flags.split(), *resume])
    # A run that was killed before its first state has left its folder behind.
    files = [item for folder in Path("runs").glob(f"*/{CHECKPOINTS}") for item in list_checkpoints(folder).items()]
    last = max(checkpoint.step for _, checkpoint in files)
    return {
        checkpoint.trainable: path for path, checkpoint in files if checkpoint.step == last and checkpoint.trainable
    }


class Stage:
    """A small model, by its experts or none, and what is sampled from it: a video for each scene.

    Each has a noise of its own, those of the seeds from `first_noise` on, whichever LoRAs the model has.
    """

    def __init__(
        self,
        parts: dict[str, Path],
        scenes: Sequence[Scene],
        seed: str,
        describe: Callable[[Scene, random.Random], str] = caption,
        first_noise: int = 0,
    ) -> None:
        self.files: ModelFiles = open_model(MODEL, **parts)
        self.scenes, self.device = scenes, pick_device()
        self.vae = load_vae(self.files, self.device)
        self.encoder = load_text_encoder(self.files, torch.float32, self.device)
        rng = random.Random(seed)
        self.prompts = [describe(scene, rng) for scene in scenes]
        (self.negative,) = self.encoder.encode([""])
        self.noise = noise_of(self.vae, range(first_noise, first_noise + len(scenes)))
        self.pictures = first_frames(scenes, seed) if self.files.family.given else []
        self.given = channels_of(self.pictures, self.vae) if self.pictures else []

    def models(self, loras: dict[str, Path]) -> list[WanModel]:
        """The transformers, from high noise to low, each with its LoRA, if there are any."""
        found = []
        for name, transformer in self.files.transformers.items():
            model = load_transformer(transformer, torch.float32, self.device)
            if loras:
                fuse_lora(model, read_lora(loras.get(name) or loras[LORA]))
            found.append(model)
        return found

    def film(
        self, loras: dict[str, Path], prompts: Sequence[str] | None = None, sampler: Sampler | None = None
    ) -> list[Tensor]:
        """Videos (F, 3, H, W) uint8, guided by these prompts or by those of the scenes."""
        texts, usual = self.encoder.encode(list(prompts or self.prompts)), sampler_of(self.files.family)
        given, negative = self.given or None, self.negative
        return generate(self.models(loras), self.vae, texts, self.noise, negative, given, sampler or usual)

    def film_unprompted(self, loras: dict[str, Path], controls: Sequence[Tensor] = ()) -> list[Tensor]:
        """Videos without prompt and guidance, which follow control latents (16, f, h, w), if there are any."""
        shown = [part for part in (self.given, controls) if part]
        channels = [torch.cat(parts) for parts in zip(*shown, strict=True)] or None
        texts, sampler = [self.negative] * len(self.scenes), sampler_of(self.files.family)
        unguided = replace(sampler, guidance=(1.0,) * len(sampler.guidance))
        return generate(self.models(loras), self.vae, texts, self.noise, None, channels, unguided)


def write_sheet(prompts: Sequence[str], columns: dict[str, Sequence[Tensor]]) -> None:
    """Writes sheet.png: a row for each of the first prompts, with its video (F, 3, H, W) uint8 in each column."""
    rows = [(prompt, [videos[row] for videos in columns.values()]) for row, prompt in enumerate(prompts[:ROWS])]
    save_image(Path("sheet.png"), comparison(rows, list(columns)))

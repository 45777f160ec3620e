"""Trains Wan-Nano from scratch and writes it in the official layout.

    python -m nano.pretrain --compile          writes nano/model; nano/states holds the state of the training

It takes a few hours on two CPU cores. If it is interrupted, the same command resumes it.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nano.pretrain_transformer import SHAPE, CaptionEncoder, ClipEncoders, train_transformer
from nano.pretrain_vae import train_vae
from nano.text_encoder import make_encoder, write_tokenizer
from nano.world import words
from utils.adapters.full_model import write_text_encoder, write_transformer, write_vae
from utils.common.console import say
from utils.common.device import pick_device
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script
from utils.common.temp_rng import MAX_SEED
from utils.encoding.text import negative_prompt_file, read_prompt
from wan.checkpoints import CheckpointError, ModelFiles, load_text_encoder, load_vae, read_weights
from wan.configs import FAMILIES

NANO = Path(__file__).resolve().parent
FAMILY = FAMILIES["wan2.1-t2v-1.3B"]  # Wan-Nano differs from it only in its widths


@dataclass(frozen=True)
class Options:
    """Train Wan-Nano from scratch."""

    model: Path = option(NANO / "model", "where the trained model is written")
    work: Path = option(NANO / "states", "where the state of the training is saved")
    seed: int = option(0, "seed of the initial weights", minimum=0, maximum=MAX_SEED)
    compile: bool = option(False, "compile the training steps: a quarter faster, requires a C++ compiler")


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    unfinished = opts.work / "model"
    for name, folder in (("--model", opts.model), ("--work", unfinished)):
        check_writable(folder, name)
        folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()
    vocab_size = write_tokenizer(unfinished / FAMILY.tokenizer, words())
    write_text_encoder(unfinished, make_encoder(vocab_size, opts.seed), FAMILY)
    write_vae(unfinished, train_vae(opts.work, device, opts.seed, opts.compile), FAMILY)
    # The transformer is trained with the VAE and the text encoder that are published, whose weights are bf16.
    files = encoder_files(unfinished)
    vae, encoder = load_vae(files, device), load_text_encoder(files, torch.float32, device)
    captions = CaptionEncoder(encoder, read_prompt(negative_prompt_file(FAMILY)))
    model = train_transformer(opts.work, opts.seed, ClipEncoders(vae, captions), opts.compile)
    write_transformer(unfinished, model, FAMILY)
    shutil.copytree(unfinished, opts.model, dirs_exist_ok=True)
    say(f"wrote {opts.model}")


def encoder_files(folder: Path) -> ModelFiles:
    """The files of a model in this folder that has no transformer yet."""
    vae, text_encoder = (read_weights(folder / getattr(FAMILY, part), part) for part in ("vae", "text_encoder"))
    return ModelFiles(str(folder), FAMILY, {}, vae, text_encoder, folder / FAMILY.tokenizer, SHAPE.text_len)


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""Trains Wan-Nano from nothing and writes it in the official layout.

    python -m nano.pretrain --compile          into nano/model, with the states of the training in nano/states

A few hours on two CPU cores. Interrupted, the same command goes on where it was.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nano.pretrain_transformer import SHAPE, Captions, train_transformer
from nano.pretrain_vae import train_vae
from nano.text_encoder import make_encoder, write_tokenizer
from nano.world import words
from utils.adapters.full_model import write_config, write_text_encoder, write_transformer, write_vae
from utils.common.device import pick_device
from utils.common.files import check_writable
from utils.common.options import option, parse_options, run_script
from utils.encoding.text import read_prompt
from wan.checkpoints import TOKENIZER, CheckpointError, load_config, load_text_encoder, load_vae

NANO = Path(__file__).resolve().parent
EMBEDDINGS = NANO.parent / "embeddings"


@dataclass(frozen=True)
class Options:
    """Train Wan-Nano from nothing."""

    model: Path = option(NANO / "model", "where the weights are written once all are trained")
    work: Path = option(NANO / "states", "where unfinished training is kept")
    seed: int = option(0, "seed of the starting weights", minimum=0, maximum=2**32 - 1)
    compile: bool = option(False, "compile the training steps: a quarter faster, where a C++ compiler is installed")


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    unfinished = opts.work / "model"
    for name, folder in (("--model", opts.model), ("--work", unfinished)):
        check_writable(folder, name)
        folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()
    vocab_size = write_tokenizer(unfinished / TOKENIZER, words())
    write_text_encoder(unfinished, make_encoder(vocab_size, opts.seed))
    write_config(unfinished, SHAPE)
    write_vae(unfinished, train_vae(opts.work, device, opts.seed, opts.compile))
    # What is trained next meets the VAE and the text encoder as they ship: rounded to bf16.
    vae = load_vae(unfinished, device)
    encoder = load_text_encoder(unfinished, SHAPE.text_len, torch.float32, device)
    negative = read_prompt(EMBEDDINGS / load_config(unfinished).negative_prompt)
    captions = Captions(encoder, negative)
    write_transformer(unfinished, train_transformer(opts.work, opts.seed, vae, captions, opts.compile))
    shutil.copytree(unfinished, opts.model, dirs_exist_ok=True)
    print(f"wrote {opts.model}")


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

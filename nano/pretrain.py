"""Trains Wan-Nano from nothing and writes it in the official layout.

    python -m nano.pretrain                    into nano/model, with the states of the training in nano/work
    python -m nano.pretrain --model M --work W

A few hours on two CPU cores. Interrupted, the same command goes on where it was; a finished stage is not repeated.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nano.official_layout import write_text_encoder, write_transformer, write_vae
from nano.pretrain_transformer import SHAPE, Captions, train_transformer
from nano.pretrain_vae import train_vae
from nano.text_encoder import make_encoder, write_tokenizer
from nano.world import words
from utils.atomic import require_writable
from utils.device import pick_device
from utils.options import option, parse_options, run_script
from utils.text import read_prompt
from wan.checkpoints import TOKENIZER, VAE, load_text_encoder, load_vae
from wan.configs import find_config

NANO = Path(__file__).resolve().parent
EMBEDDINGS = NANO.parent / "embeddings"


@dataclass(frozen=True)
class Options:
    """Train Wan-Nano from nothing."""

    model: Path = option(NANO / "model", "where the weights are written")
    work: Path = option(NANO / "work", "where unfinished training is kept")
    seed: int = option(0, "seed of the starting weights", minimum=0)


def main(argv: Sequence[str] | None = None) -> None:
    opts = parse_options(Options, argv)
    for folder in (opts.model, opts.work):
        require_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    device = pick_device()
    vocab_size = write_tokenizer(opts.model / TOKENIZER, words())
    write_text_encoder(opts.model, make_encoder(vocab_size, opts.seed))
    if not (opts.model / VAE).exists():
        write_vae(opts.model, train_vae(opts.work, device, opts.seed))
    # What is trained next meets the VAE and the text encoder as they ship: rounded to bf16.
    vae = load_vae(opts.model, device)
    negative = read_prompt(EMBEDDINGS / find_config("t2v", SHAPE.in_dim).negative_prompt)
    encoder = load_text_encoder(opts.model, SHAPE.text_len, vae.conv2.weight.dtype, device)
    write_transformer(opts.model, train_transformer(opts.work, opts.seed, vae, Captions(encoder, negative)))
    print(f"wrote {opts.model}")


if __name__ == "__main__":
    sys.exit(run_script(main))

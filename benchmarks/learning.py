"""Whether LoRAs learn as much on quantised bases: the demo's style, on the small Wan that ships with the project.

    python -m benchmarks.learning [--output_dir outputs/learning]

For each of three seeds a dataset as the demo writes it, and a LoRA trained on each base with the trainer's command line
and the demo's settings: once with the weights of the file, which are bf16, and once in each format. Computed is in fp32
on the CPU, in bf16 on a GPU, on all bases alike. Then videos of all combinations that were withheld from the base, each
from two noises, the same for all rows. The probe says of each video whether it shows the style.

A row is a base and the LoRA that acts beside it: the one trained on it, or the one trained on the unquantised base.
Differences to the reference, the unquantised base with its own LoRA, are paired by combination, noise and seed.
Their interval is over the combinations. The exit code is 1 where its lower end is below the limit.

Each LoRA and the outcomes of each row are kept in the output folder. The same command continues with what is missing.
"""

import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor, nn

from benchmarks.gpu_check import commit
from benchmarks.training import LOG, run_trainer
from nano.demo import CLIPS, HELD_OUT, MODEL, ROOT, STYLE, TRAINING, Trial, make_trials, newest_lora
from nano.probe import read
from nano.sampling import BATCH, generate, noise_of
from nano.world import split, write_dataset
from utils.adapters.beside import Chosen, beside
from utils.adapters.lora_reader import read_lora
from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import describe, pick_device
from utils.common.errors import RunError, UserError
from utils.common.files import check_writable, replacing
from utils.common.options import option, parse_options, run_script
from utils.storage.linear import QuantisedLinear
from utils.storage.load import Store
from utils.storage.weights import Storage, StorageOptions
from wan.checkpoints import (
    CheckpointError,
    ModelFiles,
    build_transformer,
    cast_to,
    load_text_encoder,
    load_vae,
    open_model,
)
from wan.modules.model import WanModel, WanShape
from wan.modules.vae import WanVAE

SEEDS = (0, 1, 2)
NOISES = 2
UNQUANTISED = "auto"  # what --weight_dtype calls it
# How many layers of a block hold codes of which dtype: four of each attention, two of the feed-forward part.
CODES = {
    UNQUANTISED: {},
    "int8": {torch.int8: 10},
    "fp8_scaled": {torch.int8: 9, torch.float8_e4m3fn: 1},
    "nf4": {torch.int8: 8, torch.uint8: 2},
}
FORMATS = tuple(base for base in CODES if base != UNQUANTISED)
LINEAR = 10  # linear layers of a block
OTHERS = 6  # those outside blocks: two each for the text and the time, the time's projection, the head
LIMIT = -5.0  # in points, for the lower end of the interval of a LoRA trained on the format
CONFIDENCE = 0.95
HEADER = ("base", "LoRA trained on", "linear layers quantised", "videos that show the style",
          "difference to the reference, points", "95% interval", "difference by seed", "limit")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure whether LoRAs learn as much on quantised bases."""

    output_dir: Path = option(Path("outputs/learning"), "where LoRAs, outcomes and the table are written, and kept")


@dataclass(frozen=True)
class Row:
    """What is sampled from: a base, and the base on which its LoRA was trained."""

    base: str
    lora: str

    @property
    def name(self) -> str:
        return f"{self.base}_with_lora_of_{self.lora}"


REFERENCE = Row(UNQUANTISED, UNQUANTISED)
ROWS = (REFERENCE, *(Row(base, lora) for base in FORMATS for lora in (base, UNQUANTISED)))


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError for a folder that holds what another commit or device has measured, RunError as `report`."""
    opts = parse_options(Options, argv)
    folder, device = opts.output_dir, pick_device()
    check_writable(folder)
    claim(folder, {"commit": commit(ROOT), "device": describe(device), "torch": torch.__version__})
    started = time.perf_counter()
    files = open_model(MODEL)
    bases = {base: storage_of(base, files.transformer.shape, device) for base in CODES}
    studio = Studio(files, device)
    for seed in SEEDS:
        for base in CODES:
            train(folder, seed, base, files.transformer.shape)
        for row in ROWS:
            path = outcome_file(folder, seed, row)
            if not path.exists():
                say(f"seed {seed}, sampling {row.name}")
                write_json(path, studio.film(row, bases[row.base], lora_file(folder, seed, row.lora)))
    say(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    report(folder)


def claim(folder: Path, run: dict[str, str]) -> None:
    """Says whose measurements the folder holds. Raises UserError where they are another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else run
    if before != run:
        raise UserError(f"{folder} holds measurements of {before}, this is {run}\ngive another --output_dir")
    write_json(path, run)


def write_json(path: Path, content: object) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")


def lora_file(folder: Path, seed: int, base: str) -> Path:
    return folder / f"seed_{seed}" / f"{base}.safetensors"


def outcome_file(folder: Path, seed: int, row: Row) -> Path:
    return folder / f"seed_{seed}" / f"{row.name}.json"


# ---------------------------------------------------------------------------------------------------------- training


def train(folder: Path, seed: int, base: str, shape: WanShape) -> None:
    """Trains the LoRA of a seed on a base, unless it is there. Raises RunError where the trainer fails."""
    target = lora_file(folder, seed, base)
    if target.exists():
        return
    clips, runs = target.parent / "clips", target.with_name(f"{base}_runs")
    write_clips(clips, seed)
    shutil.rmtree(runs, ignore_errors=True)  # of a start that was interrupted
    say(f"seed {seed}, training on {base}")
    run_trainer(runs, clips, seed, *TRAINING, "--weight_dtype", base)
    check_said((runs / LOG).read_text(encoding="utf-8"), base, shape)
    with replacing(target) as unfinished:
        shutil.copyfile(newest_lora(runs), unfinished)


def write_clips(folder: Path, seed: int) -> None:
    """Writes the demo's dataset of a seed, unless it is there."""
    if folder.exists():
        return
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_dataset(unfinished / "train", CLIPS, seed, STYLE)
    write_dataset(unfinished / "val", HELD_OUT, seed + 1, STYLE)
    unfinished.rename(folder)


def check_said(log: str, base: str, shape: WanShape) -> None:
    """Raises RunError unless the trainer has said that it quantised all linear layers of the blocks."""
    said = re.findall(r"(\w+): (\d+) of (\d+) linear layers are quantised", log)
    count = shape.num_layers * sum(CODES[base].values())
    wanted = [(base, str(count), str(expected_linear(shape)))] if count else []
    if said != wanted:
        raise RunError(f"the trainer should have quantised {wanted}, and says {said}")


# ---------------------------------------------------------------------------------------------------------- sampling


class Studio:
    """What all rows share: prompts, noises, encoders."""

    def __init__(self, files: ModelFiles, device: torch.device) -> None:
        self.files, self.device = files, device
        self.trials: list[Trial] = make_trials(NOISES * len(split()[1]), 0)
        encoder = load_text_encoder(files, torch.float32, device)
        self.texts = encoder.encode([trial.styled for trial in self.trials])
        (self.negative,) = encoder.encode([""])
        self.vae: WanVAE = load_vae(files, device)
        self.noise: Tensor = noise_of(self.vae, [trial.seed for trial in self.trials])

    def film(self, row: Row, storage: Storage, lora: Path) -> dict[str, object]:
        """Which videos show the style, 0 or 1 in the order of the trials, and how the layers were held."""
        started = time.perf_counter()
        model = build_transformer(self.files.transformer)
        Store(storage).load(model, self.files.transformer, cast_to)
        check_codes(model, row.base)
        with beside(model, [Chosen(read_lora(lora), 1.0)], self.device):
            videos = generate(model, self.vae, self.texts, self.noise, self.negative)
        return {
            "shown": [int(read(video).style == STYLE) for video in videos],
            "quantised": [sum(codes_of(model).values()), count_linear(model)],
            "codes": {str(dtype).removeprefix("torch."): count for dtype, count in codes_of(model).items()},
            "computed_in": str(storage.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - started),
        }


def storage_of(base: str, shape: WanShape, device: torch.device) -> Storage:
    """How a base is held, as the trainer and the test script hold it. Raises UserError where a library is missing."""
    tokens = BATCH * 5 * 4 * 4  # of a batch of videos of 17 frames of 64x64
    return StorageOptions(weight_dtype=base).storage(device, shape, tokens, Decisions(str(device)))


def codes_of(model: nn.Module) -> Counter[torch.dtype]:
    """How many linear layers hold codes of which dtype."""
    return Counter(module.weight.dtype for module in model.modules() if isinstance(module, QuantisedLinear))


def count_linear(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def expected_linear(shape: WanShape) -> int:
    return LINEAR * shape.num_layers + OTHERS


def check_codes(model: WanModel, base: str) -> None:
    """Raises RunError unless exactly the linear layers of the blocks hold codes, each of the dtype that it should."""
    wanted = {dtype: model.shape.num_layers * count for dtype, count in CODES[base].items()}
    found, linear, every = codes_of(model), count_linear(model), expected_linear(model.shape)
    if found != wanted or linear != every:
        raise RunError(f"{base}: {wanted} of {every} linear layers should hold codes, and {found} of {linear} do")


# -------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Difference:
    """Of a row to the reference, in points of the share of videos."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]


def compare(row: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], combinations: int) -> Difference:
    """The paired difference of outcomes, one sequence of 0 and 1 for each seed.

    The outcome at i is of combination i modulo `combinations`. Noises and seeds of a combination are averaged first:
    they are not independent. The interval is Student's, of the means of the combinations.
    """
    pairs = [[100.0 * (a - b) for a, b in zip(*seeds, strict=True)] for seeds in zip(row, reference, strict=True)]
    by_combination = [fmean(value for seed in pairs for value in seed[i::combinations]) for i in range(combinations)]
    mean = fmean(by_combination)
    half = student(CONFIDENCE, combinations - 1) * stdev(by_combination) / combinations**0.5
    return Difference(mean, mean - half, mean + half, tuple(map(fmean, pairs)))


def student(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t: Abramowitz and Stegun 26.7.5, within 1e-4 from 10 degrees of freedom."""
    x = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / freedom**power for power, term in enumerate(terms, 1))


def report(folder: Path) -> None:
    """Prints the table, and writes learning.json. Raises RunError where a limit is missed."""
    combinations = len(split()[1])
    outcomes = {
        row: [json.loads(outcome_file(folder, seed, row).read_text(encoding="utf-8")) for seed in SEEDS] for row in ROWS
    }
    shown = {row: [each["shown"] for each in seeds] for row, seeds in outcomes.items()}
    differences = {row: compare(shown[row], shown[REFERENCE], combinations) for row in ROWS[1:]}
    missed = [row.base for row, found in differences.items() if row.lora == row.base and not found.low > LIMIT]
    lines, entries = [HEADER, ("---",) * len(HEADER)], []
    for row, seeds in outcomes.items():
        held = {key: seeds[0][key] for key in ("quantised", "codes", "computed_in")}
        shares = [100 * fmean(seed) for seed in shown[row]]
        found = differences.get(row)
        entries.append(vars(row) | held | {"shares": shares} | ({} if found is None else vars(found)))
        codes = ", ".join(f"{count} {dtype}" for dtype, count in held["codes"].items())
        layers = "{} of {}".format(*held["quantised"]) + (f": {codes}" if codes else "")
        cells = ("", "", "", "") if found is None else _cells(row, found)
        lines.append((_named(row.base), _named(row.lora), layers, f"{fmean(shares):.2f}%", *cells))
    say("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    say(f"the intervals are over {combinations} combinations; {len(SEEDS)} seeds are few, and say little about others")
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "learning.json", run | {"seeds": SEEDS, "combinations": combinations, "rows": entries})
    if missed:
        raise RunError(f"the lower end of the interval is not above {LIMIT:g} points: {', '.join(missed)}")


def _cells(row: Row, found: Difference) -> tuple[str, ...]:
    """Those of a difference. There is a limit for LoRAs that were trained on the format."""
    limit = "" if row.lora != row.base else f"{LIMIT:g}{'' if found.low > LIMIT else ', missed'}"
    by_seed = ", ".join(f"{each:+.2f}" for each in found.by_seed)
    return f"{found.mean:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", by_seed, limit


def _named(base: str) -> str:
    return "unquantised" if base == UNQUANTISED else base


if __name__ == "__main__":
    sys.exit(run_script(main, bad_input=(CheckpointError,)))

"""The command that measures what LoRAs learn on quantised bases: all of it but the training and the sampling."""

import json
import random
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import learning
from benchmarks.learning import (
    CODES,
    NOISES,
    REFERENCE,
    ROWS,
    SEEDS,
    UNQUANTISED,
    Row,
    Studio,
    check_codes,
    check_said,
    compare,
    outcome_file,
    storage_of,
    student,
    train,
)
from nano.demo import MODEL, TRAINING
from nano.world import Scene, render, split, to_frames
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.errors import RunError, UserError
from utils.common.options import run_script
from utils.storage.load import Store
from wan.checkpoints import build_transformer, cast_to, open_model
from wan.modules.model import WanModel

CPU = torch.device("cpu")
FILES = open_model(MODEL)
SHAPE = FILES.transformer.shape
WITHHELD = len(split()[1])


def held(base: str) -> WanModel:
    model = build_transformer(FILES.transformer)
    Store(storage_of(base, SHAPE, CPU)).load(model, FILES.transformer, cast_to)
    return model


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),
    [(0.95, 10, 2.22814), (0.95, 30, 2.04227), (0.95, 153, 1.97559), (0.99, 60, 2.66028)],
)
def test_the_quantiles_are_those_of_tables(confidence, freedom, quantile):
    assert student(confidence, freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_difference_and_its_interval_are_those_of_a_calculation_by_hand():
    # 11 combinations, 2 noises, 2 seeds: one combination loses all four videos, one wins one of four.
    reference = [[1] * 10 + [0] + [1] * 10 + [1]] * 2
    row = [[0] + [1] * 9 + [1] + [0] + [1] * 9 + [1], [0] + [1] * 9 + [0] + [0] + [1] * 9 + [1]]
    found = compare(row, reference, 11)
    # Combinations differ by -100 (once), +25 (once), 0 (nine times).
    mean = -75 / 11
    variance = (10_000 + 625 - 11 * mean**2) / 10
    half = 2.22814 * (variance / 11) ** 0.5
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert found.by_seed == pytest.approx((-100 / 22, -200 / 22))


def test_noises_and_seeds_that_agree_do_not_narrow_the_interval():
    rng = random.Random(0)
    once, reference = ([rng.randint(0, 1) for _ in range(20)] for _ in range(2))
    assert compare([once * 2] * 3, [reference * 2] * 3, 20).low == pytest.approx(compare([once], [reference], 20).low)


def test_pairs_that_do_not_differ_have_an_interval_of_one_point():
    outcomes = [[1, 0, 1, 1] * 5] * 3
    found = compare(outcomes, outcomes, 10)
    assert (found.low, found.mean, found.high) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------- what is quantised


@pytest.mark.parametrize(
    ("base", "codes"),
    [
        (UNQUANTISED, {}),
        ("int8", {torch.int8: 80}),
        ("fp8_scaled", {torch.int8: 72, torch.float8_e4m3fn: 8}),
        ("nf4", {torch.int8: 64, torch.uint8: 16}),
    ],
)
def test_80_of_86_linear_layers_hold_codes_of_the_expected_dtypes(base, codes):
    model = held(base)
    check_codes(model, base)
    assert learning.codes_of(model) == codes and learning.count_linear(model) == 86
    assert sum(codes.values()) in (0, 80)


@pytest.mark.parametrize("storage", [{"keeps_ends": True}, {"format": None}, {"format": "nf4"}])
def test_a_model_whose_layers_are_held_otherwise_is_refused(storage):
    model = build_transformer(FILES.transformer)
    Store(replace(storage_of("int8", SHAPE, CPU), **storage)).load(model, FILES.transformer, cast_to)
    with pytest.raises(RunError, match="86 linear layers should hold codes"):
        check_codes(model, "int8")


def test_the_trainer_must_have_said_how_many_layers_it_quantised():
    said = "reading\nint8: 80 of 86 linear layers are quantised, 4.80 MB; the others take 1.47 MB\n"
    check_said(said, "int8", SHAPE)
    check_said("reading\n", UNQUANTISED, SHAPE)
    for log, base in ((said, "nf4"), (said, UNQUANTISED), ("", "int8"), (said.replace("80", "60"), "int8")):
        with pytest.raises(RunError, match="the trainer should have quantised"):
            check_said(log, base, SHAPE)


# ---------------------------------------------------------------------------------------------------------- training


class Trainer:
    """In place of the process of the trainer: writes a LoRA file, and says what it quantised."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, list[list[str]]()

    def __call__(self, command, stdout, check):
        self.calls.append(command)
        given = dict(zip(command, command[1:], strict=False))
        base, runs = given["--weight_dtype"], Path(given["--output_dir"])
        assert len(list(Path(given["--dataset"]).glob("*/*.txt"))) == 52
        if base in CODES and base != UNQUANTISED:
            stdout.write(f"{base}: 80 of 86 linear layers are quantised\n")
        checkpoints = runs / "run" / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "wan-lora-00000300.safetensors").write_text(f"{base} {given['--seed']}")
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    def write(folder: Path, count: int, seed: int, style: str) -> None:
        folder.mkdir(parents=True)
        for index in range(count):
            (folder / f"{index}.txt").write_text(f"{style} {seed}")

    trainer = Trainer()
    monkeypatch.setattr(learning, "write_dataset", write)
    monkeypatch.setattr(subprocess, "run", trainer)
    return trainer


def test_a_lora_is_trained_once_with_the_demos_settings(tmp_path, trainer):
    stale = tmp_path / "seed_1" / "int8_runs" / "run" / "checkpoints"
    stale.mkdir(parents=True)
    (stale / "wan-lora-00000450.safetensors").write_text("of a start that was interrupted")
    for _ in range(2):
        train(tmp_path, 1, "int8", SHAPE)
    (command,) = trainer.calls
    assert (tmp_path / "seed_1" / "int8.safetensors").read_text() == "int8 1"
    assert " ".join(TRAINING) in " ".join(command) and str(MODEL) in command
    captions = {path.read_text() for path in (tmp_path / "seed_1" / "clips").rglob("*.txt")}
    assert captions == {"sunset 1", "sunset 2"}


def test_a_training_that_fails_leaves_no_lora(tmp_path, trainer):
    trainer.code = 2
    with pytest.raises(RunError, match=r"train_wan_lora.py ended with an error, see above and .*log.txt"):
        train(tmp_path, 0, "nf4", SHAPE)
    assert not (tmp_path / "seed_0" / "nf4.safetensors").exists()
    trainer.code = 0
    train(tmp_path, 0, "nf4", SHAPE)
    assert (tmp_path / "seed_0" / "nf4.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------- sampling


def test_every_combination_has_two_noises_and_the_probe_says_what_shows_the_style(tmp_path, monkeypatch):
    scene, answers = Scene("circle", "red", "black", "left"), []
    pairs = {"blocks.0.ffn.2": LoraPair(torch.ones(1, SHAPE.ffn_dim), torch.ones(SHAPE.dim, 1), 1.0)}
    write_lora(tmp_path / "lora.safetensors", LoraFile(pairs))

    def generate(model: WanModel, vae, texts, noise, negative) -> list[Tensor]:
        with torch.no_grad():
            answers.append(model(noise[:1], torch.tensor([500.0]), texts[0][None]))
        return [to_frames(render(scene, random.Random(0), "sunset" if i < 3 else None)) for i in range(len(texts))]

    monkeypatch.setattr(learning, "generate", generate)
    withheld = split()[1][:5]
    monkeypatch.setattr(learning, "split", lambda: ([], withheld))
    studio = Studio(FILES, CPU)
    assert [trial.scene for trial in studio.trials] == split()[1][:10]  # ten of 154
    assert len(studio.texts) == len(studio.noise) == NOISES * 5

    storage = storage_of("nf4", SHAPE, CPU)
    outcome = studio.film(Row("nf4", "int8"), storage, tmp_path / "lora.safetensors")
    assert outcome["shown"] == [1] * 3 + [0] * 7
    assert outcome["quantised"] == [80, 86] and outcome["codes"] == {"int8": 64, "uint8": 16}
    assert outcome["computed_in"] == "float32"
    with torch.no_grad():
        base = held("nf4")(studio.noise[:1], torch.tensor([500.0]), studio.texts[0][None])
    assert not torch.allclose(answers[0], base, atol=0.01)  # the LoRA acts
    with pytest.raises(RunError, match="should hold codes"):
        studio.film(Row("int8", "int8"), storage, tmp_path / "lora.safetensors")


def test_trials_repeat_the_combinations_in_their_order_with_other_noises():
    trials = learning.make_trials(NOISES * WITHHELD, 0)
    assert WITHHELD == 154
    assert [trial.scene for trial in trials] == split()[1] * NOISES
    assert len({trial.seed for trial in trials}) == NOISES * WITHHELD


# ---------------------------------------------------------------------------------------------------------- the command


class Films:
    """In place of the studio: outcomes by row, and an interruption."""

    def __init__(self, *given: object) -> None:
        self.rows = list[Row]()

    def film(self, row: Row, storage, lora: Path) -> dict[str, object]:
        if len(self.rows) == FILMED_BEFORE_INTERRUPTION:
            raise KeyboardInterrupt
        self.rows.append(row)
        assert storage.format == (None if row.base == UNQUANTISED else row.base)
        assert lora.read_text() == f"{row.lora} {lora.parent.name[-1]}"
        shown = [1] * (NOISES * WITHHELD)
        if row in (Row("nf4", "nf4"), Row("int8", UNQUANTISED)):
            shown[:20] = [0] * 20  # 6.5 points in each seed
        codes = {str(dtype): 8 * count for dtype, count in CODES[row.base].items()}
        return {"shown": shown, "quantised": [sum(codes.values()), 86], "codes": codes, "computed_in": "float32"}


FILMED_BEFORE_INTERRUPTION = 11


def test_an_interrupted_command_goes_on_with_what_is_missing_and_names_a_missed_limit(
    tmp_path, monkeypatch, capsys, trainer
):
    studios = list[Films]()
    monkeypatch.setattr(learning, "Studio", lambda *given: studios.append(Films()) or studios[-1])
    monkeypatch.setattr(learning, "commit", lambda root: "abc")
    run = partial(learning.main, ["--output_dir", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(trainer.calls) == 8  # two seeds
    assert run_script(run) == 1
    assert len(trainer.calls) == len(CODES) * len(SEEDS)
    assert [len(studio.rows) for studio in studios] == [11, 10]
    captured = capsys.readouterr()
    assert "is not above -5 points: nf4\n" in captured.err
    lines = captured.out.splitlines()
    assert "| unquantised | unquantised | 0 of 86 | 100.00% |  |  |  |  |" in lines
    ends = {tuple(line.split(" | ")[:2]): line.split(" | ", 4)[-1] for line in lines if line.startswith("| ")}
    assert ends["| nf4", "nf4"].endswith("| -6.49, -6.49, -6.49 | -5, missed |")
    assert ends["| int8", "unquantised"].endswith("| -6.49, -6.49, -6.49 |  |")
    assert ends["| int8", "int8"] == "+0.00 | +0.00 to +0.00 | +0.00, +0.00, +0.00 | -5 |"
    written = json.loads((tmp_path / "learning.json").read_text())
    assert [(row["base"], row["lora"]) for row in written["rows"]] == [(row.base, row.lora) for row in ROWS]
    assert written["commit"] == "abc" and written["rows"][0]["shares"] == [100.0] * 3
    assert written["rows"][1]["low"] == 0 and written["rows"][5]["by_seed"] == pytest.approx([-2000 / 308] * 3)
    assert outcome_file(tmp_path, 2, REFERENCE).exists()


def test_a_folder_with_what_another_commit_has_measured_is_refused_and_kept(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"commit": "another"}')
    monkeypatch.setattr(learning, "Studio", None)
    with pytest.raises(UserError, match=r"holds measurements of .*another.*\ngive another --output_dir"):
        learning.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "run.json").read_text() == '{"commit": "another"}'

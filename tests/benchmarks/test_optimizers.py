"""The command that measures how many steps optimizers need: its runs, its search, its table."""

import json
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import optimizers
from benchmarks.optimizers import (
    EVERY,
    KINDS,
    PROMPTS,
    SEEDS,
    STEPS,
    STYLE,
    WANTED,
    Studio,
    figures_file,
    measured,
    report,
    train,
)
from utils.common.errors import RunError


def trainer(calls: list[list[str]], last: int = STEPS):
    """Stands for the trainer: writes a LoRA and a state for each checkpoint."""

    def run(command, stdout, check):
        calls.append(command)
        folder = Path(command[command.index("--output_dir") + 1]) / "run" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(EVERY, last + 1, EVERY):
            for name in ("wan-lora", "state"):
                (folder / f"{name}-{step:08d}.safetensors").touch()
        return subprocess.CompletedProcess(command, 0)

    return run


@pytest.fixture(autouse=True)
def clips(monkeypatch) -> None:
    monkeypatch.setattr(optimizers, "write_clips", lambda clips, seed: clips.mkdir(parents=True, exist_ok=True))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_run_has_the_options_of_its_optimizer_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, kind):
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", trainer(calls))
    loras = train(tmp_path, 1, kind, kind.rates[1])
    assert list(loras) == list(range(EVERY, STEPS + 1, EVERY))
    assert train(tmp_path, 1, kind, kind.rates[1]) == loras
    first, again = calls
    assert again == [*first, "--resume_from_checkpoint", "latest"]
    assert " ".join(first).endswith(f"{kind.flags} --learning_rate {kind.rates[1]}")
    assert first[first.index("--seed") + 1] == "1"


def test_a_run_without_all_of_its_checkpoints_ends_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", trainer([], last=STEPS - EVERY))
    with pytest.raises(RunError, match="has written checkpoints of the steps"):
        train(tmp_path, 0, KINDS[0], 1e-3)


@pytest.mark.parametrize("guess", [20, 60, 120, STEPS, STEPS + 1])
@pytest.mark.parametrize("first", [*range(EVERY, STEPS + 1, EVERY), None])
def test_the_first_checkpoint_that_shows_the_style_is_found_by_few_measurements(first, guess):
    loras = {step: Path(str(step)) for step in range(EVERY, STEPS + 1, EVERY)}
    counts = {step: WANTED if first is not None and step >= first else WANTED - 1 for step in loras}
    asked: list[int] = []

    def shown(path: Path) -> list[bool]:
        asked.append(int(path.name))
        return [True] * counts[asked[-1]] + [False] * (PROMPTS - counts[asked[-1]])

    found = measured(loras, shown, guess)
    assert found == {"steps": first, "counted": {str(step): f"{counts[step]} of {PROMPTS}" for step in asked}}
    assert len(asked) <= (2 if first == guess or (first is None and guess > STEPS) else 8)


@pytest.mark.parametrize(
    ("pattern", "videos"), [("x" * PROMPTS, 64), ("." * PROMPTS, 16), ("x." * 32, 32), ("x" * 51 + "." * 13, 64)]
)
def test_no_more_videos_are_made_than_decide(monkeypatch, pattern, videos):
    made: list[int] = []

    def generate(model, vae, texts, noise, negative, sampler):
        made.extend(texts)
        return texts

    monkeypatch.setattr(optimizers, "load_transformer", lambda *given: None)
    monkeypatch.setattr(optimizers, "fuse_lora", lambda *given: None)
    monkeypatch.setattr(optimizers, "read_lora", lambda path: None)
    monkeypatch.setattr(optimizers, "generate", generate)
    monkeypatch.setattr(optimizers, "read", lambda video: Mock(style=STYLE if pattern[video] == "x" else "other"))
    studio = object.__new__(Studio)
    studio.files, studio.device, studio.vae, studio.negative = Mock(), None, None, None
    studio.texts = studio.noise = list(range(PROMPTS))
    assert studio.shown(Path("lora")) == [letter == "x" for letter in pattern[:videos]]
    assert made == list(range(videos))


def test_the_table_marks_the_rate_that_needs_the_fewest_steps(tmp_path, capsys):
    for kind in KINDS:
        for place, rate in enumerate(kind.rates):
            for seed in SEEDS:
                path = figures_file(tmp_path, seed, kind, rate)
                path.parent.mkdir(exist_ok=True)
                steps = None if place == 2 else 100 - 40 * place + 20 * seed
                path.write_text(json.dumps({"steps": steps, "counted": {}}))
    (tmp_path / "run.json").write_text('{"commit": "x"}')
    report(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "| AdamW | 0.001 | 120 ± 20 | 100, 120, 140 |"
    assert said[3] == "| AdamW | 0.002 (best) | 80 ± 20 | 60, 80, 100 |"
    assert said[4] == f"| AdamW | 0.004 | {STEPS + 1} ± 0 | {', '.join([f'more than {STEPS}'] * 3)} |"
    assert len(said) == 2 + 3 * len(KINDS)
    rows = json.loads((tmp_path / "optimizers.json").read_text())["rows"]
    assert [row["best"] for row in rows] == [kind.rates[1] for kind in KINDS]

"""What small Wans keep in four steps without guidance, by the side of twenty with it. Each test takes minutes.

Prompts that name all of a scene leave nothing open: there the undistilled model does as well in four steps as in
twenty. What it loses shows where prompts leave the colours open: they become the mean of all colours, a gray.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
from torch import Tensor

from nano.measures import adherence_in_any_colours, speed, variety, variety_of_colours
from nano.pretrain_families import sampler_of
from nano.probe import adherence
from nano.world import Scene, caption, colourless_caption, split, write_dataset
from tests.experiments import PAIR, ROWS, Figures, Stage, enter_experiment, once, trained, write_sheet

TESTED = split()[1]
CLIPS, STEPS, COLOURLESS = 256, 4, 0.75
COLOURS = ("shape's colour", "background's colour")
NANO: dict[str, Path] = {}  # the model with one transformer
COMMON = (
    f"--few_step --denoising_steps {STEPS} --few_step_shift 5 --real_guidance_scale 1.25 --gen_update_interval 8 "
    "--learning_rate 2e-3 --learning_rate_critic 2e-3 --critic_alignment 0.1 --lora_target all-linear --lora_rank 16 "
    "--val_samples 1 --val_steps 400"
)
ALONE = f"{COMMON} --max_train_steps 1600"
IN_TURNS = f"{COMMON} --max_train_steps 1000 --expert_phase_steps 50"
CLIPS_GIVEN = "--dataset clips --cache_latents 1"
PROMPTS_GIVEN = "--prompts prompts.txt --distill_input rollout --prompt_shape 1:1 --max_frames 17"
pytestmark = pytest.mark.nano_distill


@pytest.fixture(autouse=True)
def folder(request, tmp_path, monkeypatch) -> Path:
    """The working folder of the test's experiment."""
    return enter_experiment(request.node.name, tmp_path, monkeypatch)


def stages(parts: dict[str, Path], scenes: Sequence[Scene] = TESTED) -> dict[str, Stage]:
    """Prompts of these scenes that name all, and those that leave the colours open: two noises for each scene."""
    found = {"named": (caption, 0), "colourless": (colourless_caption, len(TESTED))}
    return {name: Stage(parts, scenes, f"few steps, {name}", *how) for name, how in found.items()}


def measured(name: str, videos: Sequence[Tensor]) -> dict[str, float]:
    """What is compared of the videos of a stage."""
    found = {"speed": speed(videos, TESTED)} | variety(videos, TESTED)
    if name == "named":
        return adherence(videos, TESTED) | found
    return adherence_in_any_colours(videos, TESTED) | found | variety_of_colours(videos)


def film(stage: Stage, loras: dict[str, Path], steps: int = 20, guidance: float = 2.5) -> list[Tensor]:
    usual = sampler_of(stage.files.family)
    few = replace(usual, solver="lcm", steps=steps, guidance=(guidance,) * len(usual.guidance))
    return stage.film(loras, sampler=usual if steps == 20 else few)


def references(parts: dict[str, Path]) -> Figures:
    figures = {}
    for name, stage in stages(parts).items():
        figures[f"teacher, {name}"] = measured(name, film(stage, {}))
        figures[f"undistilled, {name}"] = measured(name, film(stage, {}, STEPS, 1.0))
        figures[f"undistilled and guided, {name}"] = measured(name, film(stage, {}, STEPS))
    return figures


def student(parts: dict[str, Path], flags: str, source: str) -> Figures:
    write_dataset(Path("clips"), CLIPS, seed=1, colourless_share=COLOURLESS)
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path("clips").glob("*.txt"))]
    Path("prompts.txt").write_text("".join(texts), encoding="utf-8")
    loras = trained(flags, parts, source)
    figures = {}
    for name, stage in stages(parts).items():
        figures[f"student, {name}"] = measured(name, film(stage, loras, STEPS, 1.0))
    first = stages(parts, TESTED[:ROWS])["colourless"]
    columns = {"20 steps, guidance 2.5": film(first, {}), f"{STEPS} steps": film(first, {}, STEPS, 1.0)}
    write_sheet(first.prompts, columns | {f"{STEPS} steps, distilled": film(first, loras, STEPS, 1.0)})
    return figures


def reference_of(parts: dict[str, Path], name: str) -> Figures:
    """The figures of the undistilled model, in a folder beside those of its students."""
    return once(partial(references, parts), Path("..") / f"undistilled_{name}")


def places(figures: Figures, who: str) -> float:
    """How much they differ, over both kinds of prompts. In some colours shapes are hard to see, and sizes are wrong."""
    return math.sqrt(mean(figures[f"{who}, {name}"]["place"] ** 2 for name in ("named", "colourless")))


def check(figures: Figures, base: Figures, least: float = 0.9) -> None:
    """What a student keeps of its teacher; of the variety of places and sizes at least this share."""
    for name in ("named", "colourless"):
        student, teacher = figures[f"student, {name}"], base[f"teacher, {name}"]
        for what in {"colour", "background", "motion", "shape"} & student.keys():
            assert student[what] >= teacher[what] - 0.05, f"{name}: {what}"
        assert abs(student["speed"] / teacher["speed"] - 1) <= 0.1
    assert places(figures, "student") >= least * places(base, "teacher")
    assert figures["student, named"]["size"] >= least * base["teacher, named"]["size"]
    student, teacher = figures["student, colourless"], base["teacher, colourless"]
    undistilled = base["undistilled, colourless"]
    for what in COLOURS:
        assert student[what] >= 0.9 * teacher[what], what
        assert student[what] >= undistilled[what] + 0.1 * teacher[what], f"{what}: what is shown without training"


def test_the_students_of_two_experts():
    """The longest test comes first: the other process does most of the rest meanwhile."""
    check(once(partial(student, PAIR, IN_TURNS, PROMPTS_GIVEN)), reference_of(PAIR, "pair"), least=0.85)


def test_the_undistilled_model_loses_the_variety_of_colours():
    base = reference_of(NANO, "nano")
    for name in ("undistilled", "undistilled and guided"):
        background = base[f"{name}, colourless"]["background's colour"]
        assert background <= 0.75 * base["teacher, colourless"]["background's colour"]


def test_a_student_that_learns_from_prompts_alone():
    check(once(partial(student, NANO, ALONE, PROMPTS_GIVEN)), reference_of(NANO, "nano"))


def test_a_student_that_learns_from_clips():
    check(once(partial(student, NANO, f"{ALONE} --diversity_weight 0.5", CLIPS_GIVEN)), reference_of(NANO, "nano"))

"""The ways in which the released Wans differ, with a release for each, and how the files of their runs are called."""

from pathlib import Path

from utils.common.checkpoint_names import Checkpoint
from wan.configs import FAMILIES, Family


def _way(family: Family) -> tuple[object, ...]:
    """What makes a release train differently from others. Width, shift and the like are numbers only."""
    return family.given, family.given_as, family.clip, len(family.experts), family.vae


# Of the releases that are alike in this the first.
WAYS = {_way(family): name for name, family in reversed(FAMILIES.items())}
RELEASES = tuple(name for name in FAMILIES if name in WAYS.values())


def trainables(family: Family) -> list[str]:
    """What a run of this family trains, from high noise to low."""
    return ["lora"] if len(family.experts) == 1 else [expert.name for expert in family.experts]


def lora_files(run: Path, family: Family, step: int) -> list[Path]:
    """The LoRA files of a run at this step, from high noise to low."""
    return [run / "checkpoints" / Checkpoint(step, name).name for name in trainables(family)]


def common_name(run: Path, step: int) -> Path:
    """The name that all LoRA files of a run at this step have in common: that of the file itself if there is one."""
    return run / "checkpoints" / Checkpoint(step, "lora").name


def turns(family: Family, steps: int) -> list[str]:
    """The flags with which two experts take turns of so many steps."""
    return ["--expert_phase_steps", str(steps)] if len(family.experts) > 1 else []


def picture_flags(family: Family, first: Path, last: Path) -> list[str]:
    """The flags of the test script that give a model the frames that it needs."""
    flags = {0: ["--image", str(first)], -1: ["--last_image", str(last)]}
    return [flag for place in family.given for flag in flags[place]]

"""What the files of a run are called: the one place that knows.

wan-lora-00000100.safetensors               what a LoRA has learned after 100 steps, with the default --name
wan-lora-00000100-ema.safetensors           its exponential moving average
wan-lora-00000100_high_noise.safetensors    the same of one of two experts; the other ends in _low_noise
state-00000100.safetensors                  the state from which the run can be resumed, whatever its --name
00000100.png, 00000100-01.mp4               the previews of this step: a contact sheet, and a video per prompt

Earlier versions wrote wan-lora_high_noise-00000100.safetensors. Such files are found too.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import UserError

CHECKPOINTS = "checkpoints"  # the folder of LoRAs and states in that of a run
DEFAULT_NAME = "wan-lora"
LORA = "lora"  # the trainable of a run that trains one
EXPERTS = ("high_noise", "low_noise")  # the trainables of two experts; their files form pairs
STATES = "state-*.safetensors"
LONGEST_NAME = 100

_EXPERT = rf"_(?P<expert>{'|'.join(EXPERTS)})"
_WHEN = r"-(?P<step>\d{8})(?P<average>-ema)?"
_STATE = re.compile(r"state-(?P<step>\d{8})\.safetensors")
_LEARNED = re.compile(rf"(?P<name>.+?){_WHEN}(?:{_EXPERT})?\.safetensors")
_FORMER = re.compile(rf"(?P<name>.+?){_EXPERT}{_WHEN}\.safetensors")
_PREVIEW = re.compile(r"(\d{8})(?:-\d+)?\.(?:png|mp4)")

_PORTABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # what Windows keeps for itself
_STATE_LIKE = re.compile(r"state(?:-.*)?", re.IGNORECASE)
_ENDING = re.compile(r".*(?:-\d{8}|-ema|\.safetensors)", re.IGNORECASE)
_EXPERT_LIKE = re.compile(r"high|low", re.IGNORECASE)
_EXPERT_WORD = re.compile(r"(?:^|[._-]+)(?:high|low)(?:[._-]*noise)?(?=[._-]|$)", re.IGNORECASE)
_DIGIT_FOR = str.maketrans("IiOo", "1100")


@dataclass(frozen=True)
class Checkpoint:
    """A file of a run: its step, its trainable (None: the state), and whether it holds the average.

    `run_name` is what the run calls its files, its --name; a state does not show it.
    """

    step: int
    trainable: str | None = None
    average: bool = False
    run_name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        if self.trainable not in (None, LORA, *EXPERTS):
            raise ValueError(f"files of a trainable {self.trainable!r} have no name here")

    @property
    def name(self) -> str:
        """The file's name."""
        stem = "state" if self.trainable is None else self.run_name
        return f"{stem}{self._when}{self._expert}.safetensors"

    def find(self, folder: Path) -> Path | None:
        """The file in a folder, under its name or under that of earlier versions; None where there is neither."""
        stem = "state" if self.trainable is None else self.run_name
        names = (self.name, f"{stem}{self._expert}{self._when}.safetensors")
        return next((folder / name for name in names if (folder / name).exists()), None)

    @property
    def _when(self) -> str:
        return f"-{self.step:08d}{'-ema' if self.average else ''}"

    @property
    def _expert(self) -> str:
        return f"_{self.trainable}" if self.trainable in EXPERTS else ""


def check_name(name: str) -> None:
    """Raises UserError for a --name whose files would not be found again, or not on every system."""
    if reason := _unfit(name):
        raise UserError(f"--name {name!r} {reason}")


def check_name_of_pairs(name: str) -> None:
    """Raises UserError, with a proposal, for a --name that would hide which of two experts a file is for."""
    if expert := _EXPERT_LIKE.search(name):
        raise UserError(
            f"--name {name!r} holds {expert[0]!r}, but this model has two experts, whose files end in _high_noise and "
            f"_low_noise: programs would mistake one for the other. Try --name {_without_expert(name)}"
        )


def parse_name(name: str, run_names: Collection[str] = ()) -> Checkpoint | None:
    """The checkpoint that a file of this name holds; None for a name that no run gives.

    fox_high_noise-00000100.safetensors is of the earlier form of a pair, unless fox_high_noise is among `run_names`.
    """
    if match := _STATE.fullmatch(name):
        return Checkpoint(int(match["step"]))
    match = _FORMER.fullmatch(name)
    if match is None or f"{match['name']}_{match['expert']}" in run_names or not _names_pairs(match["name"]):
        match = _LEARNED.fullmatch(name)
    if match is None or _unfit(match["name"]) or (match["expert"] and not _names_pairs(match["name"])):
        return None
    return Checkpoint(int(match["step"]), match["expert"] or LORA, bool(match["average"]), match["name"])


def list_checkpoints(folder: Path, run_names: Collection[str] = ()) -> dict[Path, Checkpoint]:
    """The files in a folder that a run, of whatever name, has written there, read as `parse_name` does."""
    found = {path: parse_name(path.name, run_names) for path in sorted(folder.iterdir())}
    return {path: checkpoint for path, checkpoint in found.items() if checkpoint is not None}


def sheet_name(step: int) -> str:
    """The contact sheet of a step's previews."""
    return f"{step:08d}.png"


def preview_name(step: int, number: int) -> str:
    """The video of one of a step's previews, counted from 1."""
    return f"{step:08d}-{number:02d}.mp4"


def list_previews(folder: Path) -> dict[Path, int]:
    """The previews in a folder, which need not exist, and the step of each."""
    found = {path: _PREVIEW.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    return {path: int(match[1]) for path, match in found.items() if match is not None}


def _unfit(name: str) -> str | None:
    """Why no run can have this name; None where one can."""
    if not _PORTABLE.fullmatch(name):
        return "names files: use letters without accents, digits, . _ and -, and begin with a letter or digit"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, more than {LONGEST_NAME}: choose a shorter one"
    if _DEVICE.fullmatch(name):
        return "is the name of a device on Windows: choose another"
    if _STATE_LIKE.fullmatch(name):
        return "is kept for the states to resume from: choose another"
    if _ENDING.fullmatch(name):
        return "must not end like a file of a run (-00000100, -ema, .safetensors): leave that out, it is appended"
    return None


def _names_pairs(name: str) -> bool:
    """Whether a run with two experts can have this name."""
    return _unfit(name) is None and _EXPERT_LIKE.search(name) is None


def _without_expert(name: str) -> str:
    """A name like this one that names pairs: without the word, or, inside of another one, with a digit: fl0wer."""
    shorter = _EXPERT_WORD.sub("", name).strip("._-")
    digits = _EXPERT_LIKE.sub(lambda word: word[0].translate(_DIGIT_FOR), shorter)
    return digits if _names_pairs(digits) else DEFAULT_NAME

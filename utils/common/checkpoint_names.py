"""What the files of a run are called: the one place that knows.

wan-lora-00000100.safetensors               what a LoRA has learned after 100 steps, with the default --output_name
wan-lora-00000100-ema.safetensors           its exponential moving average
wan-lora_high_noise-00000100.safetensors    the same of one of two experts; the other is wan-lora_low_noise
state-00000100.safetensors                  the state from which the run can be resumed, whatever its --output_name
00000100.png, 00000100-01.mp4               the previews of this step: a contact sheet, and a video per prompt
"""

import re
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import UserError

OUTPUT_NAME = "wan-lora"
LORA = "lora"  # the trainable of a run that trains one
EXPERTS = ("high_noise", "low_noise")  # the trainables of two experts; their files form pairs
STATES = "state-*.safetensors"
LONGEST_NAME = 100

_STATE = re.compile(r"state-(?P<step>\d{8})\.safetensors")
_LEARNED = re.compile(
    rf"(?P<output_name>.+?)(?:_(?P<expert>{'|'.join(EXPERTS)}))?-(?P<step>\d{{8}})(?P<average>-ema)?\.safetensors"
)
_PREVIEW = re.compile(r"(\d{8})(?:-\d+)?\.(?:png|mp4)")

_PORTABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # what Windows keeps for itself
_STATE_LIKE = re.compile(r"state(?:-.*)?", re.IGNORECASE)
_ENDING = re.compile(r".*(?:-\d{8}|-ema|\.safetensors)", re.IGNORECASE)
_EXPERT_LIKE = re.compile(r"high|low", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """A file of a run: its step, its trainable (None: the state), and whether it holds the average.

    `output_name` is what the run calls its files; a state does not show it.
    """

    step: int
    trainable: str | None = None
    average: bool = False
    output_name: str = OUTPUT_NAME

    def __post_init__(self) -> None:
        if self.trainable not in (None, LORA, *EXPERTS):
            raise ValueError(f"files of a trainable {self.trainable!r} have no name here")

    @property
    def name(self) -> str:
        """The file's name."""
        expert = f"_{self.trainable}" if self.trainable in EXPERTS else ""
        stem = "state" if self.trainable is None else f"{self.output_name}{expert}"
        return f"{stem}-{self.step:08d}{'-ema' if self.average else ''}.safetensors"


def check_output_name(name: str) -> None:
    """Raises UserError for an --output_name whose files would not be found again, or not on every system."""
    if reason := _unfit(name):
        raise UserError(f"--output_name {name!r} {reason}")


def parse_name(name: str) -> Checkpoint | None:
    """The checkpoint that a file of this name holds; None for a name that no run gives."""
    if match := _STATE.fullmatch(name):
        return Checkpoint(int(match["step"]))
    match = _LEARNED.fullmatch(name)
    if match is None or _unfit(match["output_name"]):
        return None
    return Checkpoint(int(match["step"]), match["expert"] or LORA, bool(match["average"]), match["output_name"])


def list_checkpoints(folder: Path) -> dict[Path, Checkpoint]:
    """The files in a folder that a run, of whatever name, has written there; other files are left out."""
    found = {path: parse_name(path.name) for path in folder.iterdir()}
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
    """Why a run cannot have this name; None where it can."""
    if expert := _EXPERT_LIKE.search(name):
        return f"holds {expert[0]!r}, which is kept for the files of the two experts: choose a name without it"
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

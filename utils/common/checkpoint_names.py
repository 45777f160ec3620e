"""What the files of a run are called: the one place that knows.

wan-lora-00000100.safetensors         what a trainable named "lora" has learned after 100 steps
wan-lora-00000100-ema.safetensors     its exponential moving average
state-00000100.safetensors            the state from which the run can be resumed
00000100.png, 00000100-01.mp4         the previews of this step: a contact sheet, and a video per prompt
"""

import re
from dataclasses import dataclass
from pathlib import Path

STATES = "state-*.safetensors"

_NAME = re.compile(
    r"(?:(?P<state>state)|wan-(?P<trainable>[a-z][a-z0-9_]*))-(?P<step>\d{8})(?P<average>-ema)?\.safetensors"
)

_PREVIEW = re.compile(r"(\d{8})(?:-\d+)?\.(?:png|mp4)")


@dataclass(frozen=True)
class Checkpoint:
    """A file of a run: its step, its trainable (None: the state), and whether it holds the average."""

    step: int
    trainable: str | None = None
    average: bool = False

    @property
    def name(self) -> str:
        """The file's name."""
        stem = "state" if self.trainable is None else f"wan-{self.trainable}"
        return f"{stem}-{self.step:08d}{'-ema' if self.average else ''}.safetensors"


def parse_name(name: str) -> Checkpoint | None:
    """The checkpoint that a file of this name holds; None for a name that no run gives."""
    match = _NAME.fullmatch(name)
    if match is None or (match["state"] and match["average"]):
        return None
    return Checkpoint(int(match["step"]), match["trainable"], bool(match["average"]))


def list_checkpoints(folder: Path) -> dict[Path, Checkpoint]:
    """The files in a folder that a run has written there; other people's files are left out."""
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

"""Pictures that a video is generated from: read, cut as clips are in training, and put in their places."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.encoding.conditioning import to_unit_range
from utils.media.controls import ControlSignal
from utils.media.frames import crop_and_resize, read_frames
from utils.media.probing import probe
from wan.configs import Family

PLACES = {0: "first frame", -1: "last frame"}


def needed_flags(family: Family, control: ControlSignal | None) -> str:
    """What the test script has to be given besides a LoRA of this family and a prompt, as typed."""
    flags = ["--image", "--last_image"][: len(family.given)] if family.given_as == "channels" else []
    flags += ["--input_video"] if control is not None else []
    flags += ["--image"] if control is not None and control.keeps_first else []
    return "".join(f" {flag} ..." for flag in flags)


def check_pictures(paths: Sequence[Path], family: Family, option: str) -> None:
    """Raises UserError unless there is a readable picture for each frame that the family is given."""
    names = " and ".join(PLACES[place] for place in family.given)
    if not family.given:
        raise UserError(f"{option}: this model is not given any frame of a video")
    if len(paths) != len(family.given):
        raise UserError(
            f"{option} has {counted(len(paths), 'picture')}, but this model is given the {names} of a video"
        )
    for path in paths:
        probe(path)


def load_pictures(paths: Sequence[Path], family: Family, width: int, height: int) -> dict[int, Tensor]:
    """The pictures (3, 1, H, W) in -1..1 by the places of the frames that the family is given.

    Each is cut to this size as a training clip is: as large as possible, from its middle. Of a video the first frame
    counts. Raises MediaError for an unreadable file.
    """
    return {place: load_picture(path, width, height) for place, path in zip(family.given, paths, strict=True)}


def load_picture(path: Path, width: int, height: int) -> Tensor:
    """A picture (3, 1, H, W) in -1..1, cut to this size. Raises MediaError for an unreadable file."""
    return to_unit_range(crop_and_resize(read_frames(path, [0]), width, height).transpose(0, 1))

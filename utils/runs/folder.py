"""A run's folder: how it is named, and which of its files stay."""

import itertools
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from utils.common.checkpoint_names import DEFAULT_NAME, Checkpoint, list_checkpoints, list_previews
from utils.common.console import say
from utils.common.errors import UserError
from utils.common.files import UNFINISHED
from utils.common.formatting import counted
from utils.common.run_options import read_options

STATES_KEPT = 2
STAMP, STAMP_LENGTH = "%Y-%m-%d_%H-%M-%S", 19  # what the folder of a run is called


def new_folder(output_dir: Path) -> Path:
    """Creates <output_dir>/YYYY-MM-DD_HH-MM-SS, with a number appended where that is taken. Raises UserError."""
    stamp = datetime.now().strftime(STAMP)
    for attempt in range(1, 100):
        folder = output_dir / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}; choose another --output_dir") from None
    raise UserError(f"{output_dir} has too many runs of the same second")


def day_of(folder: Path) -> str:
    """The day on which the run of a folder began, YYYY-MM-DD, by the folder's name; nothing for another name.

    A run that was interrupted has the day of its beginning too, so that its files do not differ.
    """
    with suppress(ValueError):
        return datetime.strptime(folder.name[:STAMP_LENGTH], STAMP).date().isoformat()
    return ""


def names_used(folder: Path) -> set[str]:
    """The names that the files of a run have had: a --name may change where the run is resumed."""
    # The option had another name; versions without it had the name that is its default now.
    names = [options.get("name", options.get("output_name", DEFAULT_NAME)) for options in read_options(folder)]
    return {name for name in names if isinstance(name, str)}


def archive_later_files(checkpoints: Path, samples: Path, step: int, names: Collection[str]) -> None:
    """Moves checkpoints and previews of later steps than `step` aside: a resumed run writes these steps again.

    `names` are those that the run's files have had. Removes what a crash has left unfinished. Raises OSError.
    """
    for path in (*checkpoints.glob(UNFINISHED), *samples.glob(UNFINISHED)):
        path.unlink()
    files = list_checkpoints(checkpoints, names)
    later = [path for path, found in files.items() if found.step > step and _is_of(found, names)]
    later += [path for path, its_step in list_previews(samples).items() if its_step > step]
    if later:
        numbered = (checkpoints / f"aside-{number}" for number in itertools.count(1))
        aside = next(folder for folder in numbered if not folder.exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        say(f"moved {counted(len(later), 'file')} of later steps to {aside}")


def prune(checkpoints: Path, keep: int, name: str) -> None:
    """Removes all checkpoints but those of the newest `keep` steps; with 0 all LoRAs stay, and the newest two states.

    Files of another name are left alone, and so are converted LoRAs.
    """
    files = {path: found for path, found in list_checkpoints(checkpoints, [name]).items() if _is_of(found, [name])}
    for is_state, count in ((True, keep or STATES_KEPT), (False, keep)):
        own = {path: found.step for path, found in files.items() if (found.trainable is None) == is_state}
        kept = sorted(set(own.values()))[-count:]
        for path, step in own.items():
            if step not in kept:
                path.unlink(missing_ok=True)


def _is_of(checkpoint: Checkpoint, names: Collection[str]) -> bool:
    """Whether a run whose files have these names has written it. A state is always of the run in whose folder it is."""
    return checkpoint.trainable is None or checkpoint.run_name in names

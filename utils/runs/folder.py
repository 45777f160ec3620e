"""A run's folder: how it is named, and which of its files stay."""

import itertools
from datetime import datetime
from pathlib import Path

from utils.common.checkpoint_names import list_checkpoints, list_previews
from utils.common.console import say
from utils.common.errors import UserError
from utils.common.files import UNFINISHED
from utils.common.formatting import counted

STATES_KEPT = 2


def new_folder(output_dir: Path) -> Path:
    """Creates <output_dir>/YYYY-MM-DD_HH-MM-SS, with a number appended where that is taken. Raises UserError."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
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


def archive_later_files(checkpoints: Path, samples: Path, step: int) -> None:
    """Moves checkpoints and previews of later steps than `step` aside: a resumed run writes these steps again.

    Removes what a crash has left unfinished. Raises OSError.
    """
    for path in (*checkpoints.glob(UNFINISHED), *samples.glob(UNFINISHED)):
        path.unlink()
    later = [path for path, checkpoint in list_checkpoints(checkpoints).items() if checkpoint.step > step]
    later += [path for path, its_step in list_previews(samples).items() if its_step > step]
    if later:
        names = (checkpoints / f"aside-{number}" for number in itertools.count(1))
        aside = next(folder for folder in names if not folder.exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        say(f"moved {counted(len(later), 'file')} of later steps to {aside}")


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all checkpoints but those of the newest `keep` steps; with 0 all LoRAs stay, and the newest two states.

    Other files in the folder, such as converted LoRAs, are left alone.
    """
    files = list_checkpoints(checkpoints)
    for is_state, count in ((True, keep or STATES_KEPT), (False, keep)):
        own = {path: found.step for path, found in files.items() if (found.trainable is None) == is_state}
        kept = sorted(set(own.values()))[-count:]
        for path, step in own.items():
            if step not in kept:
                path.unlink(missing_ok=True)

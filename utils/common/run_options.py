"""The options of a run, which are kept in its folder.

    command_args.json               as it was started
    command_args-<step>.json        as it was resumed at a step

These are the user's own files. What is read from them is JSON, and nothing is known of the types of its values.
"""

import json
from contextlib import suppress
from pathlib import Path

_FOLDERS_ABOVE = 3  # RUN/x.safetensors, RUN/checkpoints/x.safetensors, RUN/checkpoints/aside-1/x.safetensors


def options_name(step: int | None = None) -> str:
    """The name of the file of a run that is started, or resumed at a step."""
    return "command_args.json" if step is None else f"command_args-{step:08d}.json"


def read_options(folder: Path) -> list[dict[str, object]]:
    """The options of the run in a folder, the newest first, without files that cannot be read."""
    found = []
    for file in _files_in(folder):
        with suppress(OSError, ValueError, RecursionError):
            found.append(json.loads(file.read_text(encoding="utf-8")))
    return [options for options in found if isinstance(options, dict)]


def options_of_run(file: Path) -> list[dict[str, object]]:
    """As `read_options`, of the run in whose folder a file lies; none where it lies in no run."""
    folders = file.absolute().parents[:_FOLDERS_ABOVE]
    return next((read_options(folder) for folder in folders if _files_in(folder)), [])


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("command_args*.json"), key=lambda file: file.stem, reverse=True)

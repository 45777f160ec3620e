"""Which media files may be opened at all. Imports nothing that takes time."""

import os
import stat
from pathlib import Path

from utils.media.description import MediaError


def check_file(path: Path) -> os.stat_result:
    """The status of a regular file with content. Others are refused before they are opened: a pipe may never end.

    Raises `MediaError`.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, ValueError):  # ValueError: a null character in the name
        raise MediaError(path, "there is no such file") from None
    except OSError as error:
        raise MediaError(path, f"the file cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "not a regular file, but a folder, a pipe or a device")
    if status.st_size == 0:
        raise MediaError(path, "the file is empty")
    return status

"""An inspector that decodes nothing: what files hold is said by the test."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.media.description import IMAGE, MediaError, MediaInfo
from utils.media.inspection import Inspector

CLIP, STILL = MediaInfo(64, 48, 60, 16.0), MediaInfo(64, 48, 1, None, IMAGE)


class Described(Inspector):
    """Finds the given descriptions, or reasons, by file name; .png files without one are pictures, others videos.

    Links that cannot be followed are missing, as they are for the real one.
    """

    def __init__(self, infos: Mapping[str, MediaInfo | str] | None = None) -> None:
        super().__init__()
        self.infos = dict(infos or {})
        self.masks: set[Path] = set()

    def inspect(self, paths: Sequence[Path], masks: Iterable[Path] = ()) -> dict[Path, MediaInfo | MediaError]:
        self.masks |= set(masks)
        found = {path: self.infos.get(path.name, STILL if path.suffix == ".png" else CLIP) for path in paths}
        found |= {path: "there is no such file" for path in paths if not os.path.exists(path)}
        return {path: MediaError(path, info) if isinstance(info, str) else info for path, info in found.items()}

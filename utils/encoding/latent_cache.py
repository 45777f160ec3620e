"""Encoded clips on disk: one safetensors file per window, so that training needs no VAE.

    <folder>/<VAE fingerprint>/<hash of content and window>.safetensors      keys "latents", "channels", "mask"

The name says everything that the content depends on: the bytes of the files, the frames, the size and the place of the
cut, the VAE and its dtype, the control that was made. Captions are no part of it: they have a cache of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.digests import DIGESTS, Digests
from utils.common.errors import RunError, UserError
from utils.common.files import replacing
from utils.common.formatting import counted, readable_size
from utils.data.dataset import Dataset
from utils.data.plan import Limits, Window, fixed_windows, flatten_windows

ROOM_TO_LEAVE = 2**30  # bytes of a disk, for everything else
LATENTS_PER_TOKEN = 4  # every Wan's patch is (1, 2, 2)
LONGEST_EMBEDDING = 512 * 4096 * 2  # bytes of a caption that fills all of UMT5-XXL, in bf16
Parts = dict[str, Tensor]


class LatentCache:
    """The latents of one VAE under `root`; `control` names what is made from each clip for it to follow."""

    def __init__(self, root: Path, fingerprint: str, control: str | None) -> None:
        self.folder = root / fingerprint
        self.control = control
        self._digests = Digests(root / DIGESTS)
        self._seen: dict[Path, str] = {}

    def path(self, window: Window) -> Path:
        """Where a window's latents are, or would be, by its file as it was first seen: a run keeps to that.

        Raises UserError where the file has vanished before.
        """
        source = window.source
        files = [source.path, *(other.path for other in (source.control, source.mask) if other)]
        control = ("file" if source.control else self.control, source.mask is not None)
        facts = [[self._digest(path) for path in files], control]
        facts += [window.indices, window.width, window.height, window.position]
        return self.folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"

    def _digest(self, path: Path) -> str:
        if path not in self._seen:
            self._seen[path] = self._digests.of(path)
        return self._seen[path]

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows without a whole file here, each once, in order. What is damaged is missing."""
        by_path = {self.path(window): window for window in windows}
        self._digests.save()
        return [window for path, window in by_path.items() if not _is_whole(path)]

    def load(self, window: Window) -> Parts:
        """What `store` was given for this window, on the CPU. Raises UserError where it is not here."""
        path = self.path(window)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not whole any more ({error}): run --cache_latents again") from None

    def store(self, window: Window, parts: Mapping[str, Tensor]) -> None:
        """Writes atomically: what is interrupted goes on where it stopped. Raises RunError where it cannot."""
        try:
            with replacing(self.path(window)) as unfinished:
                whole = {name: part.cpu().contiguous() for name, part in parts.items()}
                save_file(whole, unfinished, metadata={"source": str(window.source.path)})
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write latents to {self.folder}: {error}; see --cache_dir") from None

    def check_disk_space(self, size: int) -> None:
        """Makes the folder. Raises UserError where it cannot be, or its disk has not `size` bytes to spare."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(
                f"cannot make {self.folder}: {error.strerror}; keep caches elsewhere with --cache_dir"
            ) from None
        if size + ROOM_TO_LEAVE > free:
            raise UserError(
                f"the latents take {readable_size(size)}, and {self.folder} has {readable_size(free)} free\n"
                "free some, keep caches elsewhere with --cache_dir, or lower --token_limit"
            )

    def prune(self, used: Iterable[Window]) -> int:
        """Removes what none of these windows needs, also of other VAEs, and returns how many bytes that was."""
        kept = {self.path(window) for window in used}
        unused = [path for path in self.folder.parent.glob("*/*.safetensors") if path not in kept]
        freed = sum(path.stat().st_size for path in unused)
        for path in unused:
            path.unlink()
        return freed


def latent_bytes(windows: Iterable[Window], channels: int) -> int:
    """How much the fp32 latents of these windows take, of so many channels in all, and masks."""
    return 4 * sum(
        window.tokens * LATENTS_PER_TOKEN * (channels + (window.source.mask is not None)) for window in windows
    )


def format_cache_size(data: Dataset, limits: Limits, channels: int) -> str:
    """One line: the disk space of both caches; `channels` counts the latents of a clip and of its control, if any."""
    windows = flatten_windows(fixed_windows(data.train, limits, 1))
    latents, texts = readable_size(latent_bytes(windows, channels)), len(set(data.captions))
    longest = readable_size(LONGEST_EMBEDDING)
    return f"on disk: --cache_latents N takes N times {latents}, each of {counted(texts, 'text')} at most {longest}"


def _is_whole(path: Path) -> bool:
    """safetensors compares the file's length with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return "latents" in file.keys()  # noqa: SIM118
    except (SafetensorError, OSError):
        return False

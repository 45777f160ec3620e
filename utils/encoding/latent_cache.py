"""Encoded clips on disk: one safetensors file per window, so that training needs no VAE.

    <folder>/<VAE fingerprint>/<hash of content and window>.safetensors      keys "latents", "channels", "mask"

The path depends on everything that the content depends on: the bytes of the files, the frames, the size and position of
the crop, the VAE and its dtype, the generated control. Captions are not part of it: they have a cache of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from utils.common.digests import DIGESTS, Digests
from utils.common.errors import RunError, UserError
from utils.common.formatting import counted, readable_size
from utils.common.tensor_files import TensorFileError, read_tensors, tensor_names, write_tensors
from utils.data.dataset import Dataset
from utils.data.plan import Limits, Window, fixed_windows, flatten_windows

ROOM_TO_LEAVE = 2**30  # bytes of a disk, for everything else
LATENTS_PER_TOKEN = 4  # every Wan's patch is (1, 2, 2)
LONGEST_EMBEDDING = 512 * 4096 * 2  # bytes of a caption that fills all of UMT5-XXL, in bf16


class LatentCache:
    """The latents of one VAE under `root`; `control` is the type of control that a control LoRA is trained on."""

    def __init__(self, root: Path, fingerprint: str, control: str | None) -> None:
        self.folder = root / fingerprint
        self.control = control
        self._digests = Digests(root / DIGESTS)
        self._seen: dict[Path, str] = {}

    def path(self, window: Window) -> Path:
        """Where a window's latents are stored. A file's content counts as it was at its first use in this run.

        Raises UserError if the file cannot be read then.
        """
        source = window.source
        files = [source.path, *(other.path for other in (source.control, source.mask) if other)]
        control = ("file" if source.control else self.control, source.mask is not None)
        cut = window.indices, window.width, window.height, window.position
        facts = [[self._digest(path) for path in files], control, *cut]
        return self.folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"

    def _digest(self, path: Path) -> str:
        if path not in self._seen:
            self._seen[path] = self._digests.of(path)
        return self._seen[path]

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that have to be encoded, each once, in order: a file that is incomplete counts as missing."""
        by_path = {self.path(window): window for window in windows}
        self._digests.save()
        return [window for path, window in by_path.items() if tensor_names(path) != self._expected(window)]

    def load(self, window: Window) -> dict[str, Tensor]:
        """The parts stored for this window, on the CPU. Raises UserError if any is missing or unexpected."""
        path = self.path(window)
        try:
            parts, _ = read_tensors(path)
        except TensorFileError as error:
            raise UserError(f"{path} is missing or corrupted ({error}): run --cache_latents again") from None
        if parts.keys() != self._expected(window):
            found, expected = (", ".join(sorted(names)) or "nothing" for names in (parts, self._expected(window)))
            raise UserError(f"{path} holds {found}, but {expected} is needed: run --cache_latents again")
        return parts

    def _expected(self, window: Window) -> set[str]:
        """The names of a window's parts."""
        conditional = {"channels": self.control is not None, "mask": window.source.mask is not None}
        return {"latents", *(name for name, needed in conditional.items() if needed)}

    def store(self, window: Window, parts: Mapping[str, Tensor]) -> None:
        """Writes the parts atomically, so that an interrupted pass can be resumed. Raises RunError if it fails."""
        try:
            write_tensors(self.path(window), parts, {"source": str(window.source.path)})
        except TensorFileError as error:
            raise RunError(f"cannot write latents to {self.folder}: {error}; see --cache_dir") from None

    def check_disk_space(self, size: int) -> None:
        """Makes the folder. Raises UserError if that fails, or if its disk has less than `size` bytes to spare."""
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
        """Removes the files that none of these windows uses, other VAEs' too; returns the number of bytes freed."""
        kept = {self.path(window) for window in used}
        unused = [path for path in self.folder.parent.glob("*/*.safetensors") if path not in kept]
        freed = sum(path.stat().st_size for path in unused)
        for path in unused:
            path.unlink()
        return freed


def latent_bytes(windows: Iterable[Window], channels: int) -> int:
    """The size of the fp32 latents of these windows, with `channels` in all, and of their masks."""
    return 4 * sum(
        window.tokens * LATENTS_PER_TOKEN * (channels + (window.source.mask is not None)) for window in windows
    )


def format_cache_size(data: Dataset, limits: Limits, channels: int) -> str:
    """One line: the disk space of both caches; `channels` counts the latents of a clip and of its control, if any."""
    windows = flatten_windows(fixed_windows(data.train, limits, 1))
    latents, texts = readable_size(latent_bytes(windows, channels)), len(set(data.captions))
    longest = readable_size(LONGEST_EMBEDDING)
    return f"on disk: --cache_latents N takes N times {latents}, each of {counted(texts, 'text')} at most {longest}"

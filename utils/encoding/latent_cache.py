"""Encoded clips on disk: one safetensors file per window, so that training needs no VAE.

    <folder>/<VAE fingerprint>/<hash of content and window>.safetensors      keys "latents", "channels", "mask"

The path depends on everything that the content depends on: the bytes of the files, the frames, the size and position of
the crop, the VAE and its dtype, the generated control. Captions are not part of it: they have a cache of their own.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.errors import RunError, UserError
from utils.common.files import replacing
from utils.common.formatting import readable_size
from utils.data.plan import Window

LATENTS = "latents"  # the folder of them inside a cache folder
DIGESTS = "digests.json"
ROOM_TO_LEAVE = 2**30  # bytes of a disk, for everything else
LATENTS_PER_TOKEN = 4  # every Wan's patch is (1, 2, 2)


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
        return [window for path, window in by_path.items() if _names(path) != self._expected(window)]

    def load(self, window: Window) -> dict[str, Tensor]:
        """The parts stored for this window, on the CPU. Raises UserError if any is missing or unexpected."""
        path = self.path(window)
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
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
            with replacing(self.path(window)) as unfinished:
                tensors = {name: part.cpu().contiguous() for name, part in parts.items()}
                save_file(tensors, unfinished, metadata={"source": str(window.source.path)})
        except (OSError, SafetensorError) as error:
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


class Digests:
    """Hashes of files, remembered in a JSON file as long as size and time of a file stay the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list] = _read_json(path)

    def of(self, path: Path) -> str:
        """The sha256 of a file's bytes. Raises UserError where it cannot be read."""
        try:
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            known = self._known.get(str(path.absolute()))
            if not known or known[:2] != stamp:
                with path.open("rb") as file:
                    known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
                self._known[str(path.absolute())] = known
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        return known[2]

    def save(self) -> None:
        """Keeps what is known for the next run; a folder that cannot be written is no error."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as unfinished:
                unfinished.write_text(json.dumps(self._known), encoding="utf-8")


def _read_json(path: Path) -> dict[str, list]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _names(path: Path) -> set[str]:
    """The tensors of a file; none if it is missing or incomplete: safetensors compares its length with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return set()

"""Encoded clips on disk: one safetensors file per window, so that training needs no VAE.

    <folder>/<VAE fingerprint>/<hash of content and window>.safetensors

Its keys are "latents", "mask" and the names of conditions: "channels", "image", "first". The path depends on everything
that the content depends on: the bytes of the files, the frames, the size and position of the crop, the encoders and
their dtype, the frames that the model is given, the generated control. Captions are not part of it: they have a cache
of their own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.common.digests import DIGESTS, Digests
from utils.common.errors import RunError, UserError
from utils.common.formatting import counted, readable_size
from utils.common.tensor_files import TensorFileError, read_tensors, tensor_names, write_tensors
from utils.data.dataset import Dataset
from utils.data.plan import Limits, Window, fixed_windows, flatten_windows
from utils.media.controls import ControlSignal
from wan.configs import Family

ROOM_TO_LEAVE = 2**30  # bytes of a disk, for everything else
LATENTS_PER_TOKEN = 4  # every Wan's patch is (1, 2, 2)
VISION_TOKENS = 257  # of a picture: 16 x 16 patches and a class token
LONGEST_EMBEDDING = 512 * 4096 * 2  # bytes of a caption that fills all of UMT5-XXL, in bf16


@dataclass(frozen=True)
class Layout:
    """What is cached of a clip besides its latents, and what that depends on beyond the clip's files and window."""

    given: tuple[int, ...] = ()  # the frames that the model is given
    given_as: str = ""  # as in the family's row
    vision: str = ""  # the fingerprint of the vision encoder, if there is one
    control: ControlSignal | None = None
    given_alone: bool = False  # whether nothing else is cached: no latents, and no mask for their loss

    def names(self, window: Window) -> set[str]:
        """The names of a window's parts. A lone frame that the model is not given has none, where these are alone."""
        conditional = {
            "latents": not self.given_alone,
            "channels": self.control is not None or self.given_as == "channels",
            "image": bool(self.vision),
            "first": self.given_as == "latents" and window.frames > 1,
            "mask": window.source.mask is not None and not self.given_alone,
        }
        return {name for name, needed in conditional.items() if needed}

    @property
    def facts(self) -> dict[str, object]:
        """What the parts depend on; nothing where they are latents and a control as in version 0.1."""
        keeps_first = self.control is not None and self.control.keeps_first
        every = {"given": self.given, "given_as": self.given_as, "vision": self.vision, "keeps_first": keeps_first}
        every |= {"given_alone": self.given_alone}
        return {name: fact for name, fact in every.items() if fact}


class LatentCache:
    """The encoded clips of one VAE under `root`."""

    def __init__(self, root: Path, fingerprint: str, layout: Layout) -> None:
        self.folder = root / fingerprint
        self.layout = layout
        self._digests = Digests(root / DIGESTS)
        self._seen: dict[Path, str] = {}

    def path(self, window: Window) -> Path:
        """Where a window's latents are stored. A file's content counts as it was at its first use in this run.

        Raises UserError if the file cannot be read then.
        """
        source = window.source
        kind = self.layout.control and self.layout.control.kind
        control = ("file" if source.control else kind, source.mask is not None)
        cut = window.indices, window.width, window.height, window.position
        others = [facts for facts in (self.layout.facts, source.readings) if facts]
        facts = [[self._digest(path) for path in source.files], control, *cut, *others]
        return self.folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"

    def _digest(self, path: Path) -> str:
        if path not in self._seen:
            self._seen[path] = self._digests.of(path)
        return self._seen[path]

    def missing(self, windows: Iterable[Window]) -> list[Window]:
        """The windows that have to be encoded, each once, in order: a file that is incomplete counts as missing."""
        by_path = {self.path(window): window for window in windows}
        self._digests.save()
        return [window for path, window in by_path.items() if tensor_names(path) != self.layout.names(window)]

    def load(self, window: Window) -> dict[str, Tensor]:
        """The parts stored for this window, on the CPU. Raises UserError if any is missing or unexpected."""
        path = self.path(window)
        try:
            parts, _ = read_tensors(path)
        except TensorFileError as error:
            raise UserError(f"{path} is missing or corrupted ({error}): run --cache_latents again") from None
        if parts.keys() != self.layout.names(window):
            found, expected = (", ".join(sorted(names)) or "nothing" for names in (parts, self.layout.names(window)))
            raise UserError(f"{path} holds {found}, but {expected} is needed: run --cache_latents again")
        return parts

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


def cached_bytes(windows: Iterable[Window], family: Family, has_control: bool, given_alone: bool = False) -> int:
    """The size of what is cached of these windows, all of it fp32; `given_alone` as in `Layout`."""
    channels = family.in_dim + family.out_dim * (has_control - given_alone)
    vision = VISION_TOKENS * len(family.given) * family.shape.image_dim
    first = family.out_dim if family.given_as == "latents" else 0
    masks = 0 if given_alone else 1
    return 4 * sum(_latents(window, channels, first, masks) + vision for window in windows)


def _latents(window: Window, channels: int, first: int, masks: int) -> int:
    """The numbers of a window's latents, masks and conditions, `first` channels of them in a first frame of its own.

    A clip of one frame has no such frame.
    """
    positions = window.tokens * LATENTS_PER_TOKEN
    latent_frames = 1 + (window.frames - 1) // window.grid.frame
    given = first * positions // latent_frames if window.frames > 1 else 0
    return positions * (channels + masks * (window.source.mask is not None)) + given


def format_cache_size(
    data: Dataset, limits: Limits, family: Family, has_control: bool, places: Sequence[int] | None = None
) -> str:
    """One line: the disk space of both caches. `places` are the only frames that are read of a clip, if not all are."""
    texts = f"each of {counted(len(set(data.captions)), 'text')} at most {readable_size(LONGEST_EMBEDDING)}"
    if places is not None and not places:
        return f"on disk: {texts}"
    windows = flatten_windows(fixed_windows(data.train, limits, 1))
    latents = readable_size(cached_bytes(windows, family, has_control, places is not None))
    return f"on disk: --cache_latents N takes N times {latents}, {texts}"

"""How planned windows become batches on the device: through the VAE at every step, or from the latent cache.

A training loop sees the same interface, `Samples`, in both cases. It does so too where a student starts from its own
samples, and latents are only a shape: `utils/encoding/starts.py`.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.digests import LATENTS
from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.common.options import option
from utils.data.loading import Clip, Load, batches, in_thread, load_ahead, load_clip, load_given
from utils.data.plan import Plan, Window, largest_window
from utils.encoding.conditioning import Batch, Encoded, Encoders, collate
from utils.encoding.latent_cache import LatentCache, Layout, cached_bytes
from utils.encoding.side_stream import SideStream
from utils.encoding.starts import BlankLatents
from utils.encoding.vae_layout import FORMATS, PLAIN, faster_layout, use_layout
from utils.media.controls import ControlSignal
from wan.checkpoints import ModelFiles, load_vae, load_vision_encoder, vae_fingerprint, vision_fingerprint
from wan.modules.vae import WanVAE

VISION_DTYPE = torch.float32
LAYOUT = "vae_layout"  # what the decision is called
VAE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loaded = TypeVar("Loaded")
LoadText = Callable[[str], Tensor]  # from a caption to its embedding (T, E)


@dataclass(frozen=True)
class Caches:
    """caches"""

    cache_embeddings: bool = option(False, "encode all captions and prompts, then stop", affects_training=False)
    cache_latents: int = option(
        0, "encode N windows per clip once, and train on those; 1: the middle", minimum=0, const=1
    )
    cache_only: bool = option(
        False, "fill the cache of latents, then stop", requires="cache_latents", affects_training=False
    )
    prune_cache: bool = option(
        False, "remove cached latents that this run does not use", requires="cache_latents", affects_training=False
    )
    vae_dtype: str = option(
        "fp32", "dtype of the VAE, for training and previews; bf16: faster, less exact", choices=tuple(VAE_DTYPES)
    )
    overlap_encoding: bool = option(
        False,
        "on a GPU, where latents are not cached, encode the next batch during a step; takes the memory of both",
        affects_training=False,
    )
    cache_dir: Path | None = option(
        None, "where caches are kept (default: .wan_cache in the first dataset)", affects_training=False
    )

    def check_overlap(self, device: torch.device) -> None:
        """Raises UserError for another device than a CUDA GPU."""
        if self.overlap_encoding and device.type != "cuda":
            raise UserError("--overlap_encoding needs a CUDA GPU: leave it out")

    def check_encoding(self, places: Sequence[int] | None) -> None:
        """Raises UserError for options of encoding where no frame of a clip is read. `places` as in LatentEncoding."""
        for name in ("cache_latents", "overlap_encoding"):
            if places is not None and not places and getattr(self, name):
                raise UserError(f"--{name} has no effect: this run starts from noise and texts, and encodes no clip")


class Samples(Protocol):
    """What a training loop sees of `FreshSamples` and `CachedSamples`."""

    def open_encoders(self) -> Encoders:
        """The encoders, for previews."""
        ...

    def load_batch(self, windows: Sequence[Window]) -> Batch:
        """These windows of one bucket as a batch on the device, loaded in this process."""
        ...

    def hold(self, windows: Sequence[Window]) -> object:
        """Keeps the GPU memory that encoding these windows takes beside other work, while the result is kept."""
        ...

    def stream(self, plan: Plan, start_batch: int = 0) -> Generator[Batch, None, None]:
        """The batches of a plan without end, from that number on, on the device.

        Clips are loaded ahead of time by other processes, cached ones by a thread; these end when the generator is
        closed. Raises as `utils.data.loading.batches` does.
        """
        ...


@dataclass(frozen=True)
class FreshSamples:
    """Clips are encoded at every step."""

    encoders: Encoders
    texts: LoadText
    num_workers: int = 0  # processes that load clips
    beside: SideStream | None = None  # where clips are encoded while the device computes a step
    load: Load[Clip] = load_clip  # what is read of a window

    def open_encoders(self) -> Encoders:
        return self.encoders

    def batch(self, clips: Sequence[Clip]) -> Batch:
        """Pixels and captions become latents and text on the VAE's device."""
        return collate([self.encoders.encode(clip, self.texts(clip.caption)) for clip in clips])

    def load_batch(self, windows: Sequence[Window]) -> Batch:
        return self.batch([self.load(window) for window in windows])

    def hold(self, windows: Sequence[Window]) -> object:
        return None if self.beside is None else self.beside.hold_peak_of(partial(self.load_batch, windows))

    def stream(self, plan: Plan, start_batch: int = 0) -> Generator[Batch, None, None]:
        loaded = batches(plan, self.load, start_batch, self.num_workers)
        return _stream(loaded, self.batch) if self.beside is None else self.beside.encoded(loaded, self.batch)


class Stored(Protocol):
    """What a sample is made of besides its text."""

    def load(self, window: Window) -> dict[str, Tensor]:
        """As `Encoded.parts`, on the CPU."""
        ...


@dataclass(frozen=True)
class CachedSamples:
    """Clips were encoded before: encoders are needed for previews alone, which `load_encoders` for themselves."""

    latents: Stored
    texts: LoadText
    device: torch.device
    load_encoders: Callable[[], Encoders]
    num_workers: ClassVar[int] = 0  # a cached clip is loaded in a millisecond, by a thread

    def open_encoders(self) -> Encoders:
        return self.load_encoders()

    def load(self, window: Window) -> Encoded:
        return Encoded.from_parts(self.latents.load(window), self.texts(window.caption))

    def batch(self, samples: Sequence[Encoded]) -> Batch:
        return collate([sample.to(self.device) for sample in samples])

    def load_batch(self, windows: Sequence[Window]) -> Batch:
        return self.batch([self.load(window) for window in windows])

    def hold(self, windows: Sequence[Window]) -> object:
        return None

    def stream(self, plan: Plan, start_batch: int = 0) -> Generator[Batch, None, None]:
        return _stream(in_thread(batches(plan, self.load, start_batch, self.num_workers)), self.batch)


def _stream(
    loaded: Generator[list[Loaded], None, None], batch: Callable[[list[Loaded]], Batch]
) -> Generator[Batch, None, None]:
    with closing(loaded):
        yield from map(batch, loaded)


@dataclass(frozen=True)
class LatentEncoding:
    """The encoders of a model, not loaded; `control` is what a control LoRA is trained to follow.

    `decisions` keep in which layout the VAE encodes: on a GPU the faster one, measured when a run begins. Without them
    it is the plain one. `places` are the only frames that are read of a clip, as `places_to_read` says; without them
    all are.
    """

    files: ModelFiles
    device: torch.device
    control: ControlSignal | None = None
    vae_dtype: torch.dtype = torch.float32
    decisions: Decisions | None = None
    places: tuple[int, ...] | None = None

    @property
    def read(self) -> Load[Clip]:
        """How what is encoded of a window is loaded; other processes can be given it."""
        return load_clip if self.places is None else partial(load_given, places=self.places)

    def load_for(self, windows: Sequence[Window]) -> Encoders:
        """The encoders, which encode such windows fast. Raises CheckpointError."""
        encoders = self.load()
        if self.decisions is not None and self.device.type == "cuda":
            use_layout(encoders.vae, self._layout_of_vae(encoders.vae, self.decisions, windows))
        return encoders

    def _layout_of_vae(self, vae: WanVAE, decisions: Decisions, windows: Sequence[Window]) -> str:
        """That with which the run began, on whatever GPU; states of earlier versions name none, and had the plain one.

        Raises UserError for a state that names another.
        """
        known = decisions.made.get(LAYOUT) or (decisions.saved.get(LAYOUT, PLAIN) if decisions.saved else None)
        if known is not None and known not in FORMATS:
            raise UserError(f"the saved run's {LAYOUT} is {known!r}: its state is damaged, or of a newer version")
        return decisions.record(LAYOUT, known or faster_layout(vae, largest_window(windows).bucket))

    def load(self) -> Encoders:
        """The encoders on the device. Raises CheckpointError."""
        vision = load_vision_encoder(self.files, self.device, VISION_DTYPE) if self.files.clip else None
        vae = load_vae(self.files, self.device, self.vae_dtype)
        return Encoders(self.files.family, vae, vision, self.control)

    @property
    def layout(self) -> Layout:
        """What is cached of a clip."""
        family = self.files.family
        vision = vision_fingerprint(self.files, VISION_DTYPE) if self.files.clip else ""
        return Layout(family.given, family.given_as, vision, self.control, self.places is not None)

    def encode_missing(self, root: Path, windows: Sequence[Window], num_workers: int) -> LatentCache:
        """The cache under `root` with all these windows; prints how many had to be encoded.

        Raises UserError if the disk is too small, and as loading clips does.
        """
        cache = LatentCache(root, vae_fingerprint(self.files, self.vae_dtype), self.layout)
        missing = cache.missing(windows)
        known = len({cache.path(window) for window in windows}) - len(missing)
        say(f"latents: {len(missing)} to encode, {known} cached")
        if missing:
            size = cached_bytes(missing, self.files.family, self.control is not None, self.places is not None)
            cache.check_disk_space(size)
            say(f"latents: writing {readable_size(size)} to {cache.folder}")
            self._encode(cache, missing, num_workers)
        return cache

    def _encode(self, cache: LatentCache, missing: Sequence[Window], num_workers: int) -> None:
        encoders, no_text = self.load_for(missing), torch.empty(0, 0)
        with closing(load_ahead([(window,) for window in missing], self.read, num_workers)) as clips:
            progress = tqdm(clips, "encoding latents", len(missing), unit="clip")
            for window, (clip,) in zip(missing, progress, strict=True):
                parts = encoders.encode(clip, no_text).parts()
                cache.store(window, {name: parts[name] for name in parts if name in cache.layout.names(window)})


def open_samples(
    caches: Caches, encoding: LatentEncoding, windows: Sequence[Window], texts: LoadText, root: Path, num_workers: int
) -> Samples:
    """The samples of a run: from the cache in the folder `root`, which is filled for these windows, or fresh ones.

    Of what is encoded fresh, the largest window is enough. With `--prune_cache` the cached latents of all other windows
    are removed. Where no frame of a clip is read, no encoder is loaded.
    """
    if encoding.places == ():
        return CachedSamples(BlankLatents(encoding.files.family), texts, encoding.device, encoding.load)
    if not caches.cache_latents:
        encoders = encoding.load_for(windows)
        beside = SideStream(encoding.device) if caches.overlap_encoding else None
        return FreshSamples(encoders, texts, num_workers, beside, encoding.read)
    cache = encoding.encode_missing(root / LATENTS, windows, num_workers)
    if caches.prune_cache:
        say(f"latents: removed {readable_size(cache.prune(windows))} that this run does not use")
    latents = cache if encoding.places is None else BlankLatents(encoding.files.family, cache)
    return CachedSamples(latents, texts, encoding.device, encoding.load)

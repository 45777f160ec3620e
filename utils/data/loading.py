"""From planned samples to tensors, ahead of the training step.

Letters in shapes: `F` frames, `H` height, `W` width.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.common.errors import LoaderError, UserError
from utils.data.plan import Plan, Window
from utils.data.scan import PairedFile
from utils.media.frames import crop_and_resize, read_frames
from utils.media.probing import MediaError, is_image

T = TypeVar("T")
Load = Callable[[Window], T]

_BATCHES_AHEAD = 2
_PATIENCE = 120.0  # seconds for a batch, after which its decoder is taken to hang


@dataclass(frozen=True, eq=False)
class Clip:
    """Pixels of one window: uint8 RGB (3, F, H, W), the control's where there is one, and the mask (F, H, W)."""

    pixels: Tensor
    caption: str
    control: Tensor | None = None
    mask: Tensor | None = None

    def pin_memory(self) -> "Clip":
        """In page-locked memory, from where a GPU copies without the host waiting; the loader calls this."""
        pinned = {name: getattr(self, name) for name in ("pixels", "control", "mask")}
        return replace(self, **{name: value.pin_memory() for name, value in pinned.items() if value is not None})


def load_clip(window: Window) -> Clip:
    """Read what `window` decided. Control and mask are cut at the same fractions, whatever their own resolution.

    Raises `MediaError` for a file that has become unreadable.
    """
    source = window.source
    itself = PairedFile(source.path, source.info)
    control = _read(source.control, window) if source.control else None
    mask = _read(source.mask, window)[0].contiguous() if source.mask else None  # gray: any channel
    return Clip(_read(itself, window), window.caption, control, mask)


def batches(plan: Plan, load: Load[T], start_batch: int = 0, num_workers: int = 0) -> Generator[list[T], None, None]:
    """Samples of epoch after epoch without end, in the plan's order.

    `start_batch` batches are skipped, past the end of the first epoch if need be: with the number of batches that it
    has had, a run goes on where it was. This call raises `UserError` when nothing can be planned, the iterator raises
    as that of `load_ahead` does.
    """
    if not plan.sources:
        raise UserError("there is nothing to train on: no usable image or video was found")
    plan.epoch(0)
    planned = (batch for epoch in itertools.count() for batch in plan.epoch(epoch))
    return load_ahead(itertools.islice(planned, start_batch, None), load, num_workers)


def load_ahead(planned: Iterable[Sequence[Window]], load: Load[T], num_workers: int) -> Generator[list[T], None, None]:
    """What `load` makes of each planned batch, in order, ahead of time by `num_workers` processes.

    In page-locked memory where there is a GPU. Leaves the global random state alone. Closing the iterator ends the
    workers. It raises `MediaError` for a file that fails, and LoaderError where a worker dies or hangs.
    """
    loader = DataLoader(
        _Loading(load),
        batch_size=None,
        sampler=planned,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=_BATCHES_AHEAD if num_workers else None,
        timeout=_PATIENCE if num_workers else 0,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    return _raising(loader)


def loader_failure(error: RuntimeError) -> LoaderError | None:
    """What torch's loader says, in words alone, of a process that was killed or is late; None for any other error."""
    if "DataLoader" not in str(error):
        return None
    reason = str(error).split("\n")[0]
    return LoaderError(f"loading the next clips failed: {reason}; fewer --num_workers need less memory")


class _Loading(Dataset[list[T] | MediaError], Generic[T]):
    """Indexed by a planned batch. A failure is handed over as a value, since a raised one arrives with a traceback.

    DataLoader gives each worker one torch thread, and with it one decoding thread.
    """

    def __init__(self, load: Load[T]) -> None:
        self.load = load

    def __getitem__(self, windows: Sequence[Window]) -> list[T] | MediaError:
        try:
            return [self.load(window) for window in windows]
        except MediaError as error:
            return error


def _unchanged(loaded: T) -> T:
    return loaded


def _raising(loader: Iterable[list[T] | MediaError]) -> Generator[list[T], None, None]:
    loaded = iter(loader)
    try:
        while True:
            try:
                samples = next(loaded)
            except RuntimeError as error:
                if (failure := loader_failure(error)) is None:
                    raise
                raise failure from None
            if isinstance(samples, MediaError):
                raise samples
            yield samples
    except StopIteration:
        return
    finally:
        # The last reference: a traceback that is kept would otherwise keep the workers too.
        del loaded


def _read(file: PairedFile, window: Window) -> Tensor:
    """(3, F, H, W): the window's frames of a file, or its one image for all of them."""
    still = is_image(file.path)
    frames = read_frames(file.path, [0] if still else window.indices, file.info)
    like = (window.source.info.width, window.source.info.height)
    pixels = crop_and_resize(frames, window.width, window.height, window.position, like)
    pixels = rearrange(pixels, "f c h w -> c f h w")
    return pixels.expand(-1, window.frames, -1, -1) if still and window.frames > 1 else pixels

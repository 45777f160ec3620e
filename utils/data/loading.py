"""From planned samples to tensors, loaded ahead of the training step.

Letters in shapes: `F` frames, `H` height, `W` width.
"""

import itertools
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from utils.common.errors import LoaderError, UserError
from utils.common.signals import deaths_ignored
from utils.common.tensors import map_tensors
from utils.data.plan import Plan, Window
from utils.data.scan import PairedFile
from utils.media.description import MediaError, MediaInfo
from utils.media.frames import crop_and_resize, read_frames, read_mask_frames

T = TypeVar("T")
Load = Callable[[Window], T]
Read = Callable[[Path, Sequence[int], MediaInfo], Tensor]

_BATCHES_AHEAD = 2
_TIMEOUT = 120.0  # seconds for a batch; a worker that takes longer counts as hanging


@dataclass(frozen=True, eq=False)
class Clip:
    """Pixels of one window: uint8 RGB (3, F, H, W), the same of its control, and its mask as uint8 (F, H, W).

    `first` is the frame that a model is given in place of the first one, (3, 1, H, W), if the clip has such a picture.
    `length` is the number of frames where `pixels` are only those of them that a model is given.
    """

    pixels: Tensor
    caption: str
    control: Tensor | None = None
    mask: Tensor | None = None
    first: Tensor | None = None
    length: int | None = None

    def pin_memory(self) -> "Clip":
        """In page-locked memory, from which copies to a GPU are asynchronous; torch's loader calls this."""
        return map_tensors(self, Tensor.pin_memory)


def load_clip(window: Window) -> Clip:
    """Reads the pixels of a window. What belongs to it is cropped at the same fractions, whatever its resolution.

    Raises `MediaError` for a file that has become unreadable.
    """
    source = window.source
    pixels = _read(PairedFile(source.path, source.info), window)
    control = _read(source.control, window) if source.control else None
    mask = _read(source.mask, window, read_mask_frames)[0].contiguous() if source.mask else None
    first = _read(window.first, window)[:, :1] if window.first else None
    return Clip(pixels, window.caption, control, mask, first)


def load_given(window: Window, places: Sequence[int]) -> Clip:
    """Reads of a window only the frames that a model is given: `places` are 0, the first, or that and -1, the last.

    A window of one frame has both in one. Raises as `load_clip` does.
    """
    indices = tuple(dict.fromkeys(window.indices[place] for place in places))
    source = replace(window.source, control=None, mask=None)
    return replace(load_clip(replace(window, source=source, indices=indices)), length=window.frames)


def batches(plan: Plan, load: Load[T], start_batch: int = 0, num_workers: int = 0) -> Generator[list[T], None, None]:
    """Loaded batches of epoch after epoch, without end, in the plan's order.

    `start_batch` batches are skipped, possibly whole epochs: a run resumes with the number of batches that it has
    consumed. The call raises `UserError` if nothing can be planned; the iterator raises as `load_ahead`'s does.
    """
    if not plan.sources:
        raise UserError("there is nothing to train on: no usable image or video was found")
    plan.epoch(0)
    planned = (batch for epoch in itertools.count() for batch in plan.epoch(epoch))
    return load_ahead(itertools.islice(planned, start_batch, None), load, num_workers)


def load_ahead(planned: Iterable[Sequence[Window]], load: Load[T], num_workers: int) -> Generator[list[T], None, None]:
    """Each planned batch through `load`, in order, loaded ahead by `num_workers` processes (0: in this process).

    The tensors are in page-locked memory if there is a GPU. The global random state is not touched. Closing the
    iterator ends the workers. It raises `MediaError` for a file that fails, LoaderError if a worker cannot be started,
    dies or hangs.
    """
    loader = DataLoader(
        _Loading(load),
        batch_size=None,
        sampler=planned,
        num_workers=num_workers,
        collate_fn=_unchanged,
        prefetch_factor=_BATCHES_AHEAD if num_workers else None,
        timeout=_TIMEOUT if num_workers else 0,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    return _unwrapped(loader)


def in_thread(loaded: Iterator[T]) -> Generator[T, None, None]:
    """The same values in the same order, each taken ahead of time by a thread.

    Where taking one raises, so does this, in its place. Closing the generator ends the thread, once the value that it
    is just taking has come.
    """
    thread = ThreadPoolExecutor(1, "loading")
    try:
        pending = deque(thread.submit(next, loaded) for _ in range(_BATCHES_AHEAD))
        while True:
            value = pending.popleft().result()
            pending.append(thread.submit(next, loaded))
            yield value
    except StopIteration:
        return
    finally:
        thread.shutdown(cancel_futures=True)


def loader_failure(error: Exception) -> LoaderError | None:
    """The error of a loader process that was killed or timed out; None for any other error.

    torch raises a plain RuntimeError for both, so only its text tells them from other errors. Where the process dies
    while its batch is handed over, the connection to it breaks.
    """
    if not isinstance(error, EOFError | ConnectionError) and "DataLoader" not in str(error):
        return None
    reason = str(error).split("\n")[0] or "a loading process has ended"
    return LoaderError(f"loading the next clips failed: {reason}; fewer --num_workers need less memory")


class _Loading(TorchDataset[list[T] | MediaError], Generic[T]):
    """Indexed by a planned batch. A failure is returned as a value: a raised one would arrive with a traceback.

    DataLoader limits each worker to one torch thread, so that decoding uses one thread too.
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


def _unwrapped(loader: Iterable[list[T] | MediaError]) -> Generator[list[T], None, None]:
    loaded = _started(loader)
    try:
        while True:
            try:
                samples = next(loaded)
            except (RuntimeError, EOFError, ConnectionError) as error:
                if (failure := loader_failure(error)) is None:
                    raise
                raise failure from None
            if isinstance(samples, MediaError):
                raise samples
            yield samples
    except StopIteration:
        return
    finally:
        # The last reference: otherwise a traceback that someone keeps would keep the workers alive. They end now, which
        # is no failure, whatever they die of.
        with deaths_ignored():
            del loaded


def _started(loader: Iterable[T]) -> Iterator[T]:
    try:
        return iter(loader)
    except (OSError, RuntimeError) as error:  # such as too little memory for a copy of this process
        reason = getattr(error, "strerror", None) or error
        # What is left of torch's iterator fails to end itself, and would print a traceback of that.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            traceback.clear_frames(error.__traceback__)
        finally:
            sys.unraisablehook = hook
    raise LoaderError(f"cannot start processes that load clips: {reason}; fewer --num_workers need less")


def _read(file: PairedFile, window: Window, read: Read = read_frames) -> Tensor:
    """uint8 (C, F, H, W): the window's frames of a video, or an image repeated for all of them."""
    still = file.info.is_image
    frames = read(file.path, [0] if still else window.indices, file.info)
    like = (window.source.info.width, window.source.info.height)
    pixels = crop_and_resize(frames, window.width, window.height, window.position, like)
    pixels = rearrange(pixels, "f c h w -> c f h w")
    return pixels.expand(-1, window.frames, -1, -1) if still and window.frames > 1 else pixels

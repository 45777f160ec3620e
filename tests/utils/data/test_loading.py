"""Clips are read from tiny videos, here and in worker processes."""

import errno
import gc
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.limits import GRID, limits
from tests.media import image, video
from utils.common.errors import LoaderError, UserError
from utils.data import loading
from utils.data.folders import Folder, Rules
from utils.data.loading import Clip, batches, in_thread, load_ahead, load_clip
from utils.data.plan import Plan, Window
from utils.data.scan import Source, scan
from utils.media.frames import crop_and_resize, read_frames
from utils.media.probing import MediaError

SMALL = {"base_res": (32,)}
LIMITS = limits(token_limit=60)


def look(folder: Path, **rules) -> list[Source]:
    sources, problems = scan(Folder(folder, Rules(**rules)), 16.0)
    assert not problems
    return sources


def test_a_clip_holds_the_frames_the_window_names(tmp_path):
    video(tmp_path / "a.mp4", frames=17)
    (clip_source,) = look(tmp_path)
    window = Window(clip_source, "a clip", 32, 32, tuple(range(2, 17, 3)), (0.0, 0.0), GRID)
    clip = load_clip(window)
    assert clip.pixels.shape == (3, 5, 32, 32) and clip.pixels.dtype == torch.uint8
    assert (clip.caption, clip.control, clip.mask) == ("a clip", None, None)
    shown = clip.pixels[..., 0].float().mean((0, 2))
    assert (shown - torch.tensor([2, 5, 8, 11, 14]) * 200 / 16).abs().max() < 6
    assert torch.equal(clip.pixels, load_clip(window).pixels)


def test_a_control_of_another_resolution_shows_the_same_region_and_frames(tmp_path):
    video(tmp_path / "a.mp4", frames=9, size=(128, 64))
    video(tmp_path / "a_control.mp4", frames=9, size=(64, 32), caption=None)
    (pair,) = look(tmp_path, load_control=True)
    clip = load_clip(Window(pair, "", 32, 32, (0, 2, 4, 6, 8), (0.9, 0.5), GRID))
    assert clip.control.shape == clip.pixels.shape
    assert (clip.control.float() - clip.pixels.float()).abs().mean() < 4


def test_every_tensor_of_a_clip_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    zero = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    pinned = Clip(zero, "a fox", control=zero, mask=zero[0], first=zero).pin_memory()
    assert all(tensor.eq(1).all() for tensor in (pinned.pixels, pinned.control, pinned.mask, pinned.first))
    assert pinned.caption == "a fox" and Clip(zero, "").pin_memory().mask is None


@pytest.fixture
def small_set(tmp_path) -> list[Source]:
    for index in range(5):
        video(tmp_path / f"{index}.mp4", frames=9 + index, caption=f"clip {index}")
    image(tmp_path / "still.png")
    return look(tmp_path, **SMALL)


def first(count: int, sources: list[Source], seed: int = 7, **keywords) -> list[list]:
    stream = batches(Plan(sources, LIMITS, seed), load_clip, **keywords)
    taken = list(islice(stream, count))
    stream.close()
    return taken


def same(ours: list[list], theirs: list[list]) -> bool:
    pairs = [pair for batch in zip(ours, theirs, strict=True) for pair in zip(*batch, strict=True)]
    return all(a.caption == b.caption and torch.equal(a.pixels, b.pixels) for a, b in pairs)


def test_workers_change_nothing_but_the_speed_and_end_with_the_iterator(small_set):
    alone = first(9, small_set)
    stream = batches(Plan(small_set, LIMITS, 7), load_clip, num_workers=2)
    helped = list(islice(stream, 9))
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert same(alone, helped) and not multiprocessing.active_children()


def test_batches_follow_the_plan_over_epochs_and_can_be_entered_anywhere(small_set):
    planned = [batch for epoch in range(3) for batch in Plan(small_set, LIMITS, 7).epoch(epoch)]
    everything = first(len(planned), small_set)
    assert [[clip.caption for clip in clips] for clips in everything] == [
        [w.caption for w in batch] for batch in planned
    ]
    assert same(everything[8:], first(len(planned) - 8, small_set, start_batch=8))


def test_the_global_random_state_is_left_alone(small_set):
    before = torch.get_rng_state(), random.getstate()
    first(3, small_set)
    first(3, small_set, num_workers=1)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_deleted_file_is_a_media_error_without_a_traceback_in_it(small_set, num_workers):
    gone = small_set[2].path
    gone.unlink()
    with pytest.raises(MediaError) as caught:
        first(6, small_set, num_workers=num_workers)
    assert caught.value.path == gone and str(caught.value) == f"{gone}: there is no such file"
    assert not multiprocessing.active_children()


def test_workers_can_be_spawned_as_on_windows(small_set):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        helped = first(2, small_set, num_workers=1)
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert same(helped, first(2, small_set))


def test_nothing_to_train_on_is_reported_at_once():
    with pytest.raises(UserError, match="nothing to train on"):
        batches(Plan([], LIMITS, 0), load_clip)


def test_a_mask_may_be_one_image_for_a_whole_video_and_is_cropped_alike(tmp_path):
    video(tmp_path / "a.mp4", frames=9, size=(128, 64))
    image(tmp_path / "a_mask.png", caption=None, size=(64, 32))
    (source,) = look(tmp_path, load_mask=True)
    clip = load_clip(Window(source, "", 64, 32, tuple(range(5)), (0.5, 0.5), GRID))
    assert clip.mask.shape == (5, 32, 64) and clip.mask.dtype == torch.uint8
    assert torch.equal(clip.mask[0], clip.mask[4])


def _dies(window: Window) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_loading_with_a_message(small_set):
    stream = load_ahead(Plan(small_set, LIMITS, 7).epoch(0), _dies, num_workers=1)
    with pytest.raises(LoaderError, match=r"(?s)loading the next clips failed: DataLoader worker .*--num_workers"):
        next(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
@pytest.mark.parametrize("possible", [0, 1])
def test_workers_that_cannot_be_started_end_the_loading_with_a_message(monkeypatch, capfd, small_set, possible):
    """Without a word of torch, whose iterator is half made. pytest has a hook of its own for what nobody catches."""
    fork, made = os.fork, []

    def fork_some() -> int:
        if len(made) == possible:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        made.append(fork())
        return made[-1]

    monkeypatch.setattr(os, "fork", fork_some)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    stream = load_ahead(Plan(small_set, LIMITS, 7).epoch(0), load_clip, num_workers=2)
    with pytest.raises(LoaderError, match="clips: Cannot allocate memory; fewer --num_workers need less$"):
        next(stream)
    gc.collect()
    assert capfd.readouterr().err == "" and sys.unraisablehook is sys.__unraisablehook__


def test_planned_batches_end_where_the_plan_ends(small_set):
    planned = Plan(small_set, LIMITS, 7).epoch(0)
    assert len(list(load_ahead(planned, load_clip, 0))) == len(planned)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_start_picture_is_cut_exactly_as_its_clip(tmp_path, scale):
    video(tmp_path / "a.mp4", frames=9, size=(128, 64))
    frame = Image.fromarray(read_frames(tmp_path / "a.mp4", [0])[0].permute(1, 2, 0).numpy())
    frame.resize((128 * scale, 64 * scale), Image.Resampling.BICUBIC).save(tmp_path / "a_first.png")
    (source,) = look(tmp_path, load_first_frame=True)
    clip = load_clip(Window(source, "", 32, 32, (0, 2, 4, 6, 8), (0.9, 0.5), GRID))
    assert clip.first.shape == (3, 1, 32, 32) and clip.first.dtype == torch.uint8
    difference = (clip.first.float() - clip.pixels[:, :1].float()).abs()
    assert difference.max() == 0 if scale == 1 else difference.mean() < 1
    picture = read_frames(tmp_path / "a_first.png", [0])
    cut = crop_and_resize(picture, 32, 32, (0.9, 0.5), like=(128, 64))
    assert torch.equal(clip.first[:, 0], cut[0])


def test_a_sample_from_the_middle_of_its_clip_is_not_given_the_start_picture(tmp_path):
    video(tmp_path / "a.mp4", frames=9)
    image(tmp_path / "a_first.png", caption=None)
    (source,) = look(tmp_path, load_first_frame=True)
    window = Window(source, "", 32, 32, (1, 2, 3, 4, 5), (0.5, 0.5), GRID)
    assert load_clip(window).first is None and load_clip(replace(window, indices=(0,))).first is not None


# ------------------------------------------------------------------------------------------------------------ a thread


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loading")]


def test_a_thread_changes_nothing_but_when_batches_are_loaded(small_set):
    plan = Plan(small_set, LIMITS, 7)
    before = torch.get_rng_state(), random.getstate()
    stream = in_thread(batches(plan, load_clip, start_batch=3))
    helped = list(islice(stream, 9))
    stream.close()
    assert same(first(9, small_set, start_batch=3), helped)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_a_thread_is_two_values_ahead_and_no_further():
    taken = []
    stream = in_thread(number for number in range(100) if taken.append(number) is None)
    assert [next(stream), next(stream)] == [0, 1]
    while len(taken) < 4:
        time.sleep(0.001)
    time.sleep(0.02)
    assert taken == [0, 1, 2, 3]
    stream.close()


def test_values_of_a_thread_end_where_their_source_ends():
    assert list(in_thread(iter(range(5)))) == [0, 1, 2, 3, 4] and list(in_thread(iter(()))) == []
    assert not loading_threads()


def failing_at(last: int) -> Iterator[int]:
    yield from range(last)
    raise MediaError(Path("a.mp4"), "it is gone")


def test_an_error_of_a_thread_is_raised_in_its_place_and_ends_the_thread():
    stream = in_thread(failing_at(3))
    assert list(islice(stream, 3)) == [0, 1, 2]
    with pytest.raises(MediaError, match="it is gone"):
        next(stream)
    assert not loading_threads()


def test_closing_waits_for_the_value_in_progress_alone():
    taken, going = [], threading.Event()

    def slowly() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number
            going.wait(10)

    stream = in_thread(slowly())
    assert next(stream) == 0 and loading_threads()
    threading.Timer(0.05, going.set).start()
    stream.close()
    assert not loading_threads() and len(taken) <= 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts raise KeyboardInterrupt. A shell has processes in its background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_waiting_for_a_thread_ends_it(interruptible):
    begun = threading.Event()

    def slow() -> Iterator[int]:
        begun.set()
        time.sleep(0.3)
        yield 1

    stream = in_thread(slow())
    interrupt = threading.Thread(target=lambda: begun.wait() and signal.raise_signal(signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt), closing(stream):
        next(stream)
    interrupt.join()
    for thread in loading_threads():
        thread.join(10)  # one that was just being started is not waited for, but told to end
    assert not loading_threads()


def test_the_thread_of_a_stream_that_nobody_closed_ends_with_it():
    stream = in_thread(itertools.count())
    assert next(stream) == 0 and loading_threads()
    del stream
    assert not loading_threads()


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no signal tells of a process that has ended")
def test_workers_that_die_while_loading_ends_are_no_failure():
    """torch's handler would raise in `__del__`, where it joins its workers, and the traceback would be printed."""
    seen: list[object] = []

    class Workers:
        def __iter__(self) -> "Workers":
            return self

        def __next__(self) -> list[int]:
            return [1]

        def __del__(self) -> None:
            seen.append(signal.getsignal(signal.SIGCHLD))

    class Loader:
        def __iter__(self) -> Workers:
            return Workers()

    before = signal.getsignal(signal.SIGCHLD)
    stream = loading._unwrapped(Loader())
    assert next(stream) == [1]
    with_handler = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        stream.close()
    finally:
        signal.signal(signal.SIGCHLD, with_handler)
    assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGCHLD) == before


def test_loading_may_end_in_another_thread():
    stream = load_ahead([(0,), (1,)], lambda window: window, num_workers=0)
    assert next(stream) == [0]
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert next(stream, None) is None


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset by peer")])
def test_a_connection_to_a_loading_process_that_breaks_is_the_end_of_that_process(error):
    def broken():
        yield ["a batch"]
        raise error

    loaded = loading._unwrapped(broken())
    assert next(loaded) == ["a batch"]
    with pytest.raises(
        LoaderError, match="loading the next clips failed: (a loading process has ended|reset by peer);"
    ):
        next(loaded)

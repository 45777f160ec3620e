"""Inspects media files in child processes, so that a file which hangs or crashes a decoder costs only itself.

What they answer is remembered by the content of the files.
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

from utils.common.digests import DIGESTS, LATENTS, Digests
from utils.common.errors import UserError
from utils.common.files import file_stamp
from utils.media.description import VIDEO, MediaError, MediaInfo, from_json
from utils.media.description_cache import DescriptionCache
from utils.media.files import check_file
from utils.media.processes import GRACE, PROGRAM, Process, describe_end, end, start

T = TypeVar("T")

FOLDER = "media"  # of descriptions, in a cache folder
MAX_CHILDREN = 16
BYTES_PER_CHILD = 2**20  # less does not justify another process
LOOK_EVERY = 0.5  # seconds, at a child that is silent
# What reading from a child raises that has crashed, or that answers with anything but an answer.
NONSENSE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, psutil.Error)


@dataclass(frozen=True)
class Patience:
    """When a child is given up that neither decodes a frame nor reads a byte: its own CPU time, or time without any.

    Neither depends on what else the machine does: where a child gets no processor, it uses no time of its own, and
    where it gets a little, it is not waiting for a file.
    """

    cpu: float = 20.0  # seconds
    idle: float = 120.0  # seconds


class Inspector:
    """Inspects the files of a run. What it finds is remembered in `cache`, a folder, if there is one.

    With `full` every frame is decoded. `decoded` is the number of videos of which that was done in this run, `seconds`
    the time of all inspection that was not known before.
    """

    def __init__(self, cache: Path | None = None, full: bool = True, patience: Patience = Patience()) -> None:
        self.full, self.patience = full, patience
        self.decoded, self.seconds = 0, 0.0
        self._descriptions = DescriptionCache(cache and cache / FOLDER)
        self._digests = Digests(cache and cache / LATENTS / DIGESTS)

    def inspect(self, paths: Sequence[Path], masks: Iterable[Path] = ()) -> dict[Path, MediaInfo | MediaError]:
        """What each file holds, or why it cannot be used. `masks` are those of them that are read as masks."""
        started, as_masks = time.monotonic(), set(masks)
        found = {path: self._known(path, path in as_masks) for path in paths}
        unknown = [path for path, known in found.items() if known is None]
        if unknown:
            questions = [self._question(path, path in as_masks) for path in unknown]
            for path, answer in _ask_children(questions, self.patience).items():
                found[path] = answer.found
                self.decoded += answer.is_new and isinstance(answer.found, MediaInfo) and answer.found.kind == VIDEO
                if answer.digest is not None:
                    self._digests.remember(path, answer.stamp, answer.digest)
            self.seconds += time.monotonic() - started
            self._digests.save()
        return {path: known for path, known in found.items() if known is not None}

    def _known(self, path: Path, mask: bool) -> MediaInfo | MediaError | None:
        try:
            stamp = file_stamp(check_file(path))
        except MediaError as error:
            return error
        digest = self._digests.known(path, stamp)
        return None if digest is None else self._descriptions.find(path, digest, stamp, self.full, mask)

    def _question(self, path: Path, mask: bool) -> dict[str, Any]:
        folder = self._descriptions.folder
        cache = None if folder is None else str(folder.absolute())
        return {"path": str(path), "full": self.full, "mask": mask, "cache": cache}


@dataclass(frozen=True)
class _Answer:
    """What a child found; `digest` is None where it could not finish. Of a copy it may be known: then it is not new."""

    found: MediaInfo | MediaError
    is_new: bool = True
    stamp: tuple[int, ...] = ()
    digest: str | None = None


def _parse_answer(path: Path, answer: dict[str, Any]) -> _Answer:
    """What a child has answered. Raises KeyError, TypeError, ValueError or ArithmeticError for anything else."""
    reason, info = answer["reason"], answer["info"]
    found = from_json(info) if reason is None else MediaError(path, reason)
    return _Answer(found, answer["is_new"], tuple(answer["stamp"]), answer["digest"])


def _ask_children(questions: list[dict[str, Any]], patience: Patience) -> dict[Path, _Answer]:
    """All answers, from as many children as there are processors and files; the largest files first."""
    sizes = {question["path"]: _size(question["path"]) for question in questions}
    total, cores = sum(sizes.values()), count_processors()
    count = min(cores, MAX_CHILDREN, len(questions), 1 + total // BYTES_PER_CHILD)
    children = [Child(patience) for _ in range(count)]
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)
    bar: tqdm[Any] = tqdm(desc="checking media", total=total, unit="B", unit_scale=True, delay=2, leave=False)

    def ask(question: dict[str, Any]) -> tuple[Path, _Answer]:
        child, size = idle.get(), sizes[question["path"]]
        place = _Place(bar, size)
        try:
            return Path(question["path"]), child.ask(question | {"threads": cores // count}, place.move)
        finally:
            place.move(size)
            idle.put(child)

    with bar, ThreadPoolExecutor(count) as pool:
        ordered = sorted(questions, key=lambda question: -sizes[question["path"]])
        try:
            answers = [_submitted(pool, partial(ask, question)) for question in ordered]
            return dict(answer.result() for answer in answers)
        finally:  # also where the user interrupts it: no child is waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.end_for_good()


def _submitted(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    try:
        return pool.submit(work)
    except RuntimeError as error:  # as many threads as there may be
        raise _cannot_start(error) from error


def _size(path: str) -> int:
    """In bytes; of a file that has just vanished, 0: a child says what is wrong with it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def count_processors() -> int:
    """How many processors this process may use."""
    own = psutil.Process()
    return len(own.cpu_affinity()) if hasattr(own, "cpu_affinity") else os.cpu_count() or 1


class _Place:
    """How much of a file a progress bar counts."""

    def __init__(self, bar: "tqdm[Any]", size: int) -> None:
        self.bar, self.size, self.counted = bar, size, 0

    def move(self, position: int) -> None:
        step = min(position, self.size) - self.counted
        if step > 0:
            self.counted += step
            with self.bar.get_lock():
                self.bar.update(step)


class Child:
    """A process that inspects one file at a time. After a file that it did not survive, a new one is started."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._process: Process | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._is_over = False

    def ask(self, question: dict[str, Any], move: Callable[[int], None]) -> _Answer:
        """The answer to a question; `move` is called with how many bytes of the file it has read."""
        path = Path(question["path"])
        process = self._process or self._start()
        try:
            absolute = {"path": str(path.absolute())}  # a child has a working directory of its own
            print(json.dumps(question | absolute), file=process.stdin, flush=True)
            answer = self._wait(process, move)
            if answer is not None and "given up" not in answer:
                return _parse_answer(path, answer)
        except NONSENSE:
            answer = None
        if answer is None:
            how = describe_end(self.end(GRACE))
            return _Answer(MediaError(path, f"reading it crashed{how}: damaged, or not a video that can be decoded"))
        self.end()
        return _Answer(MediaError(path, f"reading it was given up: {answer['given up']}"))

    def _wait(self, process: Process, move: Callable[[int], None]) -> dict[str, Any] | None:
        """The answer, or why it is no longer waited for; None if the child has ended."""
        watch = _Watch(process.pid, self.patience)
        while True:
            try:
                line = self._lines.get(timeout=LOOK_EVERY)
            except queue.Empty:
                reason = watch.gives_up()
                if reason:
                    return {"given up": reason}
                continue
            if not line:
                return None
            said: dict[str, Any] = json.loads(line)
            if "position" not in said:
                return said
            watch.renew()
            move(said["position"])

    def _start(self) -> Process:
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        try:
            process = start()
        except OSError as error:
            raise _cannot_start(error.strerror or error) from error
        reader = threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True)
        try:
            reader.start()
        except RuntimeError as error:  # as many threads as there may be
            end(process)
            raise _cannot_start(error) from error
        self._process, self._lines, self._reader = process, lines, reader
        if self._is_over:  # while it was starting
            self.end()
            raise _cannot_start("interrupted")
        return process

    def end(self, grace: float = 0.0) -> int | None:
        """Ends its process, if it has one: its exit code as `utils.media.processes.end` has it."""
        process, self._process = self._process, None
        if process is None:
            return None
        code = end(process, grace)
        self._reader.join()
        return code

    def end_for_good(self) -> None:
        """Also a process that is just being started."""
        self._is_over = True
        self.end()


def _cannot_start(reason: object) -> UserError:
    return UserError(
        f"cannot start a process that inspects media files: {reason}\n"
        f"it needs memory and a free process; what else it lacks, this says: python -m {PROGRAM[-1]}"
    )


def _forward(lines: Iterable[str], target: "queue.SimpleQueue[str]") -> None:
    """Puts lines into a queue, which can be waited for with a timeout; at last an empty one."""
    with contextlib.suppress(ValueError, OSError):  # closed by the other thread
        for line in lines:
            target.put(line)
    target.put("")


class _Watch:
    """Whether a process that is silent still works."""

    def __init__(self, pid: int, patience: Patience) -> None:
        self.patience = patience
        self._process = psutil.Process(pid)
        self._read = self._cpu = 0.0
        self.renew()

    def renew(self) -> None:
        """It has decoded a frame or read a byte."""
        with contextlib.suppress(psutil.Error):
            self._read, self._cpu = self._bytes_read(), self._cpu_time()
        self._busy_cpu, self._busy_at = self._cpu, time.monotonic()

    def gives_up(self) -> str:
        """Why waiting for it has no point; nothing while it has."""
        try:
            read, cpu = self._bytes_read(), self._cpu_time()
        except psutil.Error:  # it has ended: its last line says so
            return ""
        if read != self._read:
            self.renew()
            return ""
        if cpu - self._cpu >= self.patience.cpu:
            return f"a decoder worked for {self.patience.cpu:g} s of processor time and made no frame"
        if cpu > self._busy_cpu:
            self._busy_cpu, self._busy_at = cpu, time.monotonic()
        if time.monotonic() - self._busy_at >= self.patience.idle:
            return f"nothing came from its disk for {self.patience.idle:g} s"
        return ""

    def _cpu_time(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _bytes_read(self) -> float:
        """By any call of the system, where it counts them: on Linux, and on Windows."""
        if not hasattr(self._process, "io_counters"):
            return 0.0
        counters = self._process.io_counters()
        return getattr(counters, "read_chars", counters.read_bytes)

"""Inspects media files in child processes, so that a file which hangs or crashes a decoder costs only itself.

What they answer is remembered by the content of the files.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from utils.common.digests import DIGESTS, LATENTS, Digests
from utils.common.files import file_stamp
from utils.media.description import MediaError, MediaInfo, from_json
from utils.media.descriptions import Descriptions
from utils.media.files import check_file
from utils.media.probing import is_image

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "utils.media.child")
FOLDER = "media"  # of descriptions, in a cache folder
MAX_CHILDREN = 16
BYTES_PER_CHILD = 2**20  # less does not justify another process
LOOK_EVERY = 0.5  # seconds, at a child that is silent


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

    With `full` every frame is decoded. `decoded` and `seconds` say how many files that was, and how long it took.
    """

    def __init__(self, cache: Path | None = None, full: bool = True, patience: Patience = Patience()) -> None:
        self.full, self.patience = full, patience
        self.decoded, self.seconds = 0, 0.0
        self._descriptions = Descriptions(cache and cache / FOLDER)
        self._digests = Digests(cache and cache / LATENTS / DIGESTS)

    def inspect(self, paths: Sequence[Path], masks: Iterable[Path] = ()) -> dict[Path, MediaInfo | MediaError]:
        """What each file holds, or why it cannot be used. `masks` are those of them that are read as masks."""
        started, as_masks = time.monotonic(), set(masks)
        found = {path: self._known(path, path in as_masks) for path in paths}
        unknown = [path for path, known in found.items() if known is None]
        if unknown:
            answers = _ask_children(unknown, as_masks, self.full, self.patience)
            for path, answer in answers.items():
                found[path] = self._remember(path, answer, path in as_masks)
            self.decoded += sum(not is_image(path) for path in unknown)
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

    def _remember(self, path: Path, answer: "_Answer", mask: bool) -> MediaInfo | MediaError:
        if answer.digest is not None:
            self._digests.remember(path, answer.stamp, answer.digest)
            self._descriptions.keep(path, answer.digest, answer.found, self.full, mask)
        return answer.found


@dataclass(frozen=True)
class _Answer:
    """What a child found; `digest` is None where it could not finish."""

    found: MediaInfo | MediaError
    stamp: tuple[int, ...] = ()
    digest: str | None = None


def _ask_children(paths: list[Path], masks: set[Path], full: bool, patience: Patience) -> dict[Path, _Answer]:
    """All answers, from as many children as there are processors and files; the largest files first."""
    sizes = {path: path.stat().st_size for path in paths}
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1
    count = min(cores, MAX_CHILDREN, len(paths), 1 + sum(sizes.values()) // BYTES_PER_CHILD)
    children = [Child(patience) for _ in range(count)]
    idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)
    bar: tqdm[Any] = tqdm(
        desc="checking media", total=sum(sizes.values()), unit="B", unit_scale=True, delay=2, leave=False
    )

    def ask(path: Path) -> _Answer:
        child, place = idle.get(), _Place(bar, sizes[path])
        try:
            question = {"path": str(path.absolute()), "full": full, "mask": path in masks, "threads": cores // count}
            return child.ask(path, question, place.move)
        finally:
            place.move(sizes[path])
            idle.put(child)

    try:
        with bar, ThreadPoolExecutor(count) as pool:
            ordered = sorted(paths, key=sizes.__getitem__, reverse=True)
            return dict(zip(ordered, pool.map(ask, ordered), strict=True))
    finally:
        for child in children:
            child.end()


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
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, path: Path, question: dict[str, Any], move: Callable[[int], None]) -> _Answer:
        process = self._process or self._start()
        try:
            print(json.dumps(question), file=process.stdin, flush=True)
            answer = self._wait(process, move)
        except OSError:
            answer = None
        if answer is None:
            self.end()
            return _Answer(MediaError(path, "reading it crashed: damaged, or not a video that can be decoded"))
        if "gave up" in answer:
            self.end()
            return _Answer(MediaError(path, f"reading it was given up: {answer['gave up']}"))
        stamp, digest = tuple(answer["stamp"]), answer["digest"]
        if answer["reason"] is not None:
            return _Answer(MediaError(path, answer["reason"]), stamp, digest)
        return _Answer(from_json(answer["info"]), stamp, digest)

    def _wait(self, process: "subprocess.Popen[str]", move: Callable[[int], None]) -> dict[str, Any] | None:
        """The answer, or why it is no longer waited for; None if the child has ended."""
        watch = _Watch(process.pid, self.patience)
        while True:
            try:
                line = self._lines.get(timeout=LOOK_EVERY)
            except queue.Empty:
                reason = watch.gives_up()
                if reason:
                    return {"gave up": reason}
                continue
            if not line:
                return None
            said: dict[str, Any] = json.loads(line)
            if "position" not in said:
                return said
            watch.renew()
            move(said["position"])

    def _start(self) -> "subprocess.Popen[str]":
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(COMMAND, cwd=ROOT, encoding="utf-8", stdin=pipe, stdout=pipe, stderr=nowhere)
        self._process, self._lines = process, queue.SimpleQueue()
        threading.Thread(target=_forward, args=(process.stdout, self._lines), daemon=True).start()
        return process

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._process.stdin.close() if self._process.stdin else None
            self._process = None


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
        """Why it is no longer waited for; nothing as long as it is."""
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
        """By any call of the system, where it counts them."""
        counters = getattr(self._process, "io_counters", None)
        return 0.0 if counters is None else getattr(counters(), "read_chars", 0)

"""The program of a child process that inspects media files. Imports little, so that it starts fast.

It writes READY, and for each line of input, a question in JSON, lines of JSON: how far it is, and at last the answer.
"""

import json
import os
import queue
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TextIO

from av import logging

from utils.common.digests import hash_file
from utils.common.files import file_stamp
from utils.media.decoding import read_pixels
from utils.media.description import MediaError, MediaInfo, to_json
from utils.media.description_cache import DescriptionCache
from utils.media.files import check_file
from utils.media.masks import measure_mask
from utils.media.probing import probe
from utils.media.stream import Listen, Progress

READY = "ready\n"
REPORT_EVERY = 0.2  # seconds


def inspect(path: Path, full: bool, mask: bool, threads: int, listen: Listen, progress: Progress) -> MediaInfo:
    """The result of `probe`, with the measures of a mask; a file not decoded in full has at least a readable end.

    Raises `MediaError`.
    """
    info = probe(path, full, threads, listen, progress)
    if not info.is_image and not full:
        read_pixels(path, [info.frames - 1], info)
    return replace(info, mask=measure_mask(path, info)) if mask else info


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(questions, os.getppid()), daemon=True).start()
    with _open_reports() as reports:
        # Decoders may print, but not among the answers. What FFmpeg reports as an error is read from the file.
        os.dup2(reports.fileno(), sys.stderr.fileno())
        os.dup2(reports.fileno(), sys.stdout.fileno())
        listen = _listen_to_ffmpeg(reports.fileno())
        print(READY, end="", file=answers, flush=True)
        while line := questions.get():
            print(json.dumps(_answer(json.loads(line), listen, answers)), file=answers, flush=True)


def _open_reports() -> IO[bytes]:
    """A file to whose end all is written; in memory where that is possible, since a disk may be full."""
    if sys.platform != "linux":
        return tempfile.TemporaryFile("a+b")
    import fcntl  # POSIX only

    descriptor = os.memfd_create("reports")
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return os.fdopen(descriptor, "r+b")


def _receive(questions: "queue.SimpleQueue[str]", parent: int) -> None:
    """Takes questions; at their end an empty one, or the end of this process where that of its parent has ended."""
    for line in sys.stdin:
        questions.put(line)
    if os.getppid() != parent:
        os._exit(1)
    questions.put("")


def _answer(question: dict[str, Any], listen: Listen, answers: TextIO) -> dict[str, Any]:
    """What a file holds, or why it cannot be used; `is_new` where that was not known of its content."""
    path, full, mask = Path(question["path"]), question["full"], question["mask"]
    cache = DescriptionCache(question["cache"] and Path(question["cache"]))
    answer: dict[str, Any] = {"stamp": (), "digest": None, "info": None, "reason": None, "is_new": True}
    progress = _progress(answers)
    try:
        stamp = file_stamp(check_file(path))
        digest = hash_file(path, progress)
        found = cache.find(path, digest, stamp, full, mask)
        answer |= {"stamp": stamp, "digest": digest, "is_new": found is None}
        if found is None:
            listen()  # what was reported about another file
            found = _inspect(path, full, mask, question["threads"], listen, progress)
            if file_stamp(check_file(path)) != stamp:
                return answer | {"digest": None, "reason": "it changed while it was read: start again"}
            cache.keep(path, digest, found, full, mask)
    except (MediaError, OSError) as error:
        found = error if isinstance(error, MediaError) else MediaError(path, f"it cannot be read: {error.strerror}")
    if isinstance(found, MediaError):
        return answer | {"reason": found.reason}
    return answer | {"info": to_json(replace(found, digest=answer["digest"]))}


def _inspect(
    path: Path, full: bool, mask: bool, threads: int, listen: Listen, progress: Progress
) -> MediaInfo | MediaError:
    try:
        return inspect(path, full, mask, threads, listen, progress)
    except MediaError as error:
        return error


def _progress(answers: TextIO) -> Progress:
    last = time.monotonic()

    def progress(position: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY:
            last = time.monotonic()
            print(json.dumps({"position": position}), file=answers, flush=True)

    return progress


def _listen_to_ffmpeg(descriptor: int) -> Listen:
    """FFmpeg writes its errors itself, without Python's lock, so that decoders may use threads."""
    logging.set_libav_level(logging.ERROR)
    logging.restore_default_callback()
    read = 0

    def listen() -> str:
        nonlocal read
        if os.fstat(descriptor).st_size == read:
            return ""
        os.lseek(descriptor, read, os.SEEK_SET)  # writes go to the end wherever this is
        parts = list(iter(lambda: os.read(descriptor, 2**16), b""))
        read += sum(map(len, parts))
        return b"".join(parts).decode("utf-8", "replace")

    return listen


if __name__ == "__main__":
    main()

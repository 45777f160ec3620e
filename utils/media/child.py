"""The program of a child process that inspects media files. Imports little, so that it starts fast.

For each line of input, a question in JSON, it writes lines of JSON: how far it is, and at last the answer.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

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
    with tempfile.TemporaryFile("a+b") as reports:
        # Decoders may print, but not among the answers. What FFmpeg reports as an error is read from the file.
        os.dup2(reports.fileno(), sys.stderr.fileno())
        os.dup2(reports.fileno(), sys.stdout.fileno())
        listen = _listen_to_ffmpeg(reports.fileno())
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line), listen, answers)), file=answers, flush=True)


def _answer(question: dict[str, Any], listen: Listen, answers: TextIO) -> dict[str, Any]:
    """What a file holds, or why it cannot be used; `is_new` where that was not known of its content."""
    path, full, mask = Path(question["path"]), question["full"], question["mask"]
    descriptions = DescriptionCache(question["cache"] and Path(question["cache"]))
    answer: dict[str, Any] = {"stamp": (), "digest": None, "info": None, "reason": None, "is_new": True}
    try:
        stamp = file_stamp(check_file(path))
        digest = hash_file(path)
        found = descriptions.find(path, digest, stamp, full, mask)
        answer |= {"stamp": stamp, "digest": digest, "is_new": found is None}
        if found is None:
            found = _inspect(path, full, mask, question["threads"], listen, _progress(answers))
            descriptions.keep(path, digest, found, full, mask)
    except (MediaError, OSError) as error:
        found = error if isinstance(error, MediaError) else MediaError(path, f"it cannot be read: {error.strerror}")
    return answer | ({"reason": found.reason} if isinstance(found, MediaError) else {"info": to_json(found)})


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
        text = os.read(descriptor, 2**16)
        read += len(text)
        return text.decode("utf-8", "replace")

    return listen


if __name__ == "__main__":
    main()

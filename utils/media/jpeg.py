"""Damage in JPEG pictures, which Pillow shows without a word: grey or shifted blocks. Imports no torch."""

from collections.abc import Callable
from pathlib import Path

import av
from av.packet import Packet

# What FFmpeg says of codes that mean nothing. Other reports are about features that it does not know.
REPORTS = ("overread", "bad vlc", "error dc", "error count", "error y=")
START = b"\xff\xd8\xff"


def jpeg_damage(path: Path, listen: Callable[[], str]) -> str:
    """What is wrong in a JPEG, by FFmpeg's decoder; nothing for other files, and where it knows no damage.

    `listen` returns what FFmpeg has reported as errors since the last call.
    """
    content = path.read_bytes()
    if not content.startswith(START):
        return ""
    listen()
    decoder = av.CodecContext.create("mjpeg", "r")
    try:
        decoder.decode(Packet(content))
        decoder.decode(None)
    except av.FFmpegError:  # a kind of JPEG that FFmpeg does not know
        return ""
    reported = (line.partition("] ")[2] for line in listen().splitlines())
    return next((text[:80] for text in reported if text.isprintable() and any(word in text for word in REPORTS)), "")

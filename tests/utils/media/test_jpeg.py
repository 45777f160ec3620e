"""Damage inside of a JPEG is found, and no healthy one is accused. FFmpeg's reports are heard in a child process."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.media.description import MediaError
from utils.media.inspection import Inspector
from utils.media.jpeg import jpeg_damage

PICTURE = Image.fromarray(
    np.kron(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
)
KINDS = {
    "plain": (PICTURE, {}),
    "progressive": (PICTURE, {"progressive": True}),
    "full colour": (PICTURE, {"subsampling": 0, "quality": 98}),
    "grey": (PICTURE.convert("L"), {}),
    "cmyk": (PICTURE.convert("CMYK"), {}),
    "restarts": (PICTURE, {"restart_marker_blocks": 4}),
    "odd": (PICTURE.resize((33, 17)), {"optimize": True}),
}


def found(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("*.jpg"))
    answers = Inspector().inspect(paths)
    return {path.stem: found.reason if isinstance(found, MediaError) else "" for path, found in answers.items()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    for name, (picture, how) in KINDS.items():
        picture.save(tmp_path / f"{name}.jpg", **how)
    return tmp_path


def test_healthy_pictures_of_every_kind_are_accepted(pictures):
    (pictures / "tail.jpg").write_bytes((pictures / "plain.jpg").read_bytes() + b"junk" * 100)
    Image.new("RGB", (16, 16)).save(pictures / "is_a_png.jpg", "PNG")
    assert set(found(pictures).values()) == {""}


def test_a_hole_is_found_also_where_pillow_reads_the_picture(pictures):
    for path in pictures.glob("*.jpg"):
        data = bytearray(path.read_bytes())
        start, length = len(data) // 2, len(data) // 8
        data[start : start + length] = bytes(length)
        path.write_bytes(data)
    reasons = found(pictures)
    assert "" not in reasons.values(), reasons
    assert sum(reason.startswith("damaged: ") for reason in reasons.values()) >= 4, reasons


def test_only_reports_about_codes_are_damage(tmp_path):
    PICTURE.save(tmp_path / "a.jpg")
    reports = iter(["before", "[mjpeg @ 0x1] unable to decode APP fields\n[mjpeg @ 0x1] error count: 65\n"])
    assert jpeg_damage(tmp_path / "a.jpg", lambda: next(reports)) == "error count: 65"
    assert jpeg_damage(tmp_path / "a.jpg", lambda: "[mjpeg @ 0x1] unable to decode APP fields") == ""

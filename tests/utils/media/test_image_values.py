"""Pictures whose values are no plain 8-bit colours, and texts that look like codes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from utils.media.decoding import read_pixels
from utils.media.description import Look, MediaError
from utils.media.images import probe_image


def read(path: Path) -> np.ndarray:
    return read_pixels(path, (0,))[0]


def test_fractions_are_refused_not_shown_black(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="its values are fractions: save it with 8 or 16 bits"):
        probe_image(tmp_path / "a.tif")


def test_whole_numbers_of_32_bits_may_hold_8(tmp_path):
    for name, values, expected in (("a", [0, 100, 200], [0, 100, 200]), ("b", [0, 257, 65535], [0, 1, 255])):
        Image.fromarray(np.array([values], np.int32)).save(tmp_path / f"{name}.tif")
        assert read(tmp_path / f"{name}.tif")[0, :, 0].tolist() == expected


def test_codes_of_hdr_are_those_of_the_file_not_of_texts_in_it(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "cICP\x09\x10\x00\x01")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    assert probe_image(tmp_path / "a.png").look == Look()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", icc_profile=profile + b"cICP\x09\x10\x00\x01" * 20000)
    assert probe_image(tmp_path / "b.png").look.transfer == ""


def test_the_transparent_grey_of_a_16_bit_png_becomes_white(tmp_path):
    deep = Image.fromarray(np.array([[0, 257 * 90, 65535]], np.uint16))
    deep.save(tmp_path / "a.png", transparency=257 * 90)
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 255]

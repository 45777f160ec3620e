"""Colours of known light are encoded, and must come back as codes of BT.709."""

import numpy as np
import pytest

from tests.light import CURVES, encoded
from utils.media import colour
from utils.media.colour import KNEE, to_sdr
from utils.media.description import Look

COLOURS = np.array([(180, 20, 20), (20, 190, 20), (20, 20, 200), (210, 210, 20), (128, 128, 128), (200, 150, 120)])


LOOKS = [Look(transfer=curve, primaries=primaries) for curve in CURVES for primaries in ("", "bt2020", "p3")]
LOOKS = [look for look in LOOKS if look != Look()]


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: f"{look.transfer}-{look.primaries}")
def test_colours_that_bt709_has_come_back_by_value(look):
    light = (COLOURS / 255) ** 2.4
    assert light.max() <= KNEE
    back = to_sdr(encoded(light[None], look), look)
    assert back.dtype == np.uint8 and back.shape == (1, 6, 3)
    assert np.abs(back[0].astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize(
    ("light", "code"), [(0, 0), (0.25, 143), (0.7, 220), (1, 238), (4.926, 253), (12, 254), (49.26, 255)]
)
def test_white_is_bright_and_what_is_brighter_still_differs(light, code):
    look = Look(transfer="pq", primaries="bt2020")
    assert to_sdr(encoded(np.full((1, 1, 3), light), look), look)[0, 0].tolist() == [code] * 3


def test_the_whites_of_both_curves_are_the_same():
    white = np.ones((1, 1, 3))
    pictures = [to_sdr(encoded(white, look), look) for look in LOOKS if look.transfer]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures) and pictures[0].min() == 238
    wide = [to_sdr(encoded(white, look), look) for look in LOOKS if not look.transfer]
    assert all(picture.min() == 255 for picture in wide), "what is not HDR is not made darker"


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: f"{look.transfer}-{look.primaries}")
def test_greys_stay_neutral_and_brighter_codes_never_become_darker(look):
    ramp = np.arange(65536, dtype=np.uint16)
    back = to_sdr(np.stack([ramp] * 3, -1)[None], look)[0].astype(int)
    assert np.ptp(back, axis=1).max() <= 1, "neutral"
    assert (
        np.diff(back[:, 1]).min() >= 0
        and back[0].max() == 0
        and back[-1].min() == (252 if look.transfer == "hlg" else 255)
    )


def test_bright_colours_keep_their_hue():
    light, look = np.array([(3.0, 1.5, 0.5), (0.4, 6.0, 2.0)]), Look(transfer="pq", primaries="bt2020")
    back = (to_sdr(encoded(light[None], look), look)[0] / 255) ** 2.4
    np.testing.assert_allclose(back / back.max(1, keepdims=True), light / light.max(1, keepdims=True), atol=0.01)


@pytest.mark.parametrize(("primaries", "expected"), [("bt2020", (0, 255, 0)), ("p3", (0, 255, 0))])
def test_what_bt709_lacks_becomes_its_purest_colour(primaries, expected):
    green = np.array([[[0, 65535, 0]]], np.uint16)
    assert to_sdr(green, Look(primaries=primaries))[0, 0].tolist() == list(expected)


def test_pictures_of_any_shape_are_computed_in_parts_of_equal_result(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 65536, (37, 41, 3), dtype=np.uint16)
    look = Look(transfer="hlg", primaries="bt2020")
    whole = to_sdr(pixels, look)
    monkeypatch.setattr(colour, "PIXELS", 100)
    assert np.array_equal(to_sdr(pixels, look), whole) and whole.shape == (37, 41, 3)

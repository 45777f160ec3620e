"""Names that people take for the same, and the order in which they list them."""

import unicodedata
from pathlib import Path

import pytest

from utils.data.names import differs_in_case, natural_order, same_name


@pytest.mark.parametrize(
    ("one", "other"),
    [("café", unicodedata.normalize("NFD", "café")), ("Clip01.MP4", "clip01.mp4"), ("STRASSE", "straße"), ("가", "가")],
)
def test_names_that_look_alike_have_one_form(one, other):
    assert same_name(one) == same_name(other)


@pytest.mark.parametrize(("one", "other"), [("cafe", "café"), ("clip1", "clip01"), ("a b", "a_b")])
def test_other_names_differ(one, other):
    assert same_name(one) != same_name(other)


def test_numbers_sort_by_value_and_letter_case_does_not_sort():
    names = ["B/1.mp4", "a/clip10.mp4", "a/Clip2.mp4", "a/clip1.mp4", "a/clip2b.mp4", "a/.mp4"]
    ordered = sorted(map(Path, names), key=natural_order)
    expected = ["a/.mp4", "a/clip1.mp4", "a/Clip2.mp4", "a/clip2b.mp4", "a/clip10.mp4", "B/1.mp4"]
    assert list(map(str, ordered)) == expected


def test_composed_names_do_not_differ_in_letter_case():
    assert not differs_in_case("café", unicodedata.normalize("NFD", "café"))
    assert differs_in_case("Café", unicodedata.normalize("NFD", "café"))

import json
import pickle
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest

from utils.common.errors import UserError
from utils.media.description import (
    ALL,
    ANIMATION,
    FLAGGED,
    IMAGE,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    VIDEO_SUFFIXES,
    Coverage,
    Look,
    MediaError,
    MediaInfo,
    Timeline,
    from_json,
    to_json,
)

PLAIN = MediaInfo(64, 48, 3, 16.0)
FULL = MediaInfo(
    width=90,
    height=47,
    frames=4,
    fps=23.976,
    kind=ANIMATION,
    look=Look(7, (90, 48), "hlg", "bt2020", FLAGGED, True, True),
    timeline=Timeline((-2, 3, 9, 11), (-2, 9), Fraction(1001, 24000), True),
    notes=("HDR, tone-mapped", "deinterlaced"),
    is_whole=True,
    renumbered=True,
    mask=Coverage("labels", 0.25, 0, 255, True),
    stamp=(1, 2, 3, 4),
    digest="0" * 64,
)


def through_json(info: MediaInfo) -> MediaInfo:
    return from_json(json.loads(json.dumps(to_json(info))))


@pytest.mark.parametrize("info", [FULL, PLAIN, replace(FULL, fps=None, mask=None, look=Look(), timeline=Timeline())])
def test_a_description_is_the_same_after_json_in_every_field(info):
    back = through_json(info)
    for field in fields(MediaInfo):
        assert getattr(back, field.name) == getattr(info, field.name), field.name
    assert type(back.timeline.time_base) is Fraction and hash(back) == hash(info)


def test_the_description_above_leaves_no_field_at_its_default():
    for full, plain in ((FULL, PLAIN), (FULL.look, Look()), (FULL.timeline, Timeline())):
        for field in fields(full):
            assert getattr(full, field.name) != getattr(plain, field.name), field.name


@pytest.mark.parametrize(
    "path", [("look",), ("timeline",), ("mask",), ("stamp",), ("timeline", "times"), ("look", "scaled")]
)
@pytest.mark.parametrize("wrong", ["nothing", "a word", {"unknown": 1}])
def test_other_json_values_are_an_error_that_a_reader_expects(path, wrong):
    values = json.loads(json.dumps(to_json(FULL)))
    *outer, last = path
    target = values
    for name in outer:
        target = target[name]
    target.pop(last) if wrong == "nothing" else target.update({last: wrong})
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_json(values)


IMPOSSIBLE = [
    *(((name,), value) for name in ("width", "height", "frames") for value in ("x", [], 0, -1, 1.5, True, 1e400)),
    *((("fps",), value) for value in ("x", 0.0, -1.0, 1e400, True)),
    *((("kind",), value) for value in ("film", None, 1)),
    *((("look", "orientation"), value) for value in (0, 9, 99, "1", None)),
    *((("look", "scaled"), value) for value in ([64], [64, 0], [1, 2, 3], "xy")),
    *((("look", name), "other") for name in ("transfer", "primaries", "interlaced")),
    (("look", "transparent"), 1),
    *(
        (("timeline", "times"), value)
        for value in ([0, 0, 1, 2], [0, 1], [0, 1, 2, 1e400], [0, 1, 2, "3"], [3, 2, 1, 0])
    ),
    *((("timeline", "time_base"), value) for value in ("1e1000000000", "1/0", "-1/2", "9" * 5000, "x")),
    *((("mask", "rule"), value) for value in ("other", None)),
    *((("mask", "share"), value) for value in (2.0, -1.0, "x")),
    (("mask", "most"), 256),
    (("notes",), ["a line\nbreak"]),
    (("notes",), [1]),
]


@pytest.mark.parametrize(("path", "value"), IMPOSSIBLE, ids=str)
def test_what_no_file_can_have_is_no_description(path, value):
    values = json.loads(json.dumps(to_json(FULL)))
    target = values
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    with pytest.raises((KeyError, TypeError, ValueError, ArithmeticError)):
        from_json(values)


def test_a_stamp_and_a_digest_do_not_make_descriptions_unequal_but_every_other_field_does():
    assert replace(FULL, stamp=(9,), digest="") == FULL
    for field in fields(MediaInfo):
        if field.name not in ("stamp", "digest"):
            assert replace(FULL, **{field.name: "other"}) != FULL, field.name


def test_pictures_that_are_shown_as_stored_or_turned_are_read_as_before():
    assert PLAIN.reading == {}
    for orientation in (1, 3, 6, 8):
        look = Look(orientation)
        assert look.changes == {} and replace(PLAIN, look=look).reading == {}


@pytest.mark.parametrize(
    "change",
    [
        {"orientation": 2},
        {"orientation": 4},
        {"orientation": 5},
        {"orientation": 7},
        {"scaled": (85, 48)},
        {"transfer": "pq"},
        {"primaries": "p3"},
        {"interlaced": ALL},
        {"transparent": True},
    ],
)
def test_whatever_else_pictures_need_is_named(change):
    assert Look(**change).changes == change == replace(PLAIN, look=Look(**change)).reading
    if "orientation" not in change:
        assert Look(6, **change).changes == change


def test_new_numbers_of_frames_and_new_rules_for_masks_are_named():
    assert replace(PLAIN, renumbered=True).reading == {"renumbered": True}
    for rule, named in (("brightness", {}), ("opacity", {"mask": "opacity"}), ("labels", {"mask": "labels"})):
        assert replace(PLAIN, mask=Coverage(rule, 0.5, 0, 255)).reading == named
    assert set(FULL.reading) == {*Look(7, (90, 48), "hlg", "bt2020", FLAGGED, True, True).changes, "renumbered", "mask"}


def test_frames_are_shown_by_their_timestamps_and_without_them_by_the_rate():
    shown = replace(PLAIN, timeline=Timeline((90, 93, 180), (90,), Fraction(1, 90)))
    assert shown.frame_times() == [0.0, 3 / 90, 1.0] and shown.timeline.seconds() == shown.frame_times()
    assert replace(PLAIN, fps=4.0).frame_times() == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match="no timestamps and no frame rate"):
        replace(PLAIN, fps=None).frame_times()


def test_an_animation_is_no_single_picture():
    assert replace(PLAIN, kind=IMAGE).is_image and not replace(PLAIN, kind=ANIMATION).is_image and not PLAIN.is_image


def test_a_media_error_is_a_user_error_that_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError(Path("a b.mp4"), "the file is empty")))
    assert isinstance(error, UserError) and str(error) == "a b.mp4: the file is empty"
    assert (error.path, error.reason) == (Path("a b.mp4"), "the file is empty")


def test_a_suffix_is_in_one_list():
    lists = (IMAGE_SUFFIXES, VIDEO_SUFFIXES, UNREAD_SUFFIXES)
    assert len(frozenset().union(*lists)) == sum(map(len, lists))
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffixes in lists for suffix in suffixes)

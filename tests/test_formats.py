"""docs/formats.md lists what is read, and its lists are those of the code and of the FFmpeg that is installed."""

import re

import av

from tests.documents import ROOT, read
from utils.media.description import HDR_NOTE, IMAGE_SUFFIXES, UNREAD_SUFFIXES, VIDEO_SUFFIXES
from utils.media.images import MAX_PIXELS
from utils.media.video import CONTAINERS

PAGE = read(ROOT / "docs" / "formats.md")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def suffixes(text: str) -> list[str]:
    return re.findall(r"\.[a-z0-9]+(?=[ `\n])", " ".join(re.findall(r"`(\.[^`]+)`", text)) + " ")


def test_every_suffix_is_listed_once_where_it_belongs():
    for title, known in (("Videos", VIDEO_SUFFIXES), ("Images", IMAGE_SUFFIXES), ("What is not read", UNREAD_SUFFIXES)):
        listed = suffixes(section(title))
        assert sorted(listed) == sorted(known), title
    assert not VIDEO_SUFFIXES & IMAGE_SUFFIXES and not (VIDEO_SUFFIXES | IMAGE_SUFFIXES) & UNREAD_SUFFIXES


def test_there_is_a_row_for_each_container():
    rows = re.findall(r"^\| [\w, ]+ \| `\..*\|$", section("Videos"), flags=re.MULTILINE)
    assert len(rows) == len(CONTAINERS.split(",")) - 1  # MPEG video without a container has the row of MPEG
    assert set(CONTAINERS.split(",")) <= set(",".join(av.formats_available).split(","))


def test_every_codec_that_is_listed_can_be_decoded():
    rows = re.findall(r"^\| (?:delivery|cameras and editing|lossless) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    codecs = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(rows) == 3 and len(codecs) > 20
    for codec in codecs:
        assert av.Codec(codec, "r").is_decoder, codec


def test_the_remarks_that_are_listed_are_those_that_are_made():
    made = "".join(read(ROOT / "utils" / "media" / f"{name}.py") for name in ("probing", "images", "description"))
    remarks = re.findall(r"^\| [^|]+ \| [^|]+ \| `([^`|]+)` \|$", PAGE, flags=re.MULTILINE)
    assert HDR_NOTE in remarks and len(remarks) >= 15
    for remark in remarks:
        parts = re.split(r"\d+ frames|\d+|Display P3", remark)  # what is filled in
        assert all(f"{part}" in made for part in parts), remark


def test_the_limit_that_is_named_is_that_of_the_code():
    assert f"more than {MAX_PIXELS // 10**6} million pixels" in PAGE

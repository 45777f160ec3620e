import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.media.test_description import FULL
from utils.media import description_cache
from utils.media.description import MediaError
from utils.media.description_cache import DescriptionCache

CLIP, PICTURE, DIGEST, STAMP = Path("a.mp4"), Path("a.png"), "0" * 64, (5, 6, 7, 8)


@pytest.fixture
def known(tmp_path):
    return DescriptionCache(tmp_path / "media")


def test_what_was_found_is_found_again_with_the_stamp_of_now(known):
    assert known.find(CLIP, DIGEST, STAMP, True, False) is None
    known.keep(CLIP, DIGEST, FULL, True, False)
    again = known.find(Path("elsewhere/b.MKV"), DIGEST, STAMP, True, False)
    assert again == FULL and again.stamp == STAMP


def test_a_reason_is_kept_for_whoever_asks_and_names_their_path(known):
    known.keep(CLIP, DIGEST, MediaError(CLIP, "damaged after 3.00 s: no"), True, False)
    again = known.find(Path("b.mp4"), DIGEST, STAMP, True, False)
    assert isinstance(again, MediaError) and (again.path, again.reason) == (Path("b.mp4"), "damaged after 3.00 s: no")


def test_a_full_description_serves_a_fast_run_but_not_the_reverse(known):
    known.keep(CLIP, DIGEST, replace(FULL, is_whole=False), False, False)
    assert known.find(CLIP, DIGEST, STAMP, False, False) and known.find(CLIP, DIGEST, STAMP, True, False) is None
    known.keep(CLIP, DIGEST, FULL, True, False)
    assert known.find(CLIP, DIGEST, STAMP, False, False) == known.find(CLIP, DIGEST, STAMP, True, False) == FULL


def test_damage_that_is_known_is_a_reason_in_a_fast_run_too(known):
    known.keep(CLIP, DIGEST, MediaError(CLIP, "damaged"), True, False)
    for full in (True, False):
        assert str(known.find(CLIP, DIGEST, STAMP, full, False)) == f"{CLIP}: damaged"


def test_another_content_another_way_of_reading_and_other_libraries_are_unknown(known, monkeypatch):
    known.keep(CLIP, DIGEST, FULL, True, False)
    assert known.find(CLIP, "1" * 64, STAMP, True, False) is None
    assert known.find(CLIP, DIGEST, STAMP, True, True) is None, "as a mask"
    assert known.find(PICTURE, DIGEST, STAMP, True, False) is None, "by Pillow"
    monkeypatch.setattr(description_cache, "VERSION", description_cache.VERSION + 1)
    assert known.find(CLIP, DIGEST, STAMP, True, False) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"full": true}', "[" * 100_000, '{"full": true, "reason": null, "info": 5}']
)
def test_an_entry_that_cannot_be_read_does_not_count(known, text):
    known.keep(CLIP, DIGEST, FULL, True, False)
    (entry,) = known.folder.iterdir()
    entry.write_text(text)
    assert known.find(CLIP, DIGEST, STAMP, True, False) is None
    entry.write_bytes(b"\xff\xfe\x00")
    assert known.find(CLIP, DIGEST, STAMP, True, False) is None


def test_an_entry_with_a_part_missing_does_not_count(known):
    known.keep(CLIP, DIGEST, FULL, True, False)
    (entry,) = known.folder.iterdir()
    whole = json.loads(entry.read_text())
    for name in whole["info"]:
        entry.write_text(json.dumps(whole | {"info": {k: v for k, v in whole["info"].items() if k != name}}))
        assert known.find(CLIP, DIGEST, STAMP, True, False) is None, name


def test_nothing_is_kept_without_a_folder_or_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for folder in (None, tmp_path / "file" / "media"):
        known = DescriptionCache(folder)
        known.keep(CLIP, DIGEST, FULL, True, False)
        assert known.find(CLIP, DIGEST, STAMP, True, False) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

import hashlib
import json
import os
from pathlib import Path

import pytest

from utils.common import digests
from utils.common.digests import Digests, hash_file
from utils.common.errors import UserError
from utils.common.files import file_stamp

SOME_DIGEST = 64 * "a"


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"frames")
    return tmp_path / "a.mp4"


@pytest.fixture
def index(tmp_path) -> Path:
    return tmp_path / "digests.json"


def test_digests_are_remembered_until_a_file_changes(file, index, monkeypatch):
    known = Digests(index)
    first = known.of(file)
    known.save()
    monkeypatch.setattr(digests, "hash_file", lambda path: pytest.fail("hashed again"))
    assert Digests(index).of(file) == first == hashlib.sha256(b"frames").hexdigest()
    monkeypatch.undo()
    file.write_bytes(b"framesx")
    assert Digests(index).of(file) != first
    index.write_text("[not json")
    assert Digests(index).of(file)
    with pytest.raises(UserError, match="cannot read"):
        known.of(file.with_name("gone.mp4"))


def test_another_content_of_the_same_size_and_time_is_noticed(file, index):
    known, before = Digests(index), file.stat()
    known.of(file)
    known.save()
    file.write_bytes(b"FRAMES")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert Digests(index).of(file) == hashlib.sha256(b"FRAMES").hexdigest()
    other = file.with_name("other")
    other.write_bytes(b"Frames")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)
    assert known.of(file) == hashlib.sha256(b"Frames").hexdigest()


def test_entries_of_earlier_versions_say_too_little_and_are_forgotten(file, index):
    status = file.stat()
    index.write_text(json.dumps({str(file): [status.st_size, status.st_mtime_ns, SOME_DIGEST]}))
    known = Digests(index)
    assert known.of(file) == hashlib.sha256(b"frames").hexdigest()
    known.save()
    assert json.loads(index.read_text()) == {str(file): [list(file_stamp(status)), known.of(file)]}


def test_without_a_path_nothing_is_written(file):
    known = Digests(None)
    assert known.of(file) == hashlib.sha256(b"frames").hexdigest()
    known.save()
    assert list(file.parent.iterdir()) == [file]


def test_hashing_says_how_far_it_is(file, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 4)
    positions: list[int] = []
    assert hash_file(file, positions.append) == hashlib.sha256(b"frames").hexdigest() and positions == [4, 6]


BAD_INDEXES = ["", "[not json", "null", "3", '"text"', "[]", '["FILE"]', "[" * 100_000, '{"x":' * 100_000]
BAD_ENTRIES = [
    *("null", "true", "7", '"text"', "{}", "[]", "[[]]", "[STAMP]", '["HEX"]', '{"stamp": STAMP}', '["HEX", STAMP]'),
    *("[STAMP, null]", "[STAMP, 7]", '[STAMP, ["HEX"]]', '[STAMP, "HEX", 1]', '[STAMP, ""]', '[STAMP, "HEXa"]'),
    *('[STAMP, "HEX\\n"]', '[STAMP, "g' + 63 * "0" + '"]', '[[6, TIME], "HEX"]', '[["6", TIME, TIME, 1], "HEX"]'),
    *('[[6.0, TIME, TIME, 1], "HEX"]', '[[6, 1e400, TIME, 1], "HEX"]', '[[NaN, TIME, TIME, 1], "HEX"]'),
    *('[[null, TIME, TIME, 1], "HEX"]', '[[6, TIME, TIME, 1, 1], "HEX"]', '["6 1 1 1", "HEX"]'),
]
INDEXES = [*BAD_INDEXES, *(f'{{"FILE": {entry}}}' for entry in BAD_ENTRIES)]


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:60])
def test_whatever_does_not_fit_is_forgotten_and_computed_again(file, index, text):
    stamp = list(file_stamp(file.stat()))
    facts = {"STAMP": stamp, "TIME": stamp[1], "HEX": SOME_DIGEST, "FILE": file.as_posix()}
    for word, fact in facts.items():
        text = text.replace(word, str(fact))
    index.write_text(text)
    known = Digests(index)
    assert known.of(file) == hashlib.sha256(b"frames").hexdigest()
    known.save()
    assert json.loads(index.read_text())[str(file)] == [stamp, known.of(file)]


def test_true_is_no_size(index):
    file = index.with_name("one_byte")
    file.write_bytes(b"1")
    index.write_text(json.dumps({str(file): [[True, *file_stamp(file.stat())[1:]], SOME_DIGEST]}))
    assert Digests(index).of(file) == hashlib.sha256(b"1").hexdigest()


def test_the_good_entries_of_a_damaged_index_are_kept(file, index):
    good = [list(file_stamp(file.stat())), SOME_DIGEST]
    index.write_text(json.dumps({str(file): good, "other": [1, "2", SOME_DIGEST]}))
    known = Digests(index)
    known.save()
    assert known.of(file) == SOME_DIGEST and json.loads(index.read_text()) == {str(file): good}


def test_an_index_that_is_not_utf_8_or_a_folder_counts_as_empty(file, index):
    index.write_bytes(b"\xff\xfe")
    assert Digests(index).of(file) == hashlib.sha256(b"frames").hexdigest()
    index.unlink()
    index.mkdir()
    known = Digests(index)
    assert known.of(file) == hashlib.sha256(b"frames").hexdigest()
    known.save()

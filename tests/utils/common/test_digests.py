import hashlib
import json
from pathlib import Path

import pytest

from utils.common import digests
from utils.common.digests import Digests
from utils.common.errors import UserError

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
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert Digests(index).of(file) == first == hashlib.sha256(b"frames").hexdigest()
    monkeypatch.undo()
    file.write_bytes(b"framesx")
    assert Digests(index).of(file) != first
    index.write_text("[not json")
    assert Digests(index).of(file)
    with pytest.raises(UserError, match="cannot read"):
        known.of(file.with_name("gone.mp4"))


def test_an_index_of_version_0_1_is_still_read(file, index, monkeypatch):
    status = file.stat()
    index.write_text(json.dumps({str(file): [status.st_size, status.st_mtime_ns, SOME_DIGEST]}))
    assert Digests(index).of(file) == SOME_DIGEST
    Digests(index).save()
    assert json.loads(index.read_text()) == {str(file): [status.st_size, status.st_mtime_ns, SOME_DIGEST]}


BAD_INDEXES = ["", "[not json", "null", "3", '"text"', "[]", '["FILE"]', "[" * 100_000, '{"x":' * 100_000]
BAD_ENTRIES = [
    *("null", "true", "7", '"text"', "{}", "[]", "[[]]", "[SIZE]", "[SIZE, TIME]", '{"size": SIZE}'),
    *("[SIZE, TIME, null]", "[SIZE, TIME, 7]", '[SIZE, TIME, ["HEX"]]', '[SIZE, TIME, "HEX", 1]'),
    *('[SIZE, TIME, ""]', '[SIZE, TIME, "HEXa"]', '[SIZE, TIME, "HEX\\n"]', '[SIZE, TIME, "g' + 63 * "0" + '"]'),
    *('["SIZE", TIME, "HEX"]', '[SIZE.0, TIME, "HEX"]', '[SIZE, 1e400, "HEX"]', '[NaN, TIME, "HEX"]'),
    *('[null, TIME, "HEX"]', '["HEX", SIZE, TIME]'),
]
INDEXES = [*BAD_INDEXES, *(f'{{"FILE": {entry}}}' for entry in BAD_ENTRIES)]


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:60])
def test_whatever_does_not_fit_is_forgotten_and_computed_again(file, index, text):
    status = file.stat()
    facts = {"SIZE": status.st_size, "TIME": status.st_mtime_ns, "HEX": SOME_DIGEST, "FILE": file.as_posix()}
    for word, fact in facts.items():
        text = text.replace(word, str(fact))
    index.write_text(text)
    known = Digests(index)
    assert known.of(file) == hashlib.sha256(b"frames").hexdigest()
    known.save()
    assert json.loads(index.read_text())[str(file)] == [status.st_size, status.st_mtime_ns, known.of(file)]


def test_true_is_no_size(index):
    file = index.with_name("one_byte")
    file.write_bytes(b"1")
    index.write_text(json.dumps({str(file): [True, file.stat().st_mtime_ns, SOME_DIGEST]}))
    assert Digests(index).of(file) == hashlib.sha256(b"1").hexdigest()


def test_the_good_entries_of_a_damaged_index_are_kept(file, index):
    status = file.stat()
    good = [status.st_size, status.st_mtime_ns, SOME_DIGEST]
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

"""A file that is not what it should be is called what it is, in a sentence of its own."""

from pathlib import Path

import pytest

from tests.damage import refused
from wan.checkpoints.files import broken_link, existing, is_named, read_json, read_start, refuse_other_kinds

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
KINDS = {
    b"": "is an empty file: download it again",
    bytes(600): "begins with nothing but zeros: its download has not ended, run it again",
    b"GGUF\3\0\0\0": "is a GGUF file, which is not read here: give the safetensors file",
    LFS: "is a pointer of Git LFS, not the file itself: download the file, or run git lfs pull",
    LFS.replace(b"\n", b"\r\n"): "is a pointer of Git LFS",
    b"<!DOCTYPE html>": "is a web page, not the file itself: download it again",
    b"\xef\xbb\xbf\r\n  <html>\xc3\xa9": "is a web page",
    b"<?xml version='1.0'?><Error><Code>AccessDenied": "is a web page",
}
TEXTS = {
    b"Entry not found": "is a text, not the file itself: it begins with Entry not found\ndownload it again",
    b"\n Access to this model is restricted.\nLog in.\n": "begins with Access to this model is restricted",
    b'{"error": "Invalid credentials"}': 'begins with {"error": "Invalid credentials"}',
    b"x" * 500: "begins with x{100}[.]{3}",
}


def written(folder: Path, content: bytes) -> Path:
    (folder / "file").write_bytes(content)
    return folder / "file"


@pytest.mark.parametrize("content", KINDS)
@pytest.mark.parametrize("is_text", [True, False])
def test_what_is_no_model_file_at_all_is_called_what_it_is(tmp_path, content, is_text):
    path = written(tmp_path, content)
    assert str(path) in refused(KINDS[content], refuse_other_kinds, path, read_start(path), is_text)
    refused(KINDS[content], read_json, path)


@pytest.mark.parametrize("content", TEXTS)
def test_a_text_is_no_weights_but_may_be_json(tmp_path, content):
    path = written(tmp_path, content)
    refused(TEXTS[content], refuse_other_kinds, path, read_start(path))
    refuse_other_kinds(path, read_start(path), is_text=True)


@pytest.mark.parametrize("content", [b"PK\3\4", b"\x80\2", bytes(7) + b"\1" + bytes(99), b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_may_be_weights_is_left_to_who_reads_them(tmp_path, content):
    path = written(tmp_path, content)
    refuse_other_kinds(path, read_start(path))


@pytest.mark.parametrize("content", [b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}\n'])
def test_a_json_object_is_read_with_or_without_a_byte_order_mark(tmp_path, content):
    assert read_json(written(tmp_path, content)) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "file is damaged, it is not valid JSON: Expecting value"),
        (b'{"a": 1}}', "file is damaged, it is not valid JSON: Extra data"),
        (b"\xff\xfe{}", "file is damaged, it is not valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "file is damaged, it is not valid JSON: maximum recursion depth"),
        (b"[1]", "file does not hold a JSON object"),
        (b"null", "file does not hold a JSON object"),
    ],
)
def test_damaged_json_and_other_json_are_told_apart(tmp_path, content, message):
    assert len(refused(message, read_json, written(tmp_path, content))) < 400


def test_what_is_missing_is_named_and_a_link_to_nothing_with_where_it_leads(tmp_path):
    assert existing(written(tmp_path, b"x")) == tmp_path / "file"
    assert refused(None, existing, tmp_path / "a", "b has it") == f"{tmp_path}/a is missing; b has it"
    link = tmp_path / "link"
    link.symlink_to("gone")
    message = f"{link} is missing: it is a link to {tmp_path}/gone, which is gone"
    assert refused(None, existing, link) == message and is_named(link) and not is_named(tmp_path / "gone")
    assert len(refused("cannot read .+: File name too long", existing, tmp_path / ("a" * 5000))) < 300


def test_a_link_of_the_hub_to_a_blob_that_is_gone_asks_for_the_download(tmp_path):
    snapshot = tmp_path / "snapshots" / "0123"
    (snapshot / "vae").mkdir(parents=True)
    link = snapshot / "vae" / "model.safetensors"
    link.symlink_to("../../../blobs/abcdef")
    message = "it is a link to the blob abcdef, which is missing from the hub's cache; run the download again"
    assert refused(None, existing, link) == f"{link} is missing: {message}"
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abcdef").write_text("here")
    assert existing(link) == link and broken_link(link) == ""


def test_a_file_below_a_link_to_nothing_names_the_link(tmp_path):
    (tmp_path / "google").symlink_to("/nowhere/google")
    path = tmp_path / "google" / "umt5-xxl" / "tokenizer.json"
    refused(f"{path} is missing: {tmp_path}/google is a link to /nowhere/google, which is gone", existing, path)


def test_a_link_in_a_circle_is_missing(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(f"a is missing: it is a link to {tmp_path}/b", existing, tmp_path / "a")

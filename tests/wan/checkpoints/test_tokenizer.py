"""A tokenizer is found where models have it, and refused unless it is whole and that of the text encoder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.damage import refused
from tests.tiny import FAMILY, VOCAB_SIZE
from wan.checkpoints import open_model
from wan.checkpoints.tokenizer import TOKENIZER, check_tokenizer, find_tokenizer_folder


@pytest.fixture
def own(folder) -> Path:
    """The folder of the tokenizer in a copy of a small model."""
    return folder / FAMILY.tokenizer


def edit(own: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((own / "tokenizer.json").read_text())
    change(content)
    (own / "tokenizer.json").write_text(json.dumps(content))


def resize(count: int) -> Callable[[dict[str, Any]], object]:
    """Changes the number of tokens."""

    def change(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = vocab[:count] + [[f"word{n}", -9.0] for n in range(count - len(vocab))]

    return change


def test_a_tokenizer_is_found_by_its_file_and_below_models(own, folder, tmp_path, monkeypatch):
    assert open_model(folder, tokenizer=own / "tokenizer.json").tokenizer == own
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer_folder(None, folder) == find_tokenizer_folder(own, None) == own
    downloaded = Path("models") / TOKENIZER
    downloaded.parent.mkdir(parents=True)
    own.rename(downloaded)
    assert open_model(folder).tokenizer == downloaded and find_tokenizer_folder(None, None) == downloaded
    shutil.rmtree("models")
    assert find_tokenizer_folder(None, folder) is None


def test_what_is_given_and_is_no_tokenizer_is_refused(folder):
    refused("is a file: a tokenizer is a folder", open_model, folder, tokenizer=folder / FAMILY.vae)
    refused("tokenizer.json is missing; it was given as tokenizer", open_model, folder, tokenizer=folder / "google")


@pytest.mark.parametrize("below", ["tokenizer.json", "."])
def test_another_tokenizer_does_not_take_the_place_of_one_whose_link_is_broken(own, folder, monkeypatch, below):
    monkeypatch.chdir(folder)
    shutil.copytree(own, Path("models") / TOKENIZER)
    if below == ".":
        shutil.rmtree(own)
        own.symlink_to("../../../blobs/gone")
        assert find_tokenizer_folder(None, folder) == Path("models") / TOKENIZER
    else:
        (own / below).unlink()
        (own / below).symlink_to("../../../../blobs/gone")
        refused("tokenizer.json is missing: it is a link to the blob gone", open_model, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.json is a pointer of Git LFS"),
        (b"<html>", "tokenizer.json is a web page"),
        (b"", "tokenizer.json is an empty file"),
        (b"Entry not found", "tokenizer.json is damaged, it is not valid JSON"),
        (b'{"model": {"type": "Unigram", "vocab": [', "tokenizer.json is damaged, it is not valid JSON"),
        (b"{}", "tokenizer.json is JSON, but not a tokenizer file: Model missing"),
        (b'{"tokenizer_class": "T5Tokenizer"}', "tokenizer.json is JSON, but not a tokenizer file: "),
        (b"[]", "tokenizer.json does not hold a JSON object"),
    ],
)
def test_a_damaged_tokenizer_is_told_from_what_is_none(own, folder, content, message):
    (own / "tokenizer.json").write_bytes(content)
    assert str(own) in refused(message, open_model, folder)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_tokenizer_that_is_cut_short_is_damaged(own, folder, cut):
    path = own / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-cut])
    refused("tokenizer.json is damaged, it is not valid JSON", open_model, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(type="Unknown"),
        lambda content: content["model"].update(unk_id=10**6),
        lambda content: content["model"].update(vocab=[]),
        lambda content: content.pop("model"),
    ],
)
def test_a_tokenizer_without_a_model_that_works_is_none(own, folder, change):
    edit(own, change)
    refused("tokenizer.json is JSON, but not a tokenizer file: ", open_model, folder)


@pytest.mark.parametrize("count", [VOCAB_SIZE + 1, VOCAB_SIZE + 600, 300, 384])
def test_a_tokenizer_of_another_size_than_the_text_encoder_is_refused_with_both_numbers(own, folder, count):
    edit(own, resize(count))
    message = f"has {count} tokens, but the text encoder has {VOCAB_SIZE}: it needs the tokenizer of UMT5"
    refused(message, open_model, folder)


@pytest.mark.parametrize("count", [VOCAB_SIZE, VOCAB_SIZE - 5, 385])
def test_an_embedding_may_be_padded(own, folder, count):
    edit(own, resize(count))
    assert open_model(folder).tokenizer == own


@pytest.mark.parametrize(("rows", "fits"), [(20_000, True), (20_201, True), (20_203, False), (19_999, False)])
def test_of_a_large_embedding_one_row_in_a_hundred_may_be_spare(own, rows, fits):
    edit(own, resize(20_000))
    if fits:
        check_tokenizer(own, rows)
    else:
        refused(f"has 20000 tokens, but the text encoder has {rows}", check_tokenizer, own, rows)


@pytest.mark.parametrize("single", [None, "<s> $A", "$A <s>"])
def test_a_tokenizer_that_does_not_close_a_text_as_umt5_does_is_refused(own, folder, single):
    def change(content: dict[str, Any]) -> None:
        if single is None:
            content["post_processor"] = None
            return
        first, last = (
            {"SpecialToken": {"id": "<s>", "type_id": 0}} if word == "<s>" else {"Sequence": {"id": "A", "type_id": 0}}
            for word in single.split()
        )
        content["post_processor"]["single"] = [first, last]
        content["post_processor"]["special_tokens"]["<s>"] = {"id": "<s>", "ids": [2], "tokens": ["<s>"]}

    edit(own, change)
    refused("does not close a text with </s>, the token 1: the text encoder needs", open_model, folder)


def test_settings_of_padding_in_the_file_do_not_matter(own, folder):
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit(own, lambda content: content.update(padding=pad | {"pad_to_multiple_of": None}))
    assert open_model(folder).tokenizer == own

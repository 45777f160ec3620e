"""Captions that a model reads only in part are found without a model."""

from pathlib import Path

import pytest

import utils.encoding.text_length
from nano.text_encoder import write_tokenizer
from tests.tiny import WORDS
from utils.data.folders import Rules
from utils.data.scan import Source
from utils.encoding.text_length import say_cut_captions
from utils.media.probing import MediaInfo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("umt5-xxl")
    write_tokenizer(folder, WORDS)
    return folder


def sources(**captions: str) -> list[Source]:
    info, clips = MediaInfo(64, 48, 9, 16.0), Path("clips")
    return [Source(clips / f"{name}.mp4", (text,), info, range(9), clips, Rules()) for name, text in captions.items()]


def test_captions_of_more_tokens_than_the_model_reads_are_named(folder, capsys):
    # Eight words and </s> are nine tokens.
    say_cut_captions((folder, 9), sources(fits="a " * 8, cut="a " * 9, dense="狐" * 7))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "text: the caption of cut.mp4 has 10 tokens, but the model reads 9: the rest has no effect"
    assert len(said) == 2 and said[1].startswith("text: the caption of dense.mp4 has ")


def test_many_are_counted(folder, capsys):
    say_cut_captions((folder, 3), sources(**{f"clip{number}": "a cat " * (number + 2) for number in range(12)}))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11 and said[-1] == "text: 2 more captions of more than 3 tokens"


def test_short_captions_need_no_tokenizer_and_a_missing_one_is_no_error(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    for tokenizer in (None, (tmp_path, 9), (tmp_path / "nowhere", 9)):
        say_cut_captions(tokenizer, sources(cut="a " * 9))
    monkeypatch.setattr(utils.encoding.text_length, "count_tokens", None)
    say_cut_captions((folder, 512), sources(short="a " * 255))
    assert capsys.readouterr().out == ""

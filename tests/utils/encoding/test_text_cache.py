"""Text embeddings on disk: each caption once per encoder, and no incomplete file is used."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.common.errors import UserError
from utils.encoding.text_cache import CHUNK, TextCache, load_embedding


class Encoder:
    """Embeds a caption as rows of its length, and remembers what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.asked: list[str] = []
        self.calls = 0

    def __call__(self, captions: list[str]) -> list[Tensor]:
        self.asked += captions
        self.calls += 1
        return [torch.full((len(caption) + 1, 8), float(self.seed)) for caption in captions]


@pytest.fixture
def cache(tmp_path) -> TextCache:
    return TextCache(tmp_path, "encoder-a")


def test_what_is_stored_is_loaded_bit_for_bit(cache):
    rows = {"a fox": torch.randn(3, 8), "": torch.randn(1, 8), "красная лиса": torch.randn(5, 8).bfloat16()}
    cache.store(list(rows), lambda captions: [rows[caption] for caption in captions])
    for caption, expected in rows.items():
        loaded = cache.load(caption)
        assert loaded.dtype == expected.dtype and torch.equal(loaded, expected)


def test_each_missing_caption_is_named_once_in_order(cache):
    cache.store(["b"], Encoder())
    assert cache.missing(["c", "a", "b", "a", "c"]) == ["c", "a"]
    assert cache.missing(["b"]) == []


def test_an_edited_caption_is_missing_and_the_old_one_is_kept(cache):
    cache.store(["a fox"], Encoder())
    assert cache.missing(["a fox", "a fox.", "A fox"]) == ["a fox.", "A fox"]


def test_two_encoders_never_share_a_file(tmp_path):
    first, second = TextCache(tmp_path, "encoder-a"), TextCache(tmp_path, "encoder-b")
    first.store(["a fox"], Encoder(1))
    assert second.missing(["a fox"]) == ["a fox"]
    second.store(["a fox"], Encoder(2))
    assert first.load("a fox").eq(1).all() and second.load("a fox").eq(2).all()


def test_captions_are_encoded_a_few_at_a_time_and_all_of_them(cache):
    captions, encoder = [f"caption {i}" for i in range(2 * CHUNK + 1)], Encoder()
    cache.store(captions, encoder)
    assert encoder.asked == captions and encoder.calls == 3 and cache.missing(captions) == []


def test_an_interrupted_pass_can_be_resumed(cache):
    captions, encoder = [f"caption {i}" for i in range(2 * CHUNK)], Encoder()

    def interrupted(chunk: list[str]) -> list[Tensor]:
        if encoder.calls:
            raise KeyboardInterrupt
        return encoder(chunk)

    with pytest.raises(KeyboardInterrupt):
        cache.store(captions, interrupted)
    assert cache.missing(captions) == captions[CHUNK:]


@pytest.mark.parametrize("content", ["cut", "empty", "text", "other key"])
def test_a_damaged_file_counts_as_missing_and_is_written_again(cache, content):
    cache.store(["a fox"], Encoder(1))
    path = cache.path("a fox")
    if content == "other key":
        save_file({"other": torch.ones(1, 8)}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-4], "empty": b"", "text": b"not an embedding"}[content])
    assert cache.missing(["a fox"]) == ["a fox"]
    cache.store(["a fox"], Encoder(2))
    assert cache.load("a fox").eq(2).all()


def test_a_finished_pass_leaves_only_whole_files_that_name_their_caption(cache):
    cache.store(["a fox", "a cat"], Encoder())
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors"}
    with safe_open(cache.path("a fox"), framework="pt") as file:
        assert file.metadata()["caption"] == "a fox"


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"cannot write text embeddings to {tmp_path}/file/encoder-a: "):
        TextCache(tmp_path / "file", "encoder-a").store(["a fox"], Encoder())


def test_a_file_that_cannot_be_written_is_reported_and_leaves_nothing_behind(cache, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("utils.common.tensor_files.save_file", fail)
    with pytest.raises(UserError, match=f"cannot write text embeddings to {cache.folder}: .*No space left"):
        cache.store(["a fox"], Encoder())
    assert not list(cache.folder.iterdir())


def test_an_embedding_that_is_not_there_is_reported(cache):
    with pytest.raises(UserError, match="is not a text embedding"):
        cache.load("never seen")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(2, 8)}, "is not a text embedding .*'context'"),
        ({"context": torch.ones(1, 2, 8)}, r"of shape \(1, 2, 8\), but real numbers \(tokens, width\) are needed"),
        ({"context": torch.ones(8)}, r"shape \(8,\)"),
    ],
)
def test_a_file_that_is_no_embedding_is_refused_by_name(tmp_path, tensors, message):
    path = tmp_path / "embedding.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as caught:
        load_embedding(path)
    assert str(path) in str(caught.value)

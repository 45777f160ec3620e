"""The text encoder of a model is loaded once, and only if a caption is not cached yet."""

from functools import partial
from pathlib import Path

import pytest
import torch

import utils.encoding.text
from tests.tiny import FAMILY, TINY_SHAPE, tiny_text_encoder, write_text_encoder
from utils.common.errors import UserError
from utils.encoding.text import EMBEDDINGS, TextEncoding, load_prompt, read_prompt
from utils.encoding.text_cache import load_embedding
from utils.storage.linear import QuantisedLinear
from wan.checkpoints import ModelFiles, Weights, load_text_encoder, read_weights, text_encoder_fingerprint
from wan.modules.t5 import UMT5Encoder

CPU = torch.device("cpu")


def write_files(folder: Path, encoder: UMT5Encoder) -> ModelFiles:
    """A model of which only the text encoder is there."""
    write_text_encoder(folder, encoder)
    weights, nothing = read_weights(folder / FAMILY.text_encoder, "text_encoder"), Weights(folder, {})
    return ModelFiles("tiny", FAMILY, {}, nothing, weights, folder / FAMILY.tokenizer, TINY_SHAPE.text_len)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return write_files(tmp_path_factory.mktemp("models") / "tiny", tiny_text_encoder(TINY_SHAPE.text_dim))


@pytest.fixture
def loads(monkeypatch) -> list[list[str]]:
    """For every load of the encoder, the captions it was then asked to encode."""
    seen: list[list[str]] = []

    def load(*args):
        encoder, asked = load_text_encoder(*args), []
        seen.append(asked)

        class Spy:
            def encode(self, captions: list[str]) -> list[torch.Tensor]:
                asked.extend(captions)
                return encoder.encode(captions)

        return Spy()

    monkeypatch.setattr(utils.encoding.text, "load_text_encoder", load)
    return seen


def forbid_loading(monkeypatch) -> None:
    def load(*_):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(utils.encoding.text, "load_text_encoder", load)


def test_each_caption_is_encoded_once_with_one_load(files, tmp_path, loads):
    stage = TextEncoding(files, CPU)
    captions, prompts = stage.cache(tmp_path / "captions"), stage.cache(tmp_path / "prompts")
    stage.encode_missing({captions: ["a fox", "a cat", "a fox"], prompts: ["a dog"]})
    assert loads == [["a fox", "a cat", "a dog"]]
    assert captions.missing(["a fox", "a cat"]) == [] and prompts.missing(["a dog"]) == []
    assert captions.missing(["a dog"]) == ["a dog"]


def test_the_cached_rows_are_those_of_the_encoder(files, tmp_path):
    stage = TextEncoding(files, CPU)
    cache = stage.cache(tmp_path)
    stage.encode_missing({cache: ["a red car", ""]})
    encoder = load_text_encoder(files, torch.float32, CPU)
    for caption, rows in zip(("a red car", ""), encoder.encode(["a red car", ""]), strict=True):
        assert torch.equal(cache.load(caption), rows) and rows.dtype == torch.float32


def test_a_second_pass_loads_no_encoder(files, tmp_path, monkeypatch, capsys):
    stage = TextEncoding(files, CPU)
    stage.encode_missing({stage.cache(tmp_path): ["a fox", "a cat"]})
    forbid_loading(monkeypatch)
    again = TextEncoding(files, CPU)
    capsys.readouterr()
    again.encode_missing({again.cache(tmp_path): ["a cat", "a fox", "a cat"]})
    assert capsys.readouterr().out == "text: 0 to encode, 2 cached\n"


def test_an_edited_caption_alone_is_encoded_again(files, tmp_path, loads, capsys):
    stage = TextEncoding(files, CPU)
    cache = stage.cache(tmp_path)
    stage.encode_missing({cache: ["a fox", "a cat"]})
    stage.encode_missing({cache: ["a fox", "a cat at night"]})
    assert loads == [["a fox", "a cat"], ["a cat at night"]]
    assert "text: 1 to encode, 1 cached" in capsys.readouterr().out


def test_a_truncated_file_is_encoded_again(files, tmp_path, loads):
    stage = TextEncoding(files, CPU)
    cache = stage.cache(tmp_path)
    stage.encode_missing({cache: ["a fox", "a cat"]})
    expected, path = cache.load("a cat"), cache.path("a cat")
    path.write_bytes(path.read_bytes()[:-1])
    stage.encode_missing({cache: ["a fox", "a cat"]})
    assert loads[1] == ["a cat"] and torch.equal(cache.load("a cat"), expected)


def test_two_encoders_never_share(files, tmp_path):
    other = write_files(tmp_path / "other", tiny_text_encoder(TINY_SHAPE.text_dim, seed=1))
    stages = [TextEncoding(files, CPU), TextEncoding(other, CPU)]
    caches = [stage.cache(tmp_path / "cache") for stage in stages]
    for stage, cache in zip(stages, caches, strict=True):
        assert cache.missing(["a fox"]) == ["a fox"]
        stage.encode_missing({cache: ["a fox"]})
    assert not torch.allclose(caches[0].load("a fox"), caches[1].load("a fox"))


def test_a_folder_that_cannot_be_written_is_reported(files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    stage = TextEncoding(files, CPU)
    with pytest.raises(UserError, match="cannot write text embeddings to .*file"):
        stage.encode_missing({stage.cache(tmp_path / "file"): ["a fox"]})


def test_a_broken_encoder_is_reported_with_its_file(tmp_path):
    encoder = tiny_text_encoder(TINY_SHAPE.text_dim)
    encoder.token_embedding.weight.data.zero_()
    broken = write_files(tmp_path / "broken", encoder)
    stage = TextEncoding(broken, CPU)
    with pytest.raises(UserError, match=f"{broken.text_encoder.path}: .*the text encoder's weights are broken"):
        stage.encode_missing({stage.cache(tmp_path / "cache"): ["a fox", "a cat"]})


def test_the_encoder_runs_in_bf16_on_a_gpu_and_in_fp32_without(files):
    assert TextEncoding(files, torch.device("cuda")).dtype == torch.bfloat16
    assert TextEncoding(files, CPU).dtype == torch.float32


@pytest.mark.parametrize(("free_bytes", "expected"), [(10**9, "cuda"), (10**4, "cpu")])
def test_a_gpu_that_is_too_full_leaves_the_encoder_on_the_cpu(
    files, tmp_path, monkeypatch, capsys, free_bytes, expected
):
    loaded_on = []

    def load(files, dtype, device, place_in):
        loaded_on.append((device.type, dtype))
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.encoding.text.free_memory", lambda: free_bytes)
    monkeypatch.setattr(utils.encoding.text, "load_text_encoder", load)
    stage = TextEncoding(files, torch.device("cuda"))
    with pytest.raises(KeyboardInterrupt):
        stage.encode_missing({stage.cache(tmp_path / "never"): ["a fox"]})
    assert loaded_on == [(expected, torch.bfloat16)]
    assert ("on the CPU" in capsys.readouterr().out) == (expected == "cpu")


def test_the_encoders_weights_are_read_once_for_the_names_of_all_its_caches(files, tmp_path, monkeypatch):
    calls, fingerprint = [], utils.encoding.text.text_encoder_fingerprint
    counted = lambda *args: calls.append(args) or fingerprint(*args)  # noqa: E731
    monkeypatch.setattr(utils.encoding.text, "text_encoder_fingerprint", counted)
    stage = TextEncoding(files, CPU)
    assert stage.cache(tmp_path / "a").folder.name == stage.cache(tmp_path / "b").folder.name == fingerprint(*calls[0])
    assert len(calls) == 1


def test_a_text_that_fills_the_model_is_reported_once_and_may_equal_another(files, tmp_path, capsys):
    stage = TextEncoding(files, CPU)
    cache, long = stage.cache(tmp_path), "a red cat walks " * 30
    stage.encode_missing({cache: [f"{long} left", f"{long} right", "a dog"]})
    assert capsys.readouterr().out.count(f"fills all {TINY_SHAPE.text_len} tokens of the model") == 2
    stage.encode_missing({cache: [f"{long} left", f"{long} right"]})
    assert "fills all" not in capsys.readouterr().out


def test_a_negative_prompt_is_the_rows_of_its_embedding_file_or_of_its_cached_text(files, tmp_path):
    stage = TextEncoding(files, CPU)
    cache, prompt = stage.cache(tmp_path), tmp_path / "away.txt"
    prompt.write_text(" a grey dog\n", encoding="utf-8")
    stage.encode_missing({cache: ["a grey dog"]})
    assert torch.equal(load_prompt(prompt, cache), cache.load("a grey dog"))
    embedding = cache.path("a grey dog")
    assert torch.equal(load_prompt(embedding, stage.cache(tmp_path / "empty")), load_embedding(embedding))


def test_the_projects_negative_prompts_are_found(files):
    assert read_prompt(EMBEDDINGS / files.family.negative_prompt)


def test_a_prompt_file_is_read_without_its_margins(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeff 一只狐狸 in snow \n\n".encode())
    assert read_prompt(path) == "一只狐狸 in snow"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), (b" \n", "is empty"), ("\u200b".encode(), "is empty"), (b"\xff\xfe\x00", "cannot read")],
)
def test_a_prompt_file_that_is_no_prompt_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompt(path)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------- in other formats


@pytest.mark.parametrize(("stored", "likeness"), [("int8", 0.999), ("fp8_scaled", 0.99), ("fp8", 0.99), ("nf4", 0.75)])
def test_an_encoder_in_codes_gives_nearly_the_same_rows(files, tmp_path, stored, likeness, capsys):
    stages = TextEncoding(files, CPU), TextEncoding(files, CPU, stored)
    rows = []
    for stage in stages:
        cache = stage.cache(tmp_path)
        stage.encode_missing({cache: ["a red car in the river at night"]})
        rows.append(cache.load("a red car in the river at night"))
    found = torch.nn.functional.cosine_similarity(*rows, dim=1)
    # The least alike of ten rows, of an encoder whose layers are 32 wide: wide ones average more.
    assert found.min() > likeness and not torch.equal(*rows)
    assert "on cpu" in capsys.readouterr().out


def test_each_format_has_a_cache_of_its_own_and_that_of_values_is_the_one_that_there_was(files, tmp_path):
    formats = ("auto", "bf16", "fp8", "fp8_scaled", "int8", "nf4")
    names = [TextEncoding(files, CPU, stored).fingerprint for stored in formats]
    assert len(set(names)) == len(formats)
    assert names[:2] == [text_encoder_fingerprint(files, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert TextEncoding(files, CPU).fingerprint == TextEncoding(files, CPU, "fp32").fingerprint == names[0]


@pytest.mark.parametrize("stored", ["int8", "nf4"])
def test_an_encoder_in_codes_is_said_to_be_as_large_as_it_is(files, stored):
    values, codes = TextEncoding(files, CPU), TextEncoding(files, CPU, stored)
    encoder = load_text_encoder(files, torch.float32, CPU, partial(codes._place_in, device=CPU)).encoder
    layers = [module for module in encoder.modules() if isinstance(module, QuantisedLinear)]
    taken = sum(parameter.nbytes for parameter in encoder.parameters()) + sum(layer.scale.nbytes for layer in layers)
    assert len(layers) == 14 and codes._bytes == taken < values._bytes

"""The text encoder of a model folder is loaded once, and only where a caption is not known yet."""

import pytest
import torch

import utils.encoding.text
from tests.tiny import TINY_SHAPE, tiny_text_encoder, write_text_encoder
from utils.common.errors import UserError
from utils.encoding.text import TextEncoding, read_prompt
from wan.checkpoints import load_text_encoder

CPU = torch.device("cpu")


def write_folder(folder, seed: int = 0):
    """What of a model folder the text stage reads."""
    folder.mkdir()
    (folder / "config.json").write_text('{"text_len": 64}')
    write_text_encoder(folder, tiny_text_encoder(TINY_SHAPE.text_dim, seed))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


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


def test_each_caption_is_encoded_once_with_one_load(folder, tmp_path, loads):
    stage = TextEncoding(folder, CPU)
    captions, prompts = stage.cache(tmp_path / "captions"), stage.cache(tmp_path / "prompts")
    stage.fill({captions: ["a fox", "a cat", "a fox"], prompts: ["a dog"]})
    assert loads == [["a fox", "a cat", "a dog"]]
    assert captions.missing(["a fox", "a cat"]) == [] and prompts.missing(["a dog"]) == []
    assert captions.missing(["a dog"]) == ["a dog"]


def test_the_cached_rows_are_those_of_the_encoder(folder, tmp_path):
    stage = TextEncoding(folder, CPU)
    cache = stage.cache(tmp_path)
    stage.fill({cache: ["a red car", ""]})
    encoder = load_text_encoder(folder, 64, torch.float32, CPU)
    for caption, rows in zip(("a red car", ""), encoder.encode(["a red car", ""]), strict=True):
        assert torch.equal(cache.load(caption), rows) and rows.dtype == torch.float32


def test_a_second_fill_loads_no_encoder(folder, tmp_path, monkeypatch, capsys):
    stage = TextEncoding(folder, CPU)
    stage.fill({stage.cache(tmp_path): ["a fox", "a cat"]})
    forbid_loading(monkeypatch)
    again = TextEncoding(folder, CPU)
    capsys.readouterr()
    again.fill({again.cache(tmp_path): ["a cat", "a fox", "a cat"]})
    assert capsys.readouterr().out == "text: 0 to encode, 2 cached\n"


def test_an_edited_caption_alone_is_encoded_again(folder, tmp_path, loads, capsys):
    stage = TextEncoding(folder, CPU)
    cache = stage.cache(tmp_path)
    stage.fill({cache: ["a fox", "a cat"]})
    stage.fill({cache: ["a fox", "a cat at night"]})
    assert loads == [["a fox", "a cat"], ["a cat at night"]]
    assert "text: 1 to encode, 1 cached" in capsys.readouterr().out


def test_a_truncated_file_is_encoded_again(folder, tmp_path, loads):
    stage = TextEncoding(folder, CPU)
    cache = stage.cache(tmp_path)
    stage.fill({cache: ["a fox", "a cat"]})
    expected, path = cache.load("a cat").clone(), cache.path("a cat")  # a load is a view of the file
    path.write_bytes(path.read_bytes()[:-1])
    stage.fill({cache: ["a fox", "a cat"]})
    assert loads[1] == ["a cat"] and torch.equal(cache.load("a cat"), expected)


def test_two_encoders_never_share(folder, tmp_path):
    stages = [TextEncoding(folder, CPU), TextEncoding(write_folder(tmp_path / "other", seed=1), CPU)]
    caches = [stage.cache(tmp_path / "cache") for stage in stages]
    for stage, cache in zip(stages, caches, strict=True):
        assert cache.missing(["a fox"]) == ["a fox"]
        stage.fill({cache: ["a fox"]})
    assert not torch.allclose(caches[0].load("a fox"), caches[1].load("a fox"))


def test_a_folder_that_cannot_be_written_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    stage = TextEncoding(folder, CPU)
    with pytest.raises(UserError, match="cannot write text embeddings to .*file"):
        stage.fill({stage.cache(tmp_path / "file"): ["a fox"]})


def test_a_broken_encoder_is_told_with_its_folder(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    encoder = tiny_text_encoder(TINY_SHAPE.text_dim)
    encoder.token_embedding.weight.data.zero_()
    write_text_encoder(broken, encoder)
    stage = TextEncoding(broken, CPU)
    with pytest.raises(UserError, match=f"{broken}: .*the text encoder's weights are broken"):
        stage.fill({stage.cache(tmp_path / "cache"): ["a fox", "a cat"]})


def test_the_encoder_runs_in_bf16_on_a_gpu_and_in_fp32_without(folder):
    assert TextEncoding(folder, torch.device("cuda")).dtype == torch.bfloat16
    assert TextEncoding(folder, CPU).dtype == torch.float32


@pytest.mark.parametrize(("free_bytes", "expected"), [(10**9, "cuda"), (10**4, "cpu")])
def test_a_gpu_that_is_too_full_leaves_the_encoder_on_the_cpu(folder, monkeypatch, capsys, free_bytes, expected):
    loaded_on = []

    def load(folder, text_len, dtype, device):
        loaded_on.append((device.type, dtype))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10**10))
    monkeypatch.setattr(utils.encoding.text, "load_text_encoder", load)
    stage = TextEncoding(folder, torch.device("cuda"))
    with pytest.raises(KeyboardInterrupt):
        stage.fill({stage.cache(folder / "never"): ["a fox"]})
    assert loaded_on == [(expected, torch.bfloat16)]
    assert ("on the CPU" in capsys.readouterr().out) == (expected == "cpu")


def test_a_prompt_file_is_read_without_its_margins(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeff 一只狐狸 in snow \n\n".encode())
    assert read_prompt(path) == "一只狐狸 in snow"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b" \n", "is empty"), (b"\xff\xfe\x00", "cannot read")]
)
def test_a_prompt_file_that_is_no_prompt_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompt(path)
    assert str(path) in str(caught.value)

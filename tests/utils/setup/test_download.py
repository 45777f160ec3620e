"""Downloading a model: listed first, only what is needed, and nothing twice. A function stands in for the hub."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import DryRunError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from utils.common.errors import UserError
from utils.common.formatting import readable_size
from utils.setup import download
from utils.setup.download import SetupOptions, download_model, download_tokenizer, set_up, suggest_download
from wan.checkpoints import CheckpointError, find_family, find_model
from wan.configs import named_family

NAME = "Wan-AI/Wan2.1-T2V-1.3B"
FILES = {
    "config.json": 250,
    "diffusion_pytorch_model.safetensors": 5_676_070_424,
    "Wan2.1_VAE.pth": 507_609_880,
    "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
    "google/umt5-xxl/tokenizer.json": 16_837_417,
    "google/umt5-xxl/spiece.model": 4_548_313,
    "README.md": 30_000,
    "assets/video.mp4": 99_000_000,
    "examples/config.json.bak": 250,
    "xlm-roberta-large/tokenizer.json": 17_082_660,
}
NEEDED = list(FILES)[:6]
CONFIG = '{"model_type": "t2v", "in_dim": 16}'


@dataclass
class Planned:
    filename: str
    file_size: int | None
    will_download: bool


class Hub:
    """Stands in for `snapshot_download`; writes a small file for each that it would fetch."""

    def __init__(self, files: dict[str, int | None] = FILES, name: str = NAME, config: str = "") -> None:
        self.files, self.name, self.config = files, name, config
        self.fetched: list[str] = []
        self.dry_runs = 0
        self.folders: set[Path] = set()

    def __call__(self, name: str, *, local_dir: Path, allow_patterns: list[str], dry_run: bool = False):
        assert name == self.name
        self.folders.add(local_dir)
        chosen = [file for file in self.files if any(fnmatch(file, pattern) for pattern in allow_patterns)]
        absent = [file for file in chosen if not (local_dir / file).exists()]
        if dry_run:
            self.dry_runs += 1
            return [Planned(file, self.files[file], file in absent) for file in chosen]
        for file in absent:
            (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / file).write_text((self.config or CONFIG) if file.endswith("config.json") else file)
        self.fetched += absent
        return str(local_dir)


@pytest.fixture
def use(monkeypatch, tmp_path) -> Callable:
    """Puts a hub in place, in an empty working folder with a large disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12 * Path(path).exists()))

    def use(hub: Callable) -> Callable:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        return hub

    return use


def raising(error: Exception) -> Callable:
    def hub(*_, **__):
        raise error

    return hub


def http_error(kind: type[Exception], message: str) -> Exception:
    """An error of the hub without the response that it would come with."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def test_only_what_training_needs_is_fetched_into_models(use):
    hub = use(Hub())
    folder = download_model(NAME)
    assert folder == Path("models") / NAME and hub.folders == {folder}
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert (folder / "google" / "umt5-xxl" / "tokenizer.json").exists()


CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
SHARDS = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json")
EXPERTS = ("high_noise_model", "low_noise_model")
TEXT = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "google/umt5-xxl/spiece.model")
ONE = ("config.json", *SHARDS)
TWO = tuple(f"{expert}/{file}" for expert in EXPERTS for file in ONE)
RELEASES = {  # what is needed of each besides the text encoder; task and input channels
    "Wan-AI/Wan2.1-T2V-14B": ((*ONE, "Wan2.1_VAE.pth"), "t2v", 16),
    "Wan-AI/Wan2.1-I2V-14B-480P": ((*ONE, "Wan2.1_VAE.pth", CLIP), "i2v", 36),
    "Wan-AI/Wan2.1-I2V-14B-720P": ((*ONE, "Wan2.1_VAE.pth", CLIP), "i2v", 36),
    "Wan-AI/Wan2.1-FLF2V-14B-720P": ((*ONE, "Wan2.1_VAE.pth", CLIP), "flf2v", 36),
    "Wan-AI/Wan2.2-TI2V-5B": ((*ONE, "Wan2.2_VAE.pth"), "ti2v", 48),
    "Wan-AI/Wan2.2-T2V-A14B": ((*TWO, "Wan2.1_VAE.pth"), "t2v", 16),
    "Wan-AI/Wan2.2-I2V-A14B": ((*TWO, "Wan2.1_VAE.pth"), "i2v", 36),
}
UNREAD = ("README.md", "configuration.json", "examples/i2v_input.JPG", "xlm-roberta-large/tokenizer.json", "nohup.out")


@pytest.mark.parametrize("name", RELEASES)
def test_of_every_release_just_what_training_needs_is_fetched(use, name):
    files, task, in_dim = RELEASES[name]
    config = json.dumps({"model_type": task, "in_dim": in_dim, "dim": named_family(name).shape.dim})
    hub = use(Hub(dict.fromkeys((*files, *TEXT, *UNREAD), 1), name, config))
    folder = download_model(name)
    assert sorted(hub.fetched) == sorted((*files, *TEXT))
    assert find_family(folder) is find_family(name) is named_family(name)


SHARDED = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json")
DIFFUSERS = (
    "model_index.json",
    *(f"transformer/{file}" for file in ("config.json", *SHARDED)),
    *(f"vae/{file}" for file in ("config.json", "diffusion_pytorch_model.safetensors")),
    *(f"text_encoder/{file}" for file in ("config.json", "model-00001-of-00003.safetensors")),
    "tokenizer/tokenizer.json",
    "tokenizer/spiece.model",
)
SECOND = tuple(f"transformer_2/{file}" for file in ("config.json", *SHARDED))
VISION = tuple(f"image_encoder/{file}" for file in ("config.json", "model.safetensors"))
UNREAD_BY_US = ("README.md", "scheduler/scheduler_config.json", "image_processor/preprocessor_config.json", "a.mp4")
I2V, FLF2V = {"in_channels": 36, "image_dim": 1280}, {"in_channels": 36, "image_dim": 1280, "pos_embed_seq_len": 514}
DIFFUSERS_RELEASES = {  # what is needed of each, and what the transformer's config.json says
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (DIFFUSERS, {"in_channels": 16}, 12),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (DIFFUSERS, {"in_channels": 16}, 40),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ((*DIFFUSERS, *VISION), I2V, 40),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": ((*DIFFUSERS, *VISION), I2V, 40),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": ((*DIFFUSERS, *VISION), FLF2V, 40),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (DIFFUSERS, {"in_channels": 48, "out_channels": 48}, 24),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ((*DIFFUSERS, *SECOND), {"in_channels": 16}, 40),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ((*DIFFUSERS, *SECOND), {"in_channels": 36}, 40),
}


@pytest.mark.parametrize("name", DIFFUSERS_RELEASES)
def test_of_a_diffusers_repository_just_what_training_needs_is_fetched(use, name):
    files, says, heads = DIFFUSERS_RELEASES[name]
    usual = {"image_dim": None, "pos_embed_seq_len": None, "out_channels": 16, "attention_head_dim": 128}
    config = usual | {"num_attention_heads": heads} | says
    hub = use(Hub(dict.fromkeys((*files, *UNREAD_BY_US), 1), name, json.dumps(config)))
    folder = download_model(name)
    assert sorted(hub.fetched) == sorted(files)
    assert find_family(folder) is find_family(name) is named_family(name)


def test_a_diffusers_repository_of_another_model_is_reported_before_its_weights_are_fetched(use):
    config = '{"_class_name": "WanVACETransformer3DModel", "in_channels": 16, "num_attention_heads": 40}'
    hub = use(Hub(dict.fromkeys(DIFFUSERS, 1), config=config))
    with pytest.raises(CheckpointError, match="is of Wan 2.1 VACE-14B"):
        download_model(NAME)
    assert hub.fetched == ["transformer/config.json"]


def test_the_tokenizer_alone_is_fetched_to_where_it_is_found(use, capsys):
    hub = use(Hub())
    folder = download_tokenizer()
    assert hub.fetched == NEEDED[4:] and folder == Path("models/google/umt5-xxl")
    assert (folder / "tokenizer.json").exists()
    assert capsys.readouterr().out.splitlines()[-1] == "the tokenizer is complete in models/google/umt5-xxl"


def test_a_tokenizer_that_cannot_be_fetched_is_reported_in_one_line(use):
    use(raising(OSError("no route")))
    with pytest.raises(UserError, match="cannot download Wan-AI/Wan2.1-T2V-1.3B: no route"):
        download_tokenizer()


def test_shards_and_their_index_are_fetched_too(use):
    shards = ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    hub = use(Hub(dict.fromkeys(("config.json", *shards), 1)))
    download_model(NAME)
    assert hub.fetched == ["config.json", *shards]


def test_names_and_sizes_are_listed_before_the_first_byte(use, capsys):
    said_before = []
    hub = Hub()

    def watched(*args, dry_run: bool = False, **settings):
        if not dry_run and not all(name.endswith("config.json") for name in settings["allow_patterns"]):
            said_before.append(capsys.readouterr().out)
        return hub(*args, dry_run=dry_run, **settings)

    use(watched)
    download_model(NAME)
    lines = said_before[0].splitlines()
    assert [line.split()[0] for line in lines[:-1]] == NEEDED
    assert lines[1].split()[1:] == ["5.68", "GB"]
    assert lines[-1] == f"to download: 17.57 GB into models/{NAME}"
    assert capsys.readouterr().out == f"{NAME} is complete in models/{NAME}\n"


def test_nothing_is_fetched_twice(use, capsys):
    hub = use(Hub())
    download_model(NAME)
    first = list(hub.fetched)
    capsys.readouterr()
    download_model(NAME)
    assert hub.fetched == first
    said = capsys.readouterr().out
    assert said.count("already there") == len(NEEDED) and "to download: 0.00 MB" in said


def test_an_interrupted_download_resumes_with_the_rest(use, capsys):
    hub = use(Hub())
    there = Path("models") / NAME / "models_t5_umt5-xxl-enc-bf16.pth"
    there.parent.mkdir(parents=True)
    there.write_text("whole")
    download_model(NAME)
    assert there.name not in hub.fetched and len(hub.fetched) == len(NEEDED) - 1
    assert "to download: 6.21 GB" in capsys.readouterr().out


def test_too_little_disk_stops_before_the_first_byte(use, monkeypatch):
    hub = use(Hub())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**10))
    with pytest.raises(UserError, match=f"the disk of models/{NAME} has 10.00 GB free, but 17.57 GB are needed"):
        download_model(NAME)
    assert hub.dry_runs == 1 and hub.fetched == ["config.json"]


def test_files_that_exist_need_no_disk_space(use, monkeypatch):
    hub = use(Hub())
    download_model(NAME)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert download_model(NAME) == Path("models") / NAME and hub.dry_runs == 2


def test_a_file_of_unknown_size_is_fetched_too(use):
    hub = use(Hub({"config.json": None}))
    download_model(NAME)
    assert hub.fetched == ["config.json"]


def test_a_repository_without_a_wan_model_is_reported(use):
    use(Hub({"README.md": 1, "model.gguf": 2}))
    with pytest.raises(UserError, match=f"{NAME} has none of the files of a Wan model"):
        download_model(NAME)


def test_an_unsupported_model_is_reported_before_its_weights_are_fetched(use, monkeypatch):
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.replace("t2v", "i2v"))
    hub = use(Hub())
    with pytest.raises(CheckpointError, match="not supported: i2v with 16"):
        download_model(NAME)
    assert hub.fetched == ["config.json"]


def test_a_model_that_is_not_there_comes_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(
            UserError, match="no model at Wan-AI/Tiny or models/Wan-AI/Tiny\ndownload it with: .*Wan-AI/Tiny"
        ),
        suggest_download(),
    ):
        find_model("Wan-AI/Tiny")


@pytest.mark.parametrize("name", ["nowhere", "./Wan-AI/Tiny", "a/b/c", "/nowhere/model"])
def test_no_download_is_suggested_for_what_is_no_name_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^no model at {name}[^\n]*$"), suggest_download():
        find_model(name)


def test_the_hub_of_this_environment_can_plan_a_download():
    assert "dry_run" in inspect.signature(huggingface_hub.snapshot_download).parameters


def test_an_unknown_repository_is_reported_in_plain_words(use):
    message = "401 Client Error. (Request ID: Root=1-2)\n\nRepository Not Found for url: somewhere."
    use(raising(http_error(RepositoryNotFoundError, message)))
    with pytest.raises(UserError, match=f"the hub has no model {NAME}") as caught:
        download_model(NAME)
    assert "Request ID" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HFValidationError("Repo id must be in the form 'name'\nor so"), "Repo id must be in the form 'name'"),
        (LocalEntryNotFoundError("An error happened. Check your connection."), "Check your connection"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(), "OSError"),
        (DryRunError("Dry run cannot be performed"), "check the connection"),
    ],
)
def test_a_download_that_fails_is_reported_in_one_line(use, error, message):
    use(raising(error))
    with pytest.raises(UserError, match=f"cannot download {NAME}: .*{message}") as caught:
        download_model(NAME)
    assert len(str(caught.value).splitlines()) == 1


def test_sizes_are_in_powers_of_ten():
    assert [readable_size(n) for n in (0, 16_837_417, 507_609_880, 11_361_920_418)] == [
        "0.00 MB", "16.84 MB", "0.51 GB", "11.36 GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "done"),
    [
        ({}, []),
        ({"doctor": True}, ["doctor of model"]),
        ({"doctor": True, "download_model": True}, ["doctor of model"]),
        ({"download_model": True}, [NAME]),
        ({"download_tokenizer": True}, ["tokenizer"]),
        ({"download_model": True, "download_tokenizer": True}, [NAME, "tokenizer"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_what_is_asked_for_instead_of_a_run_is_done_and_said(flags, done, monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(download, "print_findings", lambda open_model: order.append(f"doctor of {open_model()}"))
    monkeypatch.setattr(download, "download_model", order.append)
    monkeypatch.setattr(download, "download_tokenizer", lambda: order.append("tokenizer"))
    assert set_up(SetupOptions(**flags), lambda: "model") == bool(done)
    assert order == done

"""The base model of a LoRA is found in its run, by its hub name, or it is asked for by name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import write_model
from utils.adapters.lora_file import LoraFile, LoraPair, shown
from utils.adapters.lora_writer import write_lora
from utils.common.errors import UserError
from utils.setup.base import BASE_HASH, FOLDER, base_remarks, find_base
from utils.setup.model import SingleFiles
from wan.checkpoints import TRANSFORMER, open_model, transformer_fingerprint
from wan.configs import FAMILIES

A14B = FAMILIES["wan2.2-t2v-A14B"]
LORA = Path("run/checkpoints/fox.safetensors")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write_model(folder / "wan")
    return folder


@pytest.fixture
def work(template, tmp_path, monkeypatch) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts(name: str = "wan", **single: Path) -> dict[str, str]:
    """What a LoRA of the model says."""
    transformer = open_model("wan").transformer
    return {**SingleFiles(**single).base(name), BASE_HASH: transformer_fingerprint(transformer)}


def write_options(**options: object) -> None:
    Path("run/command_args.json").write_text(json.dumps(options))


def test_the_folder_is_that_of_its_run(work):
    said = facts()
    assert said["base_model"] == "wan"
    write_options(**{FOLDER: str(work / "wan"), "family": "wan2.1-t2v-1.3B"})
    found = {FOLDER: str(work / "wan"), "family": "wan2.1-t2v-1.3B"}
    assert find_base(SingleFiles(), LORA, said) == found
    assert find_base(SingleFiles(family="wan2.1-t2v-14B"), LORA, said) == {FOLDER: str(work / "wan")}


@pytest.mark.parametrize("options", [{}, {FOLDER: 7}, {FOLDER: "nowhere"}, {FOLDER: "wan", "vae": "nowhere.pth"}])
def test_where_its_run_does_not_have_it_the_base_is_asked_for_by_name_and_hash(work, options):
    write_options(**options)
    said = facts()
    with pytest.raises(
        UserError, match=rf"fox.* was trained on 'wan', a folder .*{said[BASE_HASH]}\npass .* as --{FOLDER}$"
    ):
        find_base(SingleFiles(), LORA, said)
    # The folder that has the recorded name, beside it or below models/, is not taken for it.
    assert Path("wan").is_dir()


def test_a_folder_of_another_name_is_taken_by_its_hash_alone(work):
    said = facts()
    os.rename("wan", "renamed")
    write_options(**{FOLDER: "renamed"})
    assert find_base(SingleFiles(), LORA, said) == {FOLDER: "renamed"}
    with pytest.raises(UserError, match="was trained on 'wan'"):
        find_base(SingleFiles(), LORA, said | {BASE_HASH: "0" * 16})


def test_a_hub_name_is_a_default_and_a_path_in_the_metadata_is_none(work):
    hub = {"base_model": "Wan-AI/Wan2.1-T2V-1.3B", BASE_HASH: "0" * 16}
    assert find_base(SingleFiles(), LORA, hub) == {FOLDER: "Wan-AI/Wan2.1-T2V-1.3B"}
    for name in (str(work / "wan"), "../wan", "./wan", "wan"):
        with pytest.raises(UserError, match="was trained on "):
            find_base(SingleFiles(), LORA, hub | {"base_model": name})


@pytest.mark.parametrize("name", ["/etc/evil", "//host/share", "wan", "../wan", "C:\\wan", "./a/b", "a/../b", "x"])
def test_a_path_of_a_lora_without_a_hash_is_shown_and_opened_only_if_its_run_names_it(work, name):
    with pytest.raises(UserError) as raised:
        find_base(SingleFiles(), LORA, {"base_model": name})
    assert str(raised.value) == f"{LORA} was trained on '{shown(name)}'\npass that folder as --{FOLDER}"
    assert find_base(SingleFiles(transformer=Path("x")), LORA, {"base_model": name}) == {}


def test_loras_of_earlier_versions_and_other_programs_are_served(work):
    whole = {"base_model": str(work / "wan")}
    write_options(**{FOLDER: str(work / "elsewhere")})
    with pytest.raises(UserError, match="pass that folder"):
        find_base(SingleFiles(), LORA, whole)
    write_options(**{FOLDER: str(work / "wan")})
    assert find_base(SingleFiles(), LORA, whole) == {FOLDER: str(work / "wan")}
    hub = "Wan-AI/Wan2.1-T2V-1.3B"
    assert find_base(SingleFiles(), LORA, {"base_model": hub}) == {FOLDER: hub}
    with pytest.raises(UserError, match=f"does not name its base model; pass --{FOLDER}"):
        find_base(SingleFiles(), LORA, {})
    assert find_base(SingleFiles(transformer=Path("x")), LORA, {}) == {}


def test_single_files_are_those_of_the_run_or_asked_for(work):
    path = work / "wan" / TRANSFORMER
    said = facts(transformer=path)
    assert said["base_files"] == f"--transformer {TRANSFORMER}"
    with pytest.raises(UserError, match=rf"give them again, --transformer {TRANSFORMER}\nand --vae, --text_encoder"):
        find_base(SingleFiles(), LORA, said)
    write_options(**{FOLDER: "Wan-AI/Wan2.1-T2V-1.3B", "transformer": str(path), "vae": "wan/Wan2.1_VAE.pth"})
    found = {FOLDER: "Wan-AI/Wan2.1-T2V-1.3B", "transformer": path, "vae": Path("wan/Wan2.1_VAE.pth")}
    assert find_base(SingleFiles(), LORA, said) == found
    # What is given counts before that of the run, and a transformer for all of them.
    own = SingleFiles(transformer=Path("other.safetensors"), vae=Path("vae.safetensors"))
    assert find_base(own, LORA, said) == {FOLDER: "Wan-AI/Wan2.1-T2V-1.3B"}
    write_options(**{FOLDER: "wan", "transformer": str(path), "family": "wan2.1-t2v-1.3B"})
    experts = SingleFiles(high_noise=Path("h.safetensors"), low_noise=Path("l.safetensors"))
    assert find_base(experts, LORA, said) == {FOLDER: "wan"}
    path.unlink()
    assert find_base(own, LORA, said) == {}


def write_adapter(path: Path, metadata: dict[str, str]) -> Path:
    pair = LoraPair(torch.ones(2, 48), torch.ones(48, 2), 2.0)
    write_lora(path, LoraFile({"blocks.0.self_attn.q": pair}, metadata=metadata))
    return path


def test_another_base_than_recorded_is_said_for_each_expert(tmp_path):
    files = open_model(write_model(tmp_path / "Wan2.2-T2V-A14B", A14B))
    hashes = {name: transformer_fingerprint(transformer) for name, transformer in files.transformers.items()}
    assert hashes["high_noise"] != hashes["low_noise"]
    for name, digest in hashes.items():
        write_adapter(tmp_path / f"fox_{name}.safetensors", {"base_model": "wan", BASE_HASH: digest})
    assert list(base_remarks(files, [tmp_path / "fox.safetensors"])) == []
    swapped = replace(files, transformers=dict(zip(hashes, reversed(files.transformers.values()), strict=True)))
    first, _ = base_remarks(swapped, [tmp_path / "fox.safetensors"])
    assert f"fox_high_noise.safetensors was trained on wan, hash {hashes['high_noise']}; " in first
    assert f"has the hash {hashes['low_noise']}" in first
    write_adapter(tmp_path / "old_low_noise.safetensors", {"base_model": "wan"})
    assert list(base_remarks(swapped, [tmp_path / "old_low_noise.safetensors"])) == []

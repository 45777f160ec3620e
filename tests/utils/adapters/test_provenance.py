"""What a LoRA was trained on top of is recorded by content, and found by content alone."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from utils.adapters import provenance
from utils.adapters.lora_file import LoraError, LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import (
    FusedFile,
    FusedRecord,
    content_hash,
    find_fused_files,
    find_fused_files_of_experts,
    fused_file,
    read_records,
    to_metadata,
)
from utils.common.errors import UserError
from utils.common.tensor_files import file_metadata

ADVICE = "Give it."
HIGH, LOW = "high_noise", "low_noise"


def write(path: Path, value: float, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pair = LoraPair(torch.full((2, 5), value), torch.ones(6, 2), 2.0)
    write_lora(path, LoraFile({"blocks.0.self_attn.q": pair}, metadata=metadata or {}))
    return path


def on_top(path: Path, *files: FusedFile, value: float = 9.0) -> Path:
    """A LoRA that was trained on top of these."""
    return write(path, value, to_metadata([file.record for file in files]))


@pytest.fixture
def style(tmp_path) -> Path:
    return write(tmp_path / "a" / "style.safetensors", 1.0)


# ------------------------------------------------------------------------------------------------------- what is said


def test_what_is_recorded_is_the_files_own_name_its_content_and_the_weight(style):
    (row,) = json.loads(to_metadata([fused_file(style, 0.8).record])["fused_lora"])
    digest = hashlib.sha256(style.read_bytes()).hexdigest()
    assert row == {"name": "style.safetensors", "sha256": digest, "weight": 0.8, "bytes": style.stat().st_size}
    (fused,) = read_records(to_metadata([fused_file(style, 0.8).record]), style)
    assert fused == fused_file(style, 0.8).record
    assert str(fused) == f"style.safetensors (weight 0.8, SHA-256 {digest})"
    assert read_records(to_metadata([]), style) == read_records({}, style) == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '"x"',
        "[1]",
        "[" * 100_000,
        '[{"name": "x", "sha256": "00", "weight": 1}]',
        '[{"name": 1, "sha256": "%s", "weight": 1}]',
        '[{"name": "x", "sha256": "%s", "weight": true}]',
        '[{"name": "x", "sha256": "%s", "weight": NaN}]',
        '[{"name": "x", "sha256": "%s", "weight": 1e999}]',
        '[{"name": "x", "sha256": "%s", "weight": "1"}]',
        '[{"name": "x", "sha256": "%s", "weight": 1, "bytes": "7"}]',
        '[{"name": "x", "sha256": "%s", "weight": ' + "1" * 400 + "}]",
        '[{"sha256": "%s", "weight": 1}]',
    ],
)
def test_a_damaged_record_is_refused(text):
    with pytest.raises(LoraError, match="fox.safetensors: the metadata fused_lora does not say what it was trained on"):
        read_records({"fused_lora": text.replace("%s", "0" * 64)}, Path("fox.safetensors"))


def test_what_a_file_says_is_shown_without_its_control_characters():
    metadata = {"fused_lora": json.dumps([{"name": "\x1b[2Jx\n", "sha256": "0" * 64, "weight": 1}])}
    (fused,) = read_records(metadata, Path("x"))
    assert "\x1b" not in str(fused) and "\n" not in str(fused)


def test_of_an_earlier_version_the_options_say_the_name_and_the_weight(style):
    options = {"fuse_lora": "C:\\loras\\style.safetensors", "fuse_lora_weight": 0.5}
    (fused,) = read_records({"options": json.dumps(options)}, style)
    assert (fused.name, fused.sha256, fused.weight) == ("style.safetensors", None, 0.5)
    (fused,) = read_records({"options": json.dumps({"fuse_lora": "a/b.safetensors", "fuse_lora_weight": "x"})}, style)
    assert (fused.name, fused.weight) == ("b.safetensors", 1.0)
    for text in ("{", "[]", "{}", '{"fuse_lora": null}', '{"fuse_lora": 7}'):
        assert read_records({"options": text}, style) == []
    # The half of a pair was not fused into the other expert, and an own record counts alone.
    low = json.dumps({"fuse_lora": "fox_low_noise.safetensors"})
    assert read_records({"options": low, "expert": HIGH}, style) == []
    assert len(read_records({"options": low, "expert": LOW}, style)) == 1
    assert read_records({"options": low, **to_metadata([])}, style) == []


def test_a_folder_of_peft_has_the_hash_of_both_its_files(tmp_path):
    for name, config in (("one", "1"), ("two", "2")):
        write(tmp_path / name / "adapter_model.safetensors", 1.0)
        (tmp_path / name / "adapter_config.json").write_text(config)
    lora = on_top(tmp_path / "fox.safetensors", fused_file(tmp_path / "two", 1.0))
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")
    assert [file.path.name for file in find_fused_files(lora, ADVICE)] == ["two"]


def test_the_file_of_a_folder_is_known_by_its_configuration_too(tmp_path):
    weights, bare = (write(tmp_path / name / "adapter_model.safetensors", 1.0) for name in ("peft", "bare"))
    config = weights.parent / "adapter_config.json"
    config.write_text("{}")
    digest = hashlib.sha256(f"{plain_hash(config)}{plain_hash(weights)}".encode()).hexdigest()
    assert content_hash(weights) == content_hash(weights.parent) == digest
    assert content_hash(bare) == plain_hash(weights) == plain_hash(bare)
    assert fused_file(weights, 1.0).record.size == weights.stat().st_size + 2
    lora = on_top(tmp_path / "fox.safetensors", fused_file(weights, 1.0))
    (tmp_path / "away").mkdir()
    shutil.move(weights.parent, tmp_path / "away" / "peft")
    with pytest.raises(UserError, match="no such file"):
        find_fused_files(lora, ADVICE, [bare])
    (found,) = find_fused_files(lora, ADVICE, [tmp_path / "away" / "peft" / weights.name])
    assert found.path.parent == tmp_path / "away" / "peft"


@pytest.mark.parametrize("config", ["", "{}"])
def test_a_folder_with_one_file_of_any_name_is_known_by_its_content(tmp_path, config):
    file = write(tmp_path / "style" / "weights.safetensors", 1.0)
    if config:
        (tmp_path / "style" / "adapter_config.json").write_text(config)
    fused = fused_file(tmp_path / "style", 1.0)
    assert (fused.record.sha256 == content_hash(file) == plain_hash(file)) == (not config)
    lora = on_top(tmp_path / "fox.safetensors", fused)
    assert [found.path.name for found in find_fused_files(lora, ADVICE, [tmp_path / "style"])] == ["style"]
    write(tmp_path / "style" / "second.safetensors", 1.0)
    with pytest.raises(LoraError, match="2 .safetensors files"):
        content_hash(tmp_path / "style")


# ------------------------------------------------------------------------------------------------------- where it is


def test_a_file_beside_it_is_found_by_its_content_under_any_name(tmp_path, style):
    lora = on_top(tmp_path / "fox.safetensors", fused_file(style, 0.8))
    write(tmp_path / "style.safetensors", 2.0)  # another content under the recorded name
    with pytest.raises(UserError, match=rf"on top of style.*weight 0\.8, SHA-256 {content_hash(style)}.*\nGive it\."):
        find_fused_files(lora, ADVICE)
    style.rename(tmp_path / "renamed.safetensors")
    (found,) = find_fused_files(lora, ADVICE)
    assert found.path.name == "renamed.safetensors" and found.record.weight == 0.8


def test_only_files_of_the_recorded_size_are_hashed_and_a_large_one_never(tmp_path, style, monkeypatch):
    lora = on_top(tmp_path / "fox.safetensors", fused_file(style, 1.0))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    write(tmp_path / "same_size.safetensors", 3.0)
    hashed = []
    monkeypatch.setattr(provenance, "hash_file", lambda path: hashed.append(path.name) or plain_hash(path))
    style.rename(tmp_path / "z.safetensors")
    find_fused_files(lora, ADVICE)
    assert hashed == ["same_size.safetensors", "z.safetensors"]
    hashed.clear()
    (tmp_path / "z.safetensors").rename(tmp_path / "style.safetensors")
    find_fused_files(lora, ADVICE)
    assert hashed == ["style.safetensors"]  # the one of the same name first

    hashed.clear()
    (row,) = json.loads(file_metadata(lora)["fused_lora"])
    del row["bytes"]
    monkeypatch.setattr(provenance, "LARGEST", 999)
    write(lora, 9.0, {"fused_lora": json.dumps([row | {"name": "x"}])})
    find_fused_files(lora, ADVICE)
    assert "model.safetensors" not in hashed and "style.safetensors" in hashed


def plain_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_of(tmp_path: Path, *files: FusedFile, **options: object) -> Path:
    """A LoRA in its run."""
    lora = on_top(tmp_path / "run" / "checkpoints" / "wan-lora-00000001.safetensors", *files)
    (tmp_path / "run" / "command_args.json").write_text(json.dumps(options))
    return lora


def test_a_file_that_its_run_read_is_found_there_and_so_is_one_beside_that(tmp_path, style):
    base = write(style.with_name("base.safetensors"), 5.0)
    lora = run_of(tmp_path, fused_file(base, 0.5), fused_file(style, 1.0), fuse_lora=str(style))
    assert [(file.path, file.record.weight) for file in find_fused_files(lora, ADVICE)] == [(base, 0.5), (style, 1.0)]
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "aside-1"):
        place.mkdir(exist_ok=True)
        moved = lora.rename(place / "fox.safetensors")
        assert len(find_fused_files(moved, ADVICE)) == 2
        lora = moved
    elsewhere = lora.rename(tmp_path / "fox.safetensors")
    with pytest.raises(UserError, match="no such file is beside it or where its run had it"):
        find_fused_files(elsewhere, ADVICE)


def test_what_its_run_names_is_not_fused_where_its_content_has_changed(tmp_path, style):
    lora = run_of(tmp_path, fused_file(style, 1.0), fuse_lora=str(style))
    write(style, 2.0)
    with pytest.raises(UserError, match="no such file"):
        find_fused_files(lora, ADVICE)
    style.write_bytes(style.read_bytes()[:-3])
    with pytest.raises(UserError, match="no such file"):
        find_fused_files(lora, ADVICE)


def test_options_of_a_run_that_name_no_file_are_passed_over(tmp_path, style):
    lora = run_of(tmp_path, fused_file(style, 1.0), seed=1)
    for text in ("7", '["x"]', '"' + "x" * 5000 + '"', '"\\u0000"'):
        (tmp_path / "run" / "command_args.json").write_text(f'{{"fuse_lora": {text}}}')
        with pytest.raises(UserError, match="no such file"):
            find_fused_files(lora, ADVICE)


def test_a_lora_without_a_recorded_content_gets_what_its_run_read(tmp_path, style):
    options = {"fuse_lora": str(style), "fuse_lora_weight": 0.25}
    lora = write(tmp_path / "run" / "checkpoints" / "x.safetensors", 9.0, {"options": json.dumps(options)})
    with pytest.raises(UserError, match=r"style\.safetensors \(weight 0\.25, SHA-256 not recorded\)"):
        find_fused_files(lora, ADVICE)
    # What is found has its content recorded, for LoRAs on top of both.
    assert find_fused_files(lora, ADVICE, [style]) == [fused_file(style, 0.25)]
    (tmp_path / "run" / "command_args.json").write_text(json.dumps(options))
    assert find_fused_files(lora, ADVICE) == [fused_file(style, 0.25)]


def test_a_file_of_the_recorded_name_beside_it_is_taken_where_no_content_is_recorded(tmp_path, style):
    lora = write(tmp_path / "b" / "fox.safetensors", 9.0, to_metadata([FusedRecord("style.safetensors", None, 0.5)]))
    with pytest.raises(UserError, match=r"style\.safetensors \(weight 0\.5, SHA-256 not recorded\), and no such file"):
        find_fused_files(lora, ADVICE)
    with pytest.raises(UserError, match="no such file"):
        find_fused_files(lora, ADVICE, [lora])  # it is not on top of itself
    beside = write(tmp_path / "b" / "style.safetensors", 2.0)
    assert find_fused_files(lora, ADVICE) == [fused_file(beside, 0.5)]
    assert find_fused_files(lora, ADVICE, [style]) == [fused_file(style, 0.5)]


def test_each_file_is_taken_once_where_no_content_is_recorded(tmp_path, style):
    records = [FusedRecord("other.safetensors", None, 1.0), FusedRecord("style.safetensors", None, 0.5)]
    lora = write(tmp_path / "b" / "fox.safetensors", 9.0, to_metadata(records))
    second = write(tmp_path / "c" / "second.safetensors", 3.0)
    expected = [fused_file(second, 1.0), fused_file(style, 0.5)]
    assert find_fused_files(lora, ADVICE, [second, style]) == expected
    with pytest.raises(UserError, match=r"was trained on top of style\.safetensors"):
        find_fused_files(lora, ADVICE, [second])


def test_a_name_in_the_metadata_chooses_no_path(tmp_path, style):
    (row,) = json.loads(to_metadata([fused_file(style, 1.0).record])["fused_lora"])
    metadata = {
        "fused_lora": json.dumps([row | {"name": str(style)}]),
        "options": json.dumps({"fuse_lora": str(style)}),
    }
    with pytest.raises(UserError, match="no such file"):
        find_fused_files(write(tmp_path / "b" / "fox.safetensors", 9.0, metadata), ADVICE)


# ---------------------------------------------------------------------------------------------------------- two experts


@pytest.fixture
def pair(tmp_path) -> dict[str, Path]:
    """Two LoRAs, each trained on top of the half of a pair that is elsewhere."""
    halves = {name: write(tmp_path / "a" / f"style_{name}.safetensors", len(name)) for name in (HIGH, LOW)}
    return {name: on_top(tmp_path / f"fox_{name}.safetensors", fused_file(halves[name], 0.5)) for name in halves}


def test_each_expert_finds_its_own_half(tmp_path, pair):
    common = tmp_path / "a" / "style.safetensors"
    found = find_fused_files_of_experts(pair, (HIGH, LOW), [common], ADVICE)
    assert {name: [file.path.name for file in files] for name, files in found.items()} == {
        name: [f"style_{name}.safetensors"] for name in (HIGH, LOW)
    }
    # Swapped names change nothing: the content decides.
    first, second = (tmp_path / "a" / f"style_{name}.safetensors" for name in (HIGH, LOW))
    os.rename(first, tmp_path / "a" / "x"), os.rename(second, first), os.rename(tmp_path / "a" / "x", second)
    found = find_fused_files_of_experts(pair, (HIGH, LOW), [common], ADVICE)
    assert {name: files[0].path.name for name, files in found.items()} == {
        HIGH: "style_low_noise.safetensors",
        LOW: "style_high_noise.safetensors",
    }


def test_an_expert_without_a_lora_gets_the_half_that_is_given(tmp_path, pair):
    common = tmp_path / "a" / "style.safetensors"
    found = find_fused_files_of_experts({LOW: pair[LOW]}, (HIGH, LOW), [common], ADVICE)
    assert {name: (files[0].path.name, files[0].record.weight) for name, files in found.items()} == {
        name: (f"style_{name}.safetensors", 0.5) for name in (HIGH, LOW)
    }
    own_alone = tmp_path / "a" / "style_low_noise.safetensors"
    assert find_fused_files_of_experts({LOW: pair[LOW]}, (HIGH, LOW), [own_alone], ADVICE)[HIGH] == []


def test_a_given_file_that_was_not_fused_is_refused_with_both_hashes(tmp_path, style):
    other = write(tmp_path / "b" / "style.safetensors", 2.0)
    lora = on_top(tmp_path / "fox.safetensors", fused_file(style, 1.0))
    with pytest.raises(UserError, match=f"{content_hash(style)}(.|\n)*{content_hash(other)}"):
        find_fused_files_of_experts({"transformer": lora}, ["transformer"], [other], ADVICE)
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        find_fused_files_of_experts({"transformer": lora}, ["transformer"], [tmp_path / "nowhere.safetensors"], ADVICE)
    plain = write(tmp_path / "plain.safetensors", 3.0)
    with pytest.raises(UserError, match=r"plain\.safetensors was not trained on top of a LoRA.*--also_lora"):
        find_fused_files_of_experts({"transformer": plain}, ["transformer"], [style], ADVICE)
    assert find_fused_files_of_experts({"transformer": plain}, ["transformer"], [], ADVICE) == {"transformer": []}

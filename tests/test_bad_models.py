"""Model files that cannot be used are refused by what they are, in one message, before anything is encoded."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_wan_control_lora
import train_wan_lora
from tests.damage import edit_pth
from tests.media import video
from tests.tiny import (
    FAMILY,
    TINY_SHAPE,
    tiny_shape,
    tiny_text_encoder,
    tiny_transformer,
    tiny_vae22,
    write_clip,
    write_model,
    write_text_encoder,
    write_transformer,
    write_vae,
)
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.options import run_script
from wan.checkpoints import TRANSFORMER, CheckpointError
from wan.configs import FAMILIES

I2V = FAMILIES["wan2.1-i2v-14B-480P"]
EXPERTS, OTHER_EXPERTS = FAMILIES["wan2.2-i2v-A14B"], FAMILIES["wan2.2-t2v-A14B"]
TRAIN = "--dataset clips --base_res 64 --max_train_steps 1 --num_workers 0 --cache_dir cache"
PARTS = f"--vae model/{FAMILY.vae} --text_encoder model/{FAMILY.text_encoder} --tokenizer model/{FAMILY.tokenizer}"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A small model, a clip, and files that are something else, or that do not fit the model."""
    folder = tmp_path_factory.mktemp("template")
    write_model(folder / "model")
    write_model(folder / "experts", EXPERTS)
    video(folder / "clips" / "fox.mp4")
    state = load_file(folder / "model" / TRANSFORMER)
    layer = "blocks.0.self_attn.q"

    def variant(name: str, changes: dict[str, torch.Tensor]) -> None:
        save_file(state | changes, folder / name)

    nothing = torch.zeros(1)
    variant("int8.safetensors", {f"{layer}.weight": state[f"{layer}.weight"].to(torch.int8)})
    for format_ in ("nvfp4", "mxfp8", "int8_blockwise"):
        text = torch.tensor(list(f'{{"format": "{format_}"}}'.encode()), dtype=torch.uint8)
        variant(f"{format_}.safetensors", {f"{layer}.comfy_quant": text, f"{layer}.weight_scale": nothing})
    variant("vace.safetensors", {"vace_patch_embedding.weight": torch.zeros(48, 96, 1, 2, 2)})
    pair = LoraPair(torch.ones(2, TINY_SHAPE.dim), torch.ones(TINY_SHAPE.dim, 2), 2.0)
    write_lora(folder / "lora.safetensors", LoraFile({layer: pair}))
    save_file({"double_blocks.0.img_attn.qkv.weight": nothing}, folder / "flux.safetensors")
    (folder / "wan-Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    write_vae(folder / "vae22", tiny_vae22())
    write_text_encoder(folder / "wide", tiny_text_encoder(dim=64))
    write_clip(folder / "clip")
    write_transformer(folder / "deep", tiny_transformer(replace(tiny_shape(OTHER_EXPERTS), num_layers=3)))
    return folder


@pytest.fixture
def work(template, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "work"))
    return tmp_path / "work"


def ends(main: Callable, arguments: str, capsys: pytest.CaptureFixture) -> str:
    """The one message with which a script ends."""
    code = run_script(lambda: main(arguments.split()), bad_input=(CheckpointError,))
    said, message = capsys.readouterr()
    assert code == 2 and message.startswith("error: ") and len(message.splitlines()) <= 3, message
    assert "fox.mp4" not in said  # clips are read, and listed, only for a model that can be used
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--transformer int8.safetensors", "int8.safetensors is quantised to int8"),
        ("--transformer nvfp4.safetensors", "is quantised to nvfp4"),
        ("--transformer mxfp8.safetensors", "is quantised to mxfp8"),
        ("--transformer int8_blockwise.safetensors", "is quantised to int8_blockwise"),
        ("--transformer wan-Q8_0.gguf", "wan-Q8_0.gguf is a GGUF file"),
        ("--transformer pointer.safetensors", "is a pointer of Git LFS"),
        ("--transformer vace.safetensors", "is of Wan 2.1 VACE"),
        ("--transformer lora.safetensors", "lora.safetensors is a LoRA, not a Wan transformer"),
        ("--transformer flux.safetensors", "flux.safetensors is not a Wan transformer"),
        (f"--transformer model/{FAMILY.vae}", "is a Wan VAE, not a Wan transformer"),
        (f"--vae model/{FAMILY.text_encoder}", "is a UMT5 text encoder, not a Wan VAE"),
        (f"--text_encoder model/{TRANSFORMER}", "is a Wan transformer, not a UMT5 text encoder"),
        (f"--vae vae22/{FAMILY.vae}", "the Wan 2.2 VAE, which has 48 latent channels; the model has 16"),
        (f"--text_encoder wide/{FAMILY.text_encoder}", "has the width 64, but"),
        (f"--clip clip/{I2V.clip}", "reads no image tokens, leave clip out"),
        ("--tokenizer clips", "clips/tokenizer.json is missing"),
        ("--vae nowhere.safetensors", "nowhere.safetensors is missing"),
        (f"--transformer model/{TRANSFORMER} --high_noise x", "transformer and high_noise exclude each other"),
        (f"--transformer experts/high_noise_model/{TRANSFORMER}", "is one of two experts (wan2.2-i2v-A14B"),
        ("--family wan2.2-ti2v-5B", "with 16 input and 16 output channels, but wan2.2-ti2v-5B has ti2v with 48"),
        ("--family wan2.2-t2v-A14B", "wan2.2-t2v-A14B has high_noise and low_noise, but"),
        (f"--high_noise model/{TRANSFORMER} --low_noise deep", "has num_layers 3, but"),
        (f"--high_noise model/{TRANSFORMER}", "the low_noise expert is not given: --low_noise FILE, or train"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_what_it_is(work, capsys, options, message):
    call = f"{TRAIN} --pretrained_model_name_or_path model {options}"
    assert message in ends(train_wan_lora.main, call, capsys)
    assert not Path("cache").exists() and not Path("outputs").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
WEIGHTS = (TRANSFORMER, FAMILY.vae, FAMILY.text_encoder)
TOKENIZER = f"{FAMILY.tokenizer}/tokenizer.json"


def spoil(path: Path, content: bytes | None) -> None:
    """Writes other content; None: a link of the hub's cache to a blob that is gone."""
    path.unlink()
    path.write_bytes(content) if content is not None else path.symlink_to("../blobs/abc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a pointer of Git LFS, not the file itself"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"", "is an empty file"),
        (bytes(4096), "begins with nothing but zeros"),
        (None, "is missing: it is a link to the blob abc, which is missing from the hub's cache"),
    ],
)
@pytest.mark.parametrize("part", [*WEIGHTS, TOKENIZER, "config.json"])
def test_what_lies_in_the_place_of_a_part_is_named_before_any_caption_is_read(work, capsys, part, content, message):
    spoil(Path("model") / part, content)
    call = f"{TRAIN} --pretrained_model_name_or_path model"
    for how in ("", "--cache_embeddings", "--cache_only --cache_latents 1"):
        assert f"model/{part} {message}" in ends(train_wan_lora.main, f"{call} {how}", capsys)
    sample = "--lora_path lora.safetensors --pretrained_model_name_or_path model --prompt fox --frames 5"
    assert f"model/{part} {message}" in ends(test_wan_control_lora.main, sample, capsys)
    assert not Path("cache").exists() and not Path("outputs").exists()
    assert f"model/{part} {message}" in ends(
        train_wan_lora.main, "--doctor --pretrained_model_name_or_path model", capsys
    )


@pytest.mark.parametrize("part", [FAMILY.vae, FAMILY.text_encoder])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state, name: state.pop(name), "lacks tensor {}"),
        (lambda state, name: state.update(more=state[name]), "has the foreign tensor more"),
        (lambda state, name: state.update({name: state[name][:-1].clone()}), "has the tensor {} of shape"),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_names_and_shapes_of_a_pth_file_are_compared_before_any_caption_is_read(work, capsys, part, edit, message):
    path = Path("model") / part
    name = [name for name in torch.load(path, weights_only=True) if name.endswith("weight")][-1]
    edit_pth(path, lambda state: edit(state, name))
    for how in ("", "--cache_embeddings"):
        said = ends(train_wan_lora.main, f"{TRAIN} --pretrained_model_name_or_path model {how}", capsys)
        assert f"{path} {message.format(name)}" in said


def test_a_model_of_files_that_are_too_long_is_trained_as_that_of_whole_ones(work, capsys):
    long = Path(shutil.copytree("model", "long"))
    for part in (FAMILY.vae, FAMILY.text_encoder):
        save_file(torch.load(long / part, weights_only=True), (long / part).with_suffix(".safetensors"))
        (long / part).unlink()
    files = sorted(long.glob("*.safetensors"))
    for path in files:
        path.write_bytes(path.read_bytes() + b"more")
    learned = []
    for model in ("model", "long"):
        call = f"{TRAIN} --pretrained_model_name_or_path {model} --output_dir out-{model} --seed 1"
        train_wan_lora.main(call.replace("--cache_dir cache", f"--cache_dir cache-{model}").split())
        said = capsys.readouterr().out
        assert said.count("after its last tensor: read by its header") == (len(files) if model == "long" else 0)
        (lora,) = Path(f"out-{model}").glob("*/checkpoints/wan-lora-00000001.safetensors")
        learned.append(load_file(lora))
    assert len(files) == 3 and learned[0].keys() == learned[1].keys()
    # Where tensors begin in a file decides by which kernels the CPU reads them, so that the last bit may differ.
    for name, tensor in learned[0].items():
        torch.testing.assert_close(tensor, learned[1][name], rtol=0, atol=1e-6)


def test_what_single_files_lack_is_named(work, capsys):
    given = f"{TRAIN} --transformer model/{TRANSFORMER} {PARTS}"
    for name in ("vae", "text_encoder", "tokenizer"):
        words = given.split()
        index = words.index(f"--{name}")
        call = " ".join([*words[:index], *words[index + 2 :]])
        assert f"no {name} is given" in ends(train_wan_lora.main, call, capsys)


def test_both_experts_are_needed_for_previews_and_for_sampling(work, capsys):
    one = f"--high_noise model/{TRANSFORMER} {PARTS}"
    preview = "--expert high --sample_prompts fox --sample_every 1"
    message = "the low_noise expert is not given, but needed for {}: --low_noise FILE".format
    said = ends(train_wan_lora.main, f"{TRAIN} {one} {preview}", capsys)
    assert message("previews (--sample_prompts)") in said
    arguments = f"--lora_path lora.safetensors {one} --prompt fox"
    assert message("sampling") in ends(test_wan_control_lora.main, arguments, capsys)


def test_a_lora_of_single_files_asks_for_them(work, capsys):
    pair = LoraPair(torch.ones(2, TINY_SHAPE.dim), torch.ones(TINY_SHAPE.dim, 2), 2.0)
    metadata = {"base_model": "wan.safetensors", "base_files": "--transformer wan.safetensors"}
    write_lora(Path("own.safetensors"), LoraFile({"blocks.0.self_attn.q": pair}, metadata=metadata))
    sample = "--lora_path own.safetensors --prompt fox --frames 2"
    message = ends(test_wan_control_lora.main, sample, capsys)
    assert "on single files: give them again, --transformer wan.safetensors\nand --vae" in message
    for given in ("--pretrained_model_name_or_path model", f"--transformer model/{TRANSFORMER} {PARTS}"):
        assert "--frames 2 must be 4n + 1" in ends(test_wan_control_lora.main, f"{sample} {given}", capsys)


def test_for_checking_a_dataset_a_transformer_is_enough_and_has_to_be_one(work, capsys):
    check = "--dataset clips --base_res 64 --cache_dir cache --check_dataset --transformer"
    train_wan_lora.main(f"{check} model/{TRANSFORMER}".split())
    assert "fox.mp4" in capsys.readouterr().out
    assert "is of Wan 2.1 VACE" in ends(train_wan_lora.main, f"{check} vace.safetensors", capsys)

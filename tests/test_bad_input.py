"""Bad input ends in one message and exit code 2, without a traceback, and damages nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import test_wan_control_lora
import train_wan_lora
import utils.encoding.text
from tests.tiny import TINY_SHAPE, write_model
from utils.adapters.lora_file import LoraFile, LoraPair
from utils.adapters.lora_writer import write_lora
from utils.common.options import run_script
from utils.encoding.text import EMBEDDINGS
from utils.media.frames import write_video
from wan.checkpoints import CheckpointError

MODEL = "--pretrained_model_name_or_path model"
TRAIN = f"--dataset clips {MODEL} --base_res 64 --max_train_steps 1 --num_workers 0"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A model, a dataset of one clip, and LoRAs that fit the model, miss its width, or miss its depth."""
    folder = tmp_path_factory.mktemp("template")
    write_model(folder / "model")
    (folder / "clips").mkdir()
    write_video(folder / "clips" / "fox.mp4", torch.randint(0, 256, (9, 3, 48, 80), dtype=torch.uint8), 16)
    (folder / "clips" / "fox.txt").write_text("a fox", encoding="utf-8")
    pair = LoraPair(torch.ones(2, 7), torch.ones(7, 2), 2.0)
    write_lora(folder / "foreign.safetensors", LoraFile({"blocks.0.self_attn.q": pair}))
    write_lora(folder / "deep.safetensors", LoraFile({"blocks.77.self_attn.q": pair}))
    fitting = LoraPair(torch.ones(2, TINY_SHAPE.dim), torch.ones(TINY_SHAPE.dim, 2), 2.0)
    write_lora(folder / "fitting.safetensors", LoraFile({"blocks.0.self_attn.q": fitting}))
    matrices = {"lora_A": fitting.down * torch.nan, "lora_B": fitting.up}
    save_file({f"blocks.0.self_attn.q.{key}": value for key, value in matrices.items()}, folder / "nan.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    save_file({"context": torch.zeros(3, 5)}, folder / "narrow.safetensors")
    return folder


@pytest.fixture
def work(template, tmp_path, monkeypatch) -> Path:
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "embeddings").mkdir()
    for prompt in EMBEDDINGS.glob("*.txt"):
        shutil.copy(prompt, tmp_path / "embeddings")
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", tmp_path / "embeddings")
    return tmp_path / "work"


def ends(main: Callable, arguments: str, capsys: pytest.CaptureFixture) -> str:
    """Runs a script in this process; returns its one message."""
    code = run_script(lambda: main(arguments.split()), bad_input=(CheckpointError,))
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--dataset is missing"),
        ("--dataset clips", "no model at Wan-AI/Wan2.1-T2V-1.3B"),
        (MODEL, "--dataset is missing"),
        (f"{MODEL} --dataset nowhere", "nowhere"),
        (f"{MODEL} --dataset model", "no videos or images in model"),
        (f"{TRAIN} --base_res 100", "multiple of 16"),
        (f"{TRAIN} --token_limit 3", "3"),
        (f"{TRAIN} --lora_blocks 5", "the model has blocks 0 to 1"),
        (f"{TRAIN} --lora_blocks one", "lora_blocks 'one' is not understood"),
        (f"{TRAIN} --lora_target atn", "lora_target 'atn' matches no layer"),
        (f"{TRAIN} --distill_negative nowhere.txt", "--distill_negative requires --distill_cfg"),
        (f"{TRAIN} --lr_warmup_steps 1", "must be below the 1 steps"),
        (f"{TRAIN} --name foxes/red", "--name 'foxes/red' names files: use letters"),
        (f"{TRAIN} --trigger ,", "--trigger is empty"),
        (f"{TRAIN} --metadata all", "--metadata must be one of standard, full"),
        (f"{TRAIN} --seed 99999999999999999999", "--seed must be at most"),
        (f"{TRAIN} --load_control", "--load_control requires --control_lora"),
        (f"{TRAIN} --control_lora --load_control", "no control named fox_control"),
        (f"{TRAIN} --init_lora nowhere.safetensors", "nowhere.safetensors"),
        (f"{TRAIN} --init_lora other.safetensors", "other.safetensors"),
        (f"{TRAIN} --init_lora foreign.safetensors", "foreign.safetensors: the LoRA has "),
        (f"{TRAIN} --init_lora nan.safetensors", "nan.safetensors: blocks.0.self_attn.q.lora_A: holds NaN or infinite"),
        (f"{TRAIN} --fuse_lora nan.safetensors", "nan.safetensors: blocks.0.self_attn.q.lora_A: holds NaN or infinite"),
        (f"{TRAIN} --fuse_lora foreign.safetensors", "the LoRA has (7, 7) at blocks.0.self_attn.q.weight"),
        (f"{TRAIN} --fuse_lora deep.safetensors", "blocks.77.self_attn.q.weight, which this model does not have"),
        (f"{TRAIN} --distill_cfg 1 --distill_negative nowhere.txt", "cannot read the prompt nowhere.txt"),
        (f"{TRAIN} --distill_cfg 1 --distill_negative other.safetensors", "other.safetensors is not a text embedding"),
        (f"{TRAIN} --distill_cfg 1 --distill_negative narrow.safetensors", "3 embedding rows of width 5"),
        (f"{TRAIN} --sample_prompts nowhere.txt", "cannot read the prompt nowhere.txt"),
        (f"{TRAIN} --sample_every 5", "--sample_every requires --sample_prompts"),
        (f"{TRAIN} --also_lora fitting.safetensors", "--also_lora requires --sample_prompts"),
        (
            f"{TRAIN} --sample_prompts fox --also_lora foreign.safetensors:0.5",
            "foreign.safetensors: the LoRA has (7, 7)",
        ),
        (f"{TRAIN} --idle_expert disk", "--idle_expert disk would be ignored"),
        (f"{TRAIN} --output_dir clips/fox.txt", "clips/fox.txt is a file"),
    ],
)
def test_a_mistaken_call_of_the_trainer_is_reported(work, capsys, arguments, message):
    assert message in ends(train_wan_lora.main, arguments, capsys)
    assert not (work / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--lora_path is missing"),
        ("--lora_path nowhere.safetensors", "nowhere.safetensors"),
        ("--lora_path deep.safetensors", "does not name its base model"),
        (f"--lora_path deep.safetensors {MODEL} --strength 0.5", "blocks.77.self_attn.q"),
        (f"--lora_path nan.safetensors {MODEL} --prompt fox", "blocks.0.self_attn.q.lora_A: holds NaN or infinite"),
        (f"--lora_path deep.safetensors {MODEL} --frames 6", "--frames 6 must be 4n + 1, like 5"),
        (f"--lora_path fitting.safetensors {MODEL} --prompt fox --embedding narrow.safetensors", "exclude each other"),
        (f"--lora_path fitting.safetensors {MODEL} --control_type tile", "--control_type requires --input_video"),
        (
            f"--lora fitting.safetensors {MODEL} --negative_prompt fox --negative_embedding narrow.safetensors",
            "exclude",
        ),
        (f"--lora fitting.safetensors {MODEL} --negative_embedding narrow.safetensors", "3 embedding rows of width 5"),
        (f"--lora_path deep.safetensors {MODEL} --width 100", "must be multiples of 16"),
        (f"--lora_path deep.safetensors {MODEL} --input_video clips/fox.mp4", "is not a control LoRA"),
        (f"--lora_path fitting.safetensors {MODEL} --embedding other.safetensors", "is not a text embedding"),
        (f"--lora_path fitting.safetensors {MODEL} --embedding narrow.safetensors", "3 embedding rows of width 5"),
    ],
)
def test_a_mistaken_call_of_the_test_script_is_reported(work, capsys, arguments, message):
    assert message in ends(test_wan_control_lora.main, arguments, capsys)
    assert not (work / "outputs").exists()


def test_all_bad_files_are_reported_together_before_a_model_loads(work, capsys, monkeypatch):
    monkeypatch.setattr("utils.runs.inputs.plan_experts", None)  # whoever calls it fails
    (work / "clips" / "broken.mp4").write_bytes((work / "clips" / "fox.mp4").read_bytes()[:700])
    (work / "clips" / "broken.txt").write_text("broken", encoding="utf-8")
    write_video(work / "clips" / "mute.mp4", torch.zeros(9, 3, 48, 80, dtype=torch.uint8), 16)
    write_video(work / "clips" / "short.mp4", torch.zeros(3, 3, 48, 80, dtype=torch.uint8), 16)
    (work / "clips" / "short.txt").write_text("short", encoding="utf-8")
    message = ends(train_wan_lora.main, TRAIN, capsys)
    assert "3 files cannot be used" in message
    assert all(name in message for name in ("broken.mp4", "mute.mp4", "short.mp4", "--skip_bad_files"))


def test_bad_files_are_left_out_when_the_user_says_so(work, capsys):
    (work / "clips" / "mute.mp4").write_bytes((work / "clips" / "fox.mp4").read_bytes())
    train_wan_lora.main(f"{TRAIN} --val_samples 0 --skip_bad_files".split())
    output = capsys.readouterr().out
    assert "skipping 1 file" in output
    assert "1 clip in 1 bucket, 1 step per epoch" in output
    assert len(list((work / "outputs").glob("*/checkpoints/wan-lora-*.safetensors"))) == 1


def test_a_model_of_another_family_is_refused_with_its_name(work, capsys):
    config = work / "model" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"t2v"', '"vace"'))
    assert "is of Wan 2.1 VACE (model_type vace): not trained here yet" in ends(train_wan_lora.main, TRAIN, capsys)
    config.write_text(original.replace('"t2v"', '"i2v"'))
    message = ends(train_wan_lora.main, TRAIN, capsys)
    assert "a kind that is not supported: i2v with 16 input and 16 output channels\nsupported: t2v with 16" in message


def test_a_ready_embedding_without_guidance_needs_no_text_encoder(work, capsys, monkeypatch):
    monkeypatch.setattr(utils.encoding.text, "load_text_encoder", None)  # whoever calls it fails
    save_file({"context": torch.zeros(3, TINY_SHAPE.text_dim)}, work / "ready.safetensors")
    flags = f"--lora_path fitting.safetensors {MODEL} --embedding ready.safetensors --guidance 1"
    test_wan_control_lora.main(f"{flags} --width 32 --height 32 --frames 1 --steps 1".split())
    assert "32x32, 1 frame, 1 step of unipc, guidance 1, shift 5, seed 42, strength 1" in capsys.readouterr().out
    assert (work / "outputs" / "samples" / "fitting_seed42.mp4").exists()


def test_an_edited_caption_is_encoded_again_and_an_unchanged_one_is_not(work, capsys):
    train_wan_lora.main(f"{TRAIN} --cache_embeddings".split())
    capsys.readouterr()
    (work / "clips" / "fox.txt").write_text("a red fox", encoding="utf-8")
    train_wan_lora.main(f"{TRAIN} --cache_embeddings".split())
    assert "text: 1 to encode" in capsys.readouterr().out
    train_wan_lora.main(f"{TRAIN} --cache_embeddings".split())
    assert "text: 0 to encode" in capsys.readouterr().out

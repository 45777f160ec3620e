"""Commands written for VideoX-Fun: each of its names arrives as the value that it means here."""

import json
import re
import shlex
from pathlib import Path

import pytest

import train_wan_lora
from tests.checkout import copy_prompts
from tests.documents import ROOT, commands, read
from tests.media import video
from tests.tiny import tiny_shape, tiny_transformer, write_model
from utils.adapters.lora import select_modules
from utils.adapters.lora_reader import read_lora
from utils.common.errors import UserError
from utils.common.options import parse_options
from wan.configs import FAMILIES

OPTIONS, PAGE = train_wan_lora.Options, ROOT / "docs" / "videox_fun.md"
# The guide's command, "Wan distill without deepspeed", but for the options of the distillation itself.
GUIDE = """
  --config_path="config/wan2.2/wan_civitai_i2v.yaml" --pretrained_model_name_or_path=models/Wan2.2-I2V-A14B
  --train_data_dir=datasets/clips/ --train_data_meta=datasets/clips/metadata.json --image_sample_size=640
  --video_sample_size=640 --token_sample_size=640 --video_sample_stride=2 --video_sample_n_frames=81
  --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1 --dataloader_num_workers=8
  --num_train_epochs=100 --checkpointing_steps=50 --learning_rate=1e-05 --seed=42 --output_dir="output_dir_distill"
  --gradient_checkpointing --mixed_precision="bf16" --adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1
  --max_grad_norm=0.05 --random_hw_adapt --training_with_video_token_length --enable_bucket --uniform_sampling
  --boundary_type="low" --train_mode="i2v" --rank=64 --network_alpha=32 --target_name="q,k,v,ffn.0,ffn.2"
  --use_peft_lora --low_vram
""".replace('"', "").split()
MEANT = {
    "pretrained_model_name_or_path": "models/Wan2.2-I2V-A14B",
    "dataset": Path("datasets/clips"),
    "clip_list": Path("datasets/clips/metadata.json"),
    "image_sample_size": 640,
    "video_sample_size": 640,
    "token_sample_size": 640,
    "frame_stride": 2,
    "max_frames": 81,
    "batch_size": 1,
    "video_repeat": 1,
    "gradient_accumulation": 1,
    "num_workers": 8,
    "epochs": 100,
    "checkpointing_steps": 50,
    "learning_rate": 1e-5,
    "seed": 42,
    "output_dir": Path("output_dir_distill"),
    "gradient_checkpointing": "full",
    "weight_dtype": "bf16",
    "weight_decay": 3e-2,
    "adam_epsilon": 1e-10,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "expert": "low",
    "train_mode": "i2v",
    "lora_rank": 64,
    "lora_alpha": 32.0,
    "lora_target": ("*.q", "*.k", "*.v", "*.ffn.0", "*.ffn.2"),
    "overlap_encoding": False,
}


def test_every_option_of_the_guide_arrives_as_the_value_that_it_means(capsys):
    opts = parse_options(OPTIONS, GUIDE)
    assert {name: getattr(opts, name) for name in MEANT} == MEANT
    others = {name: value for name, value in vars(opts).items() if name not in MEANT}
    assert others == {name: getattr(OPTIONS, name) for name in others}
    printed = capsys.readouterr().out
    assert (
        printed.startswith("--config_path config/wan2.2/wan_civitai_i2v.yaml is not needed")
        and printed.count("\n") == 1
    )


def as_toml(argument: str) -> str:
    name, _, value = argument.removeprefix("--").partition("=")
    try:
        float(value)
    except ValueError:
        return f"{name} = '{value}'" if value else f"{name} = true"
    return f"{name} = {value}"


def test_a_config_file_may_have_the_same_names(tmp_path):
    (tmp_path / "run.toml").write_text("\n".join(map(as_toml, GUIDE)), encoding="utf-8")
    opts = parse_options(OPTIONS, ["--config", str(tmp_path / "run.toml")])
    assert {name: getattr(opts, name) for name in MEANT} == MEANT


def test_the_page_has_the_same_command_and_a_row_for_each_of_its_options():
    (command,) = commands(PAGE)
    shown = {argument.removeprefix("--").partition("=")[0] for argument in shlex.split(command)[2:]}
    names = {argument.removeprefix("--").partition("=")[0] for argument in GUIDE}
    assert shown == names | {"few_step", "learning_rate_critic"}
    rows = "".join(line for line in read(PAGE).splitlines() if line.startswith("| `") or line.startswith("| DeepSpeed"))
    listed = set(re.findall(r"`(\w+)(?:=[^`]*)?`", rows))
    assert (names | {"learning_rate_critic", "random_frame_crop", "resume_from_checkpoint"}) <= listed


def test_the_command_trains_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    family = FAMILIES["wan2.2-i2v-A14B"]
    write_model(Path("models/Wan2.2-I2V-A14B"), family)
    video(Path("datasets/clips/train/1.mp4"), frames=17, caption=None)
    video(Path("datasets/clips/train/2.mp4"), frames=9, caption=None)
    rows = [{"file_path": f"train/{number}.mp4", "text": "a clip", "type": "video"} for number in (1, 2)]
    Path("datasets/clips/metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    small = "--image_sample_size 64 --video_sample_size 64 --token_sample_size 64 --dataloader_num_workers 0"
    train_wan_lora.main([*GUIDE, *small.split(), "--num_train_epochs", "2", "--val_samples", "1"])
    printed = capsys.readouterr().out
    assert "17 -> 9" in printed and "9 -> 5" in printed  # every second frame
    (path,) = Path("output_dir_distill").glob("*/checkpoints/wan-lora-00000004*low_noise.safetensors")
    lora = read_lora(path)
    layers = {name.split(".", 2)[2] for name in lora.pairs}
    assert layers == {f"{attn}_attn.{part}" for attn in ("self", "cross") for part in "qkv"} | {"ffn.0", "ffn.2"}
    assert {(pair.rank, pair.alpha) for pair in lora.pairs.values()} == {(64, 32.0)}
    assert list(Path("output_dir_distill").glob("*/checkpoints/state-00000004.safetensors"))


@pytest.mark.parametrize("family", ["wan2.1-t2v-1.3B", "wan2.1-i2v-14B-480P", "wan2.2-i2v-A14B"])
@pytest.mark.parametrize("target", ["q,k,v,ffn.0,ffn.2", "q, o", "self_attn.k", "blocks.1.ffn.0,v", "k_img"])
def test_target_names_choose_the_layers_that_peft_would(family, target):
    model = tiny_transformer(tiny_shape(FAMILIES[family]))
    names = [name for name, _ in model.named_modules()]
    wanted = target.replace(" ", "").split(",")
    peft = [n for n in names if n in wanted or any(n.endswith(f".{end}") for end in wanted)]
    opts = parse_options(OPTIONS, ["--target_name", target])
    if not peft:
        with pytest.raises(UserError, match=r"lora_target '\*.k_img' matches no layer"):
            select_modules(model, opts.lora_target)
        return
    assert select_modules(model, opts.lora_target) == peft
    assert not any("k_img" in name for name in peft if target != "k_img")


@pytest.mark.parametrize(("given", "dtype"), [("bf16", "bf16"), ("no", "fp32")])
def test_mixed_precision_is_the_dtype_of_the_base_model(given, dtype):
    assert parse_options(OPTIONS, ["--mixed_precision", given]).weight_dtype == dtype


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mixed_precision fp16", "--mixed_precision must be bf16 or no, not 'fp16'; nothing here computes in fp16"),
        ("--mixed_precision fp8", "--mixed_precision must be bf16 or no, not 'fp8'$"),
        ("--mixed_precision", "--mixed_precision needs one value, not 0"),
        ("--mixed_precision bf16 --weight_dtype int8", "have different values: give one of them"),
        ("--vae_mini_batch 4", "--vae_mini_batch must be 1, not '4': clips are encoded one at a time"),
        ("--enable_bucket no", "--enable_bucket takes no value, not 'no'"),
        ("--low_vram --overlap_encoding", "--low_vram and --overlap_encoding have different values"),
        ("--rank 8 --lora_rank 16", "have different values"),
        ("--network_alpha 0", "--network_alpha must be at least 0.001"),
        ("--target_name ,", "--target_name needs at least one value"),
        ("--adam_epsilon 0", "--adam_epsilon must be at least"),
        (
            "--optimizer adafactor --adam_epsilon 1e-10",
            "--optimizer adafactor has no --adam_epsilon: leave it out, or take adamw",
        ),
        ("--optimizer muon --adam_epsilon 1e-10", "has no --adam_epsilon"),
        ("--train_mode inpaint", "--train_mode must be one of normal, i2v, ti2v, not 'inpaint'"),
        ("--random_hw_adapt", "--random_hw_adapt requires --video_sample_size"),
        ("--token_sample_size 640", "--token_sample_size requires --training_with_video_token_length"),
        ("--image_sample_size 640", "--image_sample_size requires --video_sample_size"),
    ],
)
def test_a_value_that_means_what_is_not_done_here_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_options(OPTIONS, flags.split())


@pytest.mark.parametrize("name", ["enable_bucket", "uniform_sampling", "use_peft_lora", "low_vram"])
def test_what_is_always_so_cannot_be_switched_off(tmp_path, name):
    file = tmp_path / "run.toml"
    file.write_text(f"{name} = false", encoding="utf-8")
    with pytest.raises(UserError, match=f"--{name} cannot be off: "):
        parse_options(OPTIONS, ["--config", str(file)])

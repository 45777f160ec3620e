"""Few-step distillation by the command line, on small models of each kind: what it writes, refuses and resumes."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_wan_lora
from tests.tiny import tiny_shape, tiny_transformer, write_clips, write_model, write_transformer
from utils.adapters.lora_reader import read_lora
from utils.common.errors import RunError, UserError
from utils.common.tensor_files import read_tensors
from utils.media.frames import save_image
from utils.training import variety
from wan.configs import FAMILIES

COMMON = (
    "--few_step --dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --num_workers 0 "
    "--output_dir runs --max_train_steps 8 --gen_update_interval 2 --checkpointing_steps 3 --learning_rate 1e-3 "
    "--learning_rate_critic 2e-3 --critic_alignment 0.1 --ema_decay 0.5 --lr_warmup_steps 2"
)
PAIR = "--expert_phase_steps 3"
OF_EACH = {
    "wan2.1-t2v-1.3B": "--val_samples 1 --val_steps 3",
    "wan2.1-i2v-14B-480P": "--val_samples 0",
    "wan2.2-ti2v-5B": "--val_samples 0 --distill_input rollout",
    "wan2.2-i2v-A14B": f"--val_samples 0 {PAIR}",
    "wan2.2-t2v-A14B": f"--val_samples 0 {PAIR} --distill_input rollout",
}


@pytest.fixture
def work(tmp_path, monkeypatch, request) -> Path:
    """A working folder with clips, and a small model of the family that the test names."""
    family = FAMILIES[getattr(request, "param", "wan2.1-t2v-1.3B")]
    write_model(tmp_path / "model", family)
    write_clips(tmp_path / "clips")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(more: str) -> Path:
    """Runs the trainer; the folder of the checkpoints of the only run."""
    train_wan_lora.main([*COMMON.split(), *more.split()])
    (folder,) = Path("runs").glob("*/checkpoints")
    return folder


@pytest.mark.parametrize(("work", "more"), OF_EACH.items(), ids=OF_EACH, indirect=["work"])
def test_each_kind_of_model_is_distilled_and_a_resumed_run_ends_as_an_unbroken_one(work, more):
    folder = train(more)
    steps = 8 * (1 + ("A14B" in str(more)))
    last = max(int(path.stem.removeprefix("state-")) for path in folder.glob("state-*"))
    straight = {path.name: shutil.move(path, work / path.name) for path in folder.glob(f"*-{last:08d}*")}
    students = [name for name in straight if not name.startswith("state") and "ema" not in name]
    assert last in (steps, 16) and students and not any("critic" in path.name for path in folder.iterdir())
    train_wan_lora.main([*COMMON.split(), *more.split(), "--resume_from_checkpoint", "latest"])
    for name, path in straight.items():
        first, second = (read_tensors(each)[0] for each in (Path(path), folder / name))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    for name in students:
        lora = read_lora(folder / name)
        assert lora.metadata["denoising_steps"] == "1000 750 500 250"
        assert all(pair.up.abs().max() > 0 for pair in lora.pairs.values())


@pytest.mark.parametrize("work", ["wan2.2-t2v-A14B"], indirect=True)
def test_the_low_expert_begins_with_samples_of_the_finished_high_one(work, monkeypatch, capsys):
    folder = train("--val_samples 0 --expert high --distill_input rollout")
    high = shutil.copy(folder / "wan-lora-00000008_high_noise.safetensors", work / "finished.safetensors")
    shutil.rmtree("runs")
    flags = f"--val_samples 0 --expert low --distill_input rollout --high_lora {high}"
    folder = train(flags)
    assert read_lora(folder / "wan-lora-00000008_low_noise.safetensors").metadata["expert"] == "low_noise"
    for change, message in {
        "--denoising_steps 8": "finished.* was distilled into 4 steps .*, but this run's LoRA .* into 8 steps",
        "--high_lora missing.safetensors": "missing.safetensors",
    }.items():
        with pytest.raises((UserError, RunError), match=message):
            train(f"{flags} {change}")
    family = FAMILIES["wan2.2-t2v-A14B"]
    write_transformer(work / "model" / family.experts[0].folder, tiny_transformer(tiny_shape(family), 7), 1, family)
    with pytest.raises(UserError, match="the base model's high_noise has another content"):
        train(f"{flags} --resume_from_checkpoint latest")


REFUSED = {
    "--distill_cfg 1": "--few_step distils guidance too",
    "--shift 5": "it is --few_step_shift",
    "--mask_floor 0.5 --load_mask": "--mask_floor would be ignored",
    "--gen_update_interval 9": "8 steps are fewer than --gen_update_interval 9",
    "--denoising_steps 2 --denoising_step_indices_list 1000 500": "exclude each other",
    "--denoising_step_indices_list 1000 250 500": "must descend",
    "--denoising_step_indices_list 750 500": "begins at 750",
    "--high_lora x.safetensors": "--high_lora would be ignored",
    "--diversity_weight 0 --diversity_steps 4": "--diversity_steps would be ignored",
    "--control_lora": "--few_step has no control",
    "--benchmark": "--benchmark times ordinary steps",
    "--adapter_dtype bf16": "--critic_alignment would be lost",
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.items(), ids=REFUSED)
def test_options_that_would_be_ignored_or_cannot_be_are_refused_at_once(work, flags, message):
    with pytest.raises(UserError, match=message):
        train(flags)
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", ["--denoising_steps 2", "--gen_update_interval 2", "--critic_alignment 0.1"])
def test_options_of_few_steps_need_few_steps(work, flags):
    with pytest.raises(UserError, match="requires --few_step"):
        train_wan_lora.main(["--dataset", "clips", *flags.split()])


@pytest.mark.parametrize("work", ["wan2.2-t2v-A14B"], indirect=True)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--denoising_steps 2",
            "the low_noise expert has no step: it answers from 0 to 875, and the steps are at 1000, 923",
        ),
        ("--expert_range all", "--expert_range would be ignored"),
        ("--expert low --distill_input rollout", "give its finished LoRA as --high_lora"),
    ],
)
def test_an_expert_needs_a_step_and_a_start(work, flags, message):
    with pytest.raises(UserError, match=message):
        train(flags)


def test_a_student_that_makes_the_same_of_every_noise_ends_the_run(work, monkeypatch, capsys):
    measured = iter([1.0, 0.3, 0.2])
    monkeypatch.setattr(variety.Variety, "of_teacher", lambda self: 1.0)
    monkeypatch.setattr(variety.Variety, "of_student", lambda self: next(measured))
    with pytest.raises(RunError, match="step 6: the student has collapsed.*\n.*\n.*the last checkpoint is .*-00000003"):
        train("--val_samples 1 --val_steps 3 --checkpointing_steps 3")
    assert "step 3: samples of the student differ 0.30 times as much as the teacher's" in capsys.readouterr().out


def test_the_teachers_variety_is_measured_once_in_a_run(work, monkeypatch):
    train("--val_samples 1 --val_steps 3")
    monkeypatch.setattr(variety.Variety, "of_teacher", lambda self: pytest.fail("it is in the state"))
    train("--val_samples 1 --val_steps 3 --resume_from_checkpoint latest")


# ------------------------------------------------------------------------------------------- prompts or pictures alone

ROLLOUT = "--distill_input rollout --base_res 64 --max_frames 5 --token_limit 60 --num_workers 0"


def train_from(start: str, more: str = "") -> Path:
    common = COMMON.replace("--dataset clips", start).replace("--base_res 64 --token_limit 60 --num_workers 0", ROLLOUT)
    train_wan_lora.main([*common.split(), *more.split()])
    (folder,) = Path("runs").glob("*/checkpoints")
    return folder


@pytest.mark.parametrize("work", ["wan2.1-t2v-1.3B", "wan2.2-ti2v-5B"], indirect=True)
def test_prompts_alone_are_enough_for_models_that_start_from_text(work, monkeypatch, capsys):
    Path("prompts.txt").write_text("a fox in snow\na boat\n\na red bus\n", encoding="utf-8")
    shutil.rmtree("clips")
    monkeypatch.setattr("utils.encoding.samples.load_vae", lambda *_: pytest.fail("the VAE is not needed"))
    flags = "--val_samples 1 --val_steps 3"
    folder = train_from("--prompts prompts.txt", flags)
    said = capsys.readouterr().out
    assert "a fox in snow" in said and "samples of the student differ" in said and "adds" not in said
    straight = read_tensors(folder / "state-00000008.safetensors")[0]
    for path in folder.glob("*-00000008*"):
        path.unlink()
    train_from("--prompts prompts.txt", f"{flags} --resume_from_checkpoint latest")
    again = read_tensors(folder / "state-00000008.safetensors")[0]
    assert again.keys() == straight.keys() and all(torch.equal(again[key], straight[key]) for key in again)


@pytest.mark.parametrize("work", ["wan2.2-i2v-A14B", "wan2.2-ti2v-5B"], indirect=True)
def test_pictures_with_captions_are_enough_for_models_that_start_from_one(work, capsys):
    Path("pictures").mkdir()
    save_image(Path("pictures/fox.png"), Image.new("RGB", (96, 64), "orange"))
    Path("pictures/fox.txt").write_text("a fox", encoding="utf-8")
    folder = train_from("--dataset pictures", "--val_samples 1 --val_steps 8")
    assert list(folder.glob("wan-lora-*"))
    assert "fox.png" in capsys.readouterr().out


@pytest.mark.parametrize("work", ["wan2.2-i2v-A14B"], indirect=True)
def test_a_model_that_is_given_frames_cannot_be_trained_on_prompts(work):
    Path("prompts.txt").write_text("a fox\n", encoding="utf-8")
    with pytest.raises(UserError, match="give a folder of pictures with captions instead"):
        train_from("--prompts prompts.txt")


def test_prompts_are_for_students_that_start_from_their_own_samples(work):
    Path("prompts.txt").write_text("a fox\n", encoding="utf-8")
    with pytest.raises(UserError, match="--prompts requires --few_step with --distill_input rollout"):
        train_wan_lora.main("--prompts prompts.txt --pretrained_model_name_or_path model".split())

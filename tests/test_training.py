"""Training teaches: what the whole machinery does to a small model, in one process."""

import multiprocessing
import shutil
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train_wan_lora
from tests.checkout import copy_prompts
from tests.encoders import encoders_of
from tests.limits import limits
from tests.tiny import TINY_SHAPE, tiny_transformer, tiny_vae, write_clips, write_model, write_transformer
from utils.adapters.attach import plan_adapter
from utils.adapters.lora import add_lora, select_modules
from utils.adapters.lora_reader import read_lora
from utils.common.errors import UserError
from utils.common.tensor_files import read_tensors
from utils.data.folders import Folder, Rules
from utils.data.loading import load_clip
from utils.data.plan import validation_windows
from utils.data.scan import scan
from utils.diffusion.flow import add_noise
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, collate, make_predict
from utils.media.probing import probe
from utils.runs.metrics import Metrics
from utils.runs.run import Run
from utils.storage.weights import hold_as
from utils.training.memory import prepare
from utils.training.optim import Updater
from utils.training.optimizers import OptimizerSpec, ParameterGroup
from wan.checkpoints import build_transformer, load_transformer
from wan.checkpoints.transformer import read_config, read_transformer
from wan.modules.model import is_fp32


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> None:
    """In a folder with a small model, clips, and the negative prompts where embeddings may be written beside them."""
    monkeypatch.chdir(tmp_path)
    prompts = copy_prompts(tmp_path / "embeddings")
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", Path(prompts))
    write_model(Path("model"))
    write_clips(Path("clips"))


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> Batch:
    """One clip with its control, encoded."""
    folder = Folder(write_clips(tmp_path_factory.mktemp("clips")) / "val", Rules(base_res=(64,)))
    (window,) = validation_windows(scan(folder, 16.0)[0], limits(token_limit=50), 1)
    text = torch.randn(6, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(0))
    return collate([encoders_of(tiny_vae(), "tile").encode(load_clip(window), text)])


def updater_of(parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> Updater:
    return Updater([ParameterGroup({str(index): parameter for index, parameter in enumerate(parameters)})], spec)


def test_the_loss_on_one_clip_with_fixed_noise_falls_by_at_least_half(batch):
    torch.manual_seed(0)
    model = tiny_transformer()
    names = select_modules(model, ["all-linear"])
    updater = updater_of(add_lora(model, names, rank=16, alpha=16), OptimizerSpec(1e-2, 0.0, "constant", 0, 120))
    predict, cond = make_predict(model), Cond(batch.cond.text)
    noisy = add_noise(batch.latents, torch.randn_like(batch.latents), torch.tensor([0.6]))
    losses = []
    for _ in range(120):
        loss = squared_error(predict(noisy.latents, noisy.timestep, cond), noisy.velocity)
        loss.backward()
        updater.step(max_grad_norm=1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_after_the_second_backward_every_matrix_has_a_finite_gradient_that_is_not_zero():
    torch.manual_seed(0)
    model = tiny_transformer()
    parameters = add_lora(model, select_modules(model, ["all-linear"]), rank=4, alpha=4)
    updater = updater_of(parameters, OptimizerSpec(1e-3, 0.0, "constant", 0, 2))
    predict, cond = make_predict(model), Cond(torch.randn(2, 6, model.shape.text_dim))
    for step in range(2):
        latents = torch.randn(2, 16, 2, 4, 4)
        noisy = add_noise(latents, torch.randn_like(latents), torch.tensor([0.3, 0.8]))
        squared_error(predict(noisy.latents, noisy.timestep, cond), noisy.velocity).backward()
        if step == 0:
            updater.step(max_grad_norm=1.0)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in parameters)


@pytest.mark.parametrize(
    "flags", ["", "--gradient_checkpointing", "--control_lora --control_inject_noise 0.5 --distill_cfg 2"]
)
def test_a_bf16_base_as_on_a_gpu_trains_fp32_adapters(tmp_path: Path, batch: Batch, flags: str):
    write_transformer(tmp_path, tiny_transformer())
    files = read_transformer(tmp_path, read_config(tmp_path))
    model = load_transformer(files, torch.bfloat16)
    opts = train_wan_lora.parse_options(train_wan_lora.Options, ["--lora_target", "all-linear", *flags.split()])
    torch.manual_seed(0)
    memory = replace(
        opts.memory(hold_as("auto", torch.device("cpu")), compiled=False),
        fuse=True,
        stream=torch.bfloat16,
    )
    adapter = prepare(model, memory, plan_adapter(opts, build_transformer(files)).attach)
    parameters = adapter.parameters.values()
    updater = updater_of(parameters, OptimizerSpec(1e-3, 0.0, "constant", 0, 3))
    negative = torch.randn(3, TINY_SHAPE.text_dim) if opts.distill_cfg else None
    sample = batch if opts.control_lora else Batch(batch.latents, Cond(batch.cond.text))
    for _ in range(3):
        loss = train_wan_lora.training_loss(sample, opts, (0.0, 1.0), model, negative).value
        loss.backward()
        assert loss.dtype == torch.float32 and updater.step(1.0).isfinite()
    assert all(parameter.dtype == torch.float32 and parameter.abs().max() > 0 for parameter in parameters)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            islands = is_fp32(name.replace(".base_layer", ""))
            assert parameter.dtype == (torch.float32 if islands else torch.bfloat16), name


def test_the_same_seed_gives_the_same_lora_whatever_the_workers_the_previews_and_the_checkpoints(work):
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 96 --token_limit 60 --batch_size 2"
    flags += " --max_train_steps 3 --val_samples 1 --learning_rate 1e-3 --random_frame_length --gradient_accumulation 2"
    previews = "--sample_prompts fox --sample_every 1 --sample_steps 2"
    runs = {
        "a": "--num_workers 0",
        "b": f"--num_workers 2 --val_steps 1 --checkpointing_steps 1 --keep_checkpoints 1 {previews}",
        "c": "--num_workers 0 --seed 7 --max_train_steps 1",
    }
    results = []
    for name, more in runs.items():
        train_wan_lora.main([*flags.split(), *more.split(), "--output_dir", name])
        (path,) = Path(name).glob("*/checkpoints/wan-lora-*.safetensors")
        results.append(read_lora(path).pairs)
    first, second, other = results
    assert all(torch.equal(first[name].up, second[name].up) for name in first)
    assert all(torch.equal(first[name].down, second[name].down) for name in first)
    assert not any(torch.equal(first[name].down, other[name].down) for name in first)


def test_previews_show_the_same_prompts_from_the_same_noise_until_the_lora_has_learned(work, monkeypatch):
    Path("prompts.txt").write_text("a red fox\n\na blue house\n", encoding="utf-8")
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --val_samples 0"
    flags += " --max_train_steps 3 --learning_rate 1e-2 --lora_target all-linear --num_workers 0"
    flags += " --sample_prompts prompts.txt --sample_every 2 --sample_steps 2 --sample_guidance 2"
    shown = []
    log_previews = Metrics.log_previews

    def watched(run: Metrics, videos: list[tuple[str, torch.Tensor]], fps: float) -> None:
        shown.append(videos)
        log_previews(run, videos, fps)

    monkeypatch.setattr(Metrics, "log_previews", watched)
    train_wan_lora.main([*flags.split(), "--output_dir", "plain"])
    train_wan_lora.main([*flags.split(), "--max_train_steps", "1", "--output_dir", "again"])
    first, second, last, repeated, _ = shown
    for (prompt, frames), (_, later), (_, latest), (_, same) in zip(first, second, last, repeated, strict=True):
        assert frames.shape == (13, 3, 48, 80) and torch.equal(frames, same), prompt
        assert not torch.equal(frames, later) and not torch.equal(later, latest)
    assert [prompt for prompt, _ in first] == ["a red fox", "a blue house"]
    assert not torch.equal(first[0][1], first[1][1])


def test_the_previews_of_a_control_lora_follow_the_validation_clips(work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --control_lora"
    flags += " --max_train_steps 1 --val_samples 0 --num_workers 0 --sample_prompts fox --sample_steps 1"
    flags += " --distill_cfg 1"
    train_wan_lora.main([*flags.split(), "--output_dir", "runs"])
    (folder,) = Path("runs").iterdir()
    names = ["00000000-01.mp4", "00000000.png", "00000001-01.mp4", "00000001.png"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == names
    info = probe(folder / "samples" / names[0])
    assert (info.width, info.height, info.fps) == (2 * 80, 48, 16)
    assert len(EventAccumulator(str(folder)).Reload().Images("samples")) == 2


def test_training_continues_where_a_preview_cannot_be_written(work, monkeypatch, capsys):
    def refused(path: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("utils.runs.metrics.write_video", refused)
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --val_samples 0"
    flags += " --max_train_steps 1 --num_workers 0 --sample_prompts fox --sample_steps 1"
    train_wan_lora.main([*flags.split(), "--output_dir", "runs"])
    assert len(list(Path("runs").glob("*/checkpoints/wan-lora-*.safetensors"))) == 1
    assert "step 1: cannot write previews to" in capsys.readouterr().out


RESUMED = (
    "--dataset clips --pretrained_model_name_or_path model --base_res 64 96 --token_limit 60 --random_frame_length "
    "--max_train_steps 6 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 2 --gradient_accumulation 3 "
    "--val_samples 1 --val_steps 2 --ema_decay 0.9 --caption_dropout 0.3 --repeats 1.5"
)


@pytest.mark.parametrize(
    "more", ["--num_workers 0", "--num_workers 2 --cache_latents 2", "--num_workers 0 --adapter_dtype bf16"]
)
def test_a_resumed_run_ends_where_an_unbroken_one_does_bit_for_bit(work, more):
    flags = [*RESUMED.split(), *more.split(), "--checkpointing_steps", "2"]
    train_wan_lora.main([*flags, "--output_dir", "runs"])
    (run,) = Path("runs").iterdir()
    straight = Path(shutil.move(run / "checkpoints" / "state-00000006.safetensors", "straight.safetensors"))
    for path in (run / "checkpoints").glob("*-00000006*"):
        path.unlink()
    train_wan_lora.main([*flags, "--output_dir", "runs", "--resume_from_checkpoint", "latest"])
    first, second = (read_tensors(path)[0] for path in (straight, run / "checkpoints" / "state-00000006.safetensors"))
    assert first.keys() == second.keys() and any("/ema/" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list(Path("runs").iterdir())) == 1


def test_a_lora_in_bf16_is_trained_averaged_written_and_started_from(work, capsys):
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --val_samples 0"
    flags += " --num_workers 0 --adapter_dtype bf16 --learning_rate 1e-3 --ema_decay 0.9 --control_lora"
    train_wan_lora.main([*flags.split(), "--max_train_steps", "12", "--output_dir", "first"])
    assert "alpha 16, bf16" in capsys.readouterr().out
    (folder,) = Path("first").glob("*/checkpoints")
    (lora, average), (state,) = sorted(folder.glob("wan-lora-*")), folder.glob("state-*")
    if lora.stem.endswith("-ema"):
        lora, average = average, lora
    tensors = read_tensors(state)[0]
    for path, dtype, kind in ((lora, torch.bfloat16, "parameters"), (average, torch.float32, "ema")):
        for name, pair in read_lora(path).pairs.items():
            for matrix, value in (("lora_A", pair.down), ("lora_B", pair.up)):
                saved = tensors[f"trainables/lora/{kind}/{name}.{matrix}.default.weight"]
                assert value.dtype == dtype and torch.equal(value, saved) and value.any()
    rests = [tensor for name, tensor in tensors.items() if name.endswith("/compensation")]
    assert rests and all(rest.dtype == torch.bfloat16 and rest.any() for rest in rests)

    # A rate of 1e-9 moves no value that bf16 can hold, except those of zero.
    more = ["--max_train_steps", "1", "--learning_rate", "1e-9", "--init_lora", str(lora), "--output_dir", "second"]
    train_wan_lora.main([*flags.split(), *more])
    (again,) = (path for path in Path("second").glob("*/checkpoints/wan-lora-*") if not path.stem.endswith("-ema"))
    first, second = read_lora(lora).pairs, read_lora(again).pairs
    assert all(torch.allclose(first[name].up, second[name].up, rtol=0, atol=2e-9) for name in first)


def test_a_run_in_bf16_is_not_resumed_in_fp32(work):
    flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --val_samples 0"
    flags += " --num_workers 0 --max_train_steps 1 --output_dir runs"
    train_wan_lora.main([*flags.split(), "--adapter_dtype", "bf16"])
    resumed = [*flags.split(), "--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    with pytest.raises(UserError, match="--adapter_dtype was bf16, is fp32"):
        train_wan_lora.main(resumed)
    with pytest.raises(UserError, match="--adapter_dtype must be the one it was saved with"):
        train_wan_lora.main([*resumed, "--allow_changes"])


def test_no_loading_process_is_left_while_an_interrupted_run_is_saved(work, monkeypatch):
    """What dies while a checkpoint is saved, or after that, would end the run with an error."""
    children: list[int] = []
    loss, save = train_wan_lora.training_loss, Run.save

    def stopping(*args, **others):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(train_wan_lora, "training_loss", loss)
        return loss(*args, **others)

    def watched(run: Run) -> list[Path]:
        children.append(len(multiprocessing.active_children()))
        return save(run)

    monkeypatch.setattr(train_wan_lora, "rehearse_run", lambda *_: None)
    monkeypatch.setattr(train_wan_lora, "training_loss", stopping)
    monkeypatch.setattr(Run, "save", watched)
    with pytest.raises(KeyboardInterrupt):
        flags = "--dataset clips --pretrained_model_name_or_path model --base_res 64 --token_limit 60 --val_samples 0"
        train_wan_lora.main(f"{flags} --num_workers 1 --max_train_steps 9".split())
    assert children == [0]

"""Bad datasets, caches, states and disks: each is reported by its own message, soon, and nothing is damaged."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import train_wan_lora
from tests.checkout import copy_prompts
from tests.media import image, video
from tests.tiny import write_model
from utils.common.digests import DIGESTS
from utils.common.errors import UserError
from utils.common.options import run_script
from wan.checkpoints import TRANSFORMER, CheckpointError

MODEL = "--pretrained_model_name_or_path model --base_res 64 --token_limit 60 --num_workers 0 --val_samples 0"
RUN = f"--dataset clips {MODEL} --max_train_steps 2 --learning_rate 1e-3"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A model, a dataset, and a finished run of two steps on it."""
    folder = tmp_path_factory.mktemp("template")
    write_model(folder / "model")
    for name in ("fox", "hare"):
        video(folder / "clips" / f"{name}.mp4", frames=9, caption=f"a {name}")
    copy_prompts(folder / "embeddings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("utils.encoding.text.EMBEDDINGS", folder / "embeddings")
        train_wan_lora.main(f"{RUN} --checkpointing_steps 1".split())
    (run,) = (folder / "outputs").iterdir()
    run.rename(folder / "outputs" / "run")
    return folder


@pytest.fixture
def work(template, tmp_path, monkeypatch) -> Path:
    shutil.copytree(template, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", tmp_path / "work" / "embeddings")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written(name: str, content: str | bytes) -> Change:
    def change(work: Path) -> None:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def cut(name: str) -> Change:
    return lambda work: (work / name).write_bytes((work / name).read_bytes()[:700])


def removed(name: str) -> Change:
    return lambda work: (work / name).unlink()


def linked(name: str, target: str) -> Change:
    return several(removed(name), lambda work: (work / name).symlink_to(target))


def clip(name: str, **how) -> Change:
    return lambda work: video(work / name, **how)


def picture(name: str, **how) -> Change:
    return lambda work: image(work / name, **how)


def several(*changes: Change) -> Change:
    return lambda work: [change(work) for change in changes]


def another_base(work: Path) -> None:
    path = work / "model" / TRANSFORMER
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def config(text: str) -> Change:
    return written("sets.toml", text)


STATE = "outputs/run/checkpoints/state-00000002.safetensors"
LORA = "outputs/run/checkpoints/wan-lora-00000002.safetensors"
SETS = f"--dataset_config sets.toml {MODEL}"
AGAIN = f"{RUN} --resume_from_checkpoint"
NOTHING: Change = lambda work: None  # noqa: E731

FILES = [
    (cut("clips/fox.mp4"), RUN, "clips/fox.mp4: not a readable video"),
    (written("clips/fox.mp4", b""), RUN, "clips/fox.mp4: the file is empty"),
    (written("clips/fox.mp4", b"text"), RUN, "not a readable video"),
    (several(written("clips/a.png", b"text"), written("clips/a.txt", "a")), RUN, "clips/a.png: not a readable image"),
    (clip("clips/b.mp4", frames=3), RUN, "clips/b.mp4: it has 3 frames: a video needs at least 5"),
    (picture("clips/fox.png"), RUN, "another file in its folder is named fox too"),
    (several(written("clips/c.mp4", b"")), RUN, "1 file cannot be used"),
]
CAPTIONS = [
    (removed("clips/fox.txt"), RUN, "clips/fox.mp4: it has no caption: write one to fox.txt beside it"),
    (written("clips/fox.txt", " \n"), RUN, "its caption in fox.txt is empty"),
    (written("clips/fox.txt", "caf\xe9".encode("latin-1")), RUN, "its caption fox.txt is not UTF-8 text"),
    (
        written("clips/captions/fox.txt", "another"),
        RUN,
        "it has different captions in clips/fox.txt and captions/fox.txt",
    ),
    (written("clips/captions.txt", "one line"), RUN, "clips/captions.txt: it has 1 lines for 2 media files"),
    (written("clips/fox.txt", "\u200b\u3164"), RUN, "its caption in fox.txt is empty, its characters are invisible"),
    (linked("clips/fox.txt", "fox.txt"), RUN, "clips/fox.mp4: its caption fox.txt cannot be read: Too many levels"),
    (written("clips/metadata.json", "{"), RUN, "clips/metadata.json: it is not valid JSON"),
    (written("clips/metadata.jsonl", '{"video": "fox.mp4"}'), RUN, "line 1 needs a file name"),
    (
        written("clips/metadata.csv", "video,text\n../x.mp4,fox"),
        RUN,
        "line 2 names ../x.mp4, which is not a media file",
    ),
    (written("clips/metadata.csv", "video,text\nfox.mp4,a fox, fast"), RUN, "line 2 has more columns than the header"),
    (written("clips/metadata.json", '[{"video": "fox.mp4", "text": ["a", "b"]}]'), RUN, "pass --caption_per_line"),
    (written("clips/fox.txt", "a fox".encode("utf-16-le")), RUN, "its caption fox.txt is not UTF-8 text"),
    (NOTHING, f"{RUN} --captions nowhere", "--captions must be one of files, filename, not 'nowhere'"),
]
COMPANIONS = [
    (NOTHING, f"{RUN} --load_mask", "clips/fox.mp4: it has no mask named fox_mask.*"),
    (NOTHING, f"{RUN} --mask_folder nowhere", "nowhere does not exist"),
    (NOTHING, f"{RUN} --load_mask --mask_suffix=", "the mask suffix is empty"),
    (NOTHING, f"{RUN} --control_folder clips", "--control_folder requires --control_lora"),
    (
        clip("clips/stray_mask.mp4", caption=None),
        f"{RUN} --load_mask",
        "stray_mask.mp4: there is no clip for this mask",
    ),
    (
        clip("clips/fox_mask.mp4", frames=9, size=(48, 64), caption=None),
        f"{RUN} --load_mask",
        "its mask fox_mask.mp4: its aspect ratio differs: 48x64 and 64x48",
    ),
    (
        clip("clips/fox_mask.mp4", frames=9, fps=30, caption=None),
        f"{RUN} --load_mask",
        "its mask fox_mask.mp4: it has 30 frames per second, not 16",
    ),
    (
        picture("clips/fox_control.png", caption=None),
        f"{RUN} --control_lora --load_control",
        "must be a video, like the file itself",
    ),
]
CONFIGS = [
    (NOTHING, SETS, "cannot read the config file sets.toml"),
    (config("[[dataset]\n"), SETS, "sets.toml is not a valid TOML file"),
    (
        config('[[dataset]]\npath = "C:\\Users\\fox"\n'),
        SETS,
        "write 'C:\\Users\\fox' in single quotes, or \"C:/Users/fox\"",
    ),
    (config('[[dataset]]\npath = "C:\\tmp"\n'), SETS, "write 'C:\\tmp' in single quotes, or \"C:/tmp\""),
    (config("x = 1"), SETS, "unknown option 'x' in sets.toml"),
    (config(""), SETS, "sets.toml has no [[dataset]] table"),
    (config('dataset = ["clips"]'), SETS, "sets.toml has no [[dataset]] table"),
    (config("[[dataset]]\nrepeats = 2"), SETS, "[[dataset]] 1 of sets.toml needs a path"),
    (
        config('[[dataset]]\npath = "clips"\nrepeat = 2'),
        SETS,
        "unknown option 'repeat' in [[dataset]] 1 of sets.toml; did you",
    ),
    (
        config('[[dataset]]\npath = "clips"\nrepeats = 0'),
        SETS,
        "[[dataset]] 1 of sets.toml: --repeats must be at least",
    ),
    (config('[[dataset]]\npath = "clips"\nfps = "often"'), SETS, "--fps must be native, auto or a number"),
    (written("run.toml", '[dataset]\npath = "clips"'), f"--config run.toml {MODEL}", "with two brackets on each side"),
    (written("run.toml", "debug = true"), f"--config run.toml {RUN}", "unknown option 'debug' in run.toml"),
    (config('[[dataset]]\npath = "nowhere"'), SETS, "nowhere does not exist"),
    (config('[[dataset]]\npath = "clips"\nload_control = true'), SETS, "require --control_lora (folder clips)"),
    (config('[[dataset]]\npath = "clips"'), f"{SETS} --dataset clips", "give one of them"),
    (NOTHING, f"{RUN} --buckets coarse", "--buckets must be one of wan, fine"),
    (
        NOTHING,
        f"{RUN} --frame_sampling some",
        "--frame_sampling must be one of random, head, middle, uniform, chunks, slide",
    ),
    (NOTHING, f"{RUN} --cache_only", "--cache_only requires --cache_latents"),
    (NOTHING, f"{RUN} --caption_dropout 2", "--caption_dropout must be at most 1"),
    (NOTHING, f"{RUN} --overlap_encoding", "--overlap_encoding needs a CUDA GPU: leave it out"),
    (NOTHING, f"{RUN} --overlap_encoding --cache_latents", "--overlap_encoding has no effect with --cache_latents"),
    (NOTHING, f"{RUN} --fps auto --max_frame_stride 7", "--max_frame_stride has no effect with this --fps"),
    (NOTHING, f"{RUN} --min_ar 0.7", "--min_ar requires --buckets fine"),
    (NOTHING, f"{RUN} --mask_suffix _m", "--mask_suffix requires --load_mask"),
    (NOTHING, f"{RUN} --mask_floor 0.5", "--mask_floor requires masks"),
    (
        NOTHING,
        f"{RUN} --captions filename --caption_per_line",
        "--caption_per_line has no effect with --captions filename",
    ),
    (NOTHING, f"{RUN} --cache_embeddings --cache_latents", "stops after the texts, before --cache_latents"),
    (
        config('[[dataset]]\npath = "clips"\nmin_ar = 0.7'),
        SETS,
        "[[dataset]] 1 of sets.toml: --min_ar requires --buckets fine",
    ),
]
STATES = [
    (another_base, f"{AGAIN} latest", "the base model's transformer has another content: its hash was "),
    (NOTHING, f"{AGAIN} nowhere", "there is no usable training state in nowhere"),
    (lambda work: shutil.rmtree(work / "outputs"), f"{AGAIN} latest", "there is no usable training state in outputs"),
    (cut(STATE), f"{AGAIN} {STATE}", "state-00000002.safetensors is not a whole training state"),
    (NOTHING, f"{AGAIN} clips/fox.mp4", "clips/fox.mp4 is not a whole training state"),
    (
        NOTHING,
        f"{AGAIN} {LORA}",
        "wan-lora-00000002.safetensors is a LoRA, and a run resumes from a state: give ",
    ),
    (
        lambda work: shutil.copy(work / STATE, work / "state-00000002.safetensors"),
        f"{AGAIN} state-00000002.safetensors",
        "must be in the checkpoints folder of its run",
    ),
    (
        NOTHING,
        f"{AGAIN} latest --max_train_steps 1 --allow_changes",
        "is of step 2, past the 1 step of this run: raise --max_train_steps",
    ),
    (clip("clips/fox.mp4", frames=9, darkest=90, caption="a fox"), f"{AGAIN} latest", "clip clips/fox.mp4 has changed"),
    (NOTHING, f"{AGAIN} latest --learning_rate 1e-2", "--learning_rate was 0.001, is 0.01"),
    (NOTHING, f"{AGAIN} latest --lora_rank 4 --allow_changes", "is of another adapter: rank and targets"),
    (written("clips/fox.txt", "a red fox"), f"{AGAIN} latest", "clip clips/fox.mp4 has changed"),
    (clip("clips/owl.mp4", frames=9), f"{AGAIN} latest", "clip clips/owl.mp4 is new"),
    (several(removed("clips/hare.mp4"), removed("clips/hare.txt")), f"{AGAIN} latest", "clip clips/hare.mp4 is gone"),
    (NOTHING, f"{RUN} --allow_changes", "--allow_changes requires --resume_from_checkpoint"),
]


@pytest.mark.parametrize(("change", "arguments", "message"), FILES + CAPTIONS + COMPANIONS + CONFIGS + STATES)
def test_bad_input_is_reported_and_nothing_is_damaged(work, capsys, change, arguments, message):
    change(work)
    before, begun = contents(work), time.monotonic()
    code = run_script(partial(train_wan_lora.main, arguments.split()), bad_input=(CheckpointError,))
    said = capsys.readouterr().err
    assert code == 2 and message in said and "Traceback" not in said
    assert time.monotonic() - begun < 20
    after = contents(work)
    assert {path: digest for path, digest in after.items() if path in before} == before


def test_the_newest_complete_state_is_resumed_and_broken_ones_are_reported(work, capsys):
    cut(STATE)(work)
    train_wan_lora.main(f"{AGAIN} latest".split())
    said = capsys.readouterr().out
    assert "skipped: " in said and "state-00000002.safetensors is not a whole" in said
    assert "resuming outputs/run at step 1 of 2\n" in said and (work / STATE).stat().st_size > 700
    train_wan_lora.main(f"{AGAIN} latest".split())
    assert "resuming outputs/run at step 2 of 2: nothing is left to train\n" in capsys.readouterr().out


def test_changes_are_listed_and_applied_if_they_are_allowed(work, capsys):
    train_wan_lora.main(f"{AGAIN} latest --max_train_steps 3 --allow_changes".split())
    said = capsys.readouterr().out
    assert "resuming with changes:\n  --max_train_steps was 2, is 3" in said
    assert (work / "outputs" / "run" / "checkpoints" / "wan-lora-00000003.safetensors").exists()
    assert json.loads((work / "outputs" / "run" / "command_args-00000002.json").read_text())["max_train_steps"] == 3


@pytest.mark.parametrize("kind", ["state", "wan-lora"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_while_saving_leaves_the_last_state_intact(work, capsys, monkeypatch, kind, error):
    def full(tensors: object, path: Path, **facts: object) -> None:
        if kind in path.name:
            raise error
        save_file(tensors, path, **facts)

    monkeypatch.setattr("utils.common.tensor_files.save_file", full)
    before = contents(work / "outputs")
    code = run_script(partial(train_wan_lora.main, f"{AGAIN} latest --max_train_steps 3 --allow_changes".split()))
    said = capsys.readouterr().err
    assert code == 1 and "cannot write a checkpoint" in said and "No space left on device" in said
    after = contents(work / "outputs")
    assert all(after[path] == digest for path, digest in before.items() if "events" not in path)


def test_a_zeroed_text_encoder_stops_the_run_at_once(work, capsys, monkeypatch):
    from wan.modules.t5 import TextEncoder

    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: [torch.zeros(3, 32) for _ in texts])
    shutil.rmtree(work / "clips" / ".wan_cache")
    code = run_script(partial(train_wan_lora.main, RUN.split()))
    assert (
        code == 2
        and "have the same embedding: the text encoder model/models_t5_umt5-xxl-enc-bf16.pth is damaged"
        in capsys.readouterr().err
    )


def test_checking_the_dataset_loads_no_model_and_trains_nothing(work, capsys, monkeypatch):
    monkeypatch.setattr(train_wan_lora, "load_experts", None)
    before = contents(work)
    train_wan_lora.main(f"{RUN} --check_dataset".split())
    said = capsys.readouterr().out
    assert "fox.mp4" in said and "status" in said and contents(work) == before
    assert "an epoch has 2 samples in 2 batches" in said
    # 2 clips of 48x48x9, each of 16 channels of 3 * 6 * 6 latents in fp32
    assert "on disk: --cache_latents N takes N times 0.01 MB, each of 2 texts at most 4.19 MB" in said


def test_checking_the_dataset_names_captions_that_are_too_long_if_there_is_a_tokenizer(work, capsys):
    written("clips/fox.txt", "a fox " * 30)(work)
    train_wan_lora.main(f"{RUN} --check_dataset".split())
    cut = "text: the caption of fox.mp4 has 151 tokens, but the model reads 64: the rest has no effect"
    assert cut in capsys.readouterr().out
    shutil.rmtree(work / "model")
    train_wan_lora.main("--dataset clips --base_res 64 --check_dataset".split())
    assert "tokens, but" not in capsys.readouterr().out


def test_held_out_clips_are_in_the_table_and_have_the_same_limits(work, capsys):
    video(work / "clips" / "val" / "owl.mp4", frames=9)
    train_wan_lora.main(f"{RUN} --check_dataset".split())
    assert re.search(r"owl\.mp4 .* held out, ok", capsys.readouterr().out)
    video(work / "clips" / "val" / "large.mp4", frames=9, size=(64, 64))
    code = run_script(partial(train_wan_lora.main, f"{RUN} --token_limit 12 --check_dataset".split()))
    assert code == 2 and "clips/val/large.mp4: one frame of 64x64 takes 16 tokens" in capsys.readouterr().err


def test_a_dataset_can_be_checked_before_a_released_model_is_downloaded(work, capsys):
    shutil.rmtree(work / "model")
    train_wan_lora.main("--dataset clips --base_res 64 --check_dataset".split())
    assert "an epoch has 2 samples" in capsys.readouterr().out


def test_the_doctor_prints_versions_and_stops(work, capsys):
    with pytest.raises(UserError, match=r"^no model at Wan-AI/Wan2\.1-T2V-1\.3B(.|\n)*download it with: "):
        train_wan_lora.main(["--doctor"])
    said = capsys.readouterr().out
    assert "python" in said and "torch" in said and "attention" in said and "cannot be used" in said


def test_several_folders_are_trained_on_each_with_its_own_rules(work, capsys):
    video(work / "more" / "owl.mp4", frames=40, caption="an owl")
    config(
        '[[dataset]]\npath = "clips"\nrepeats = 2\ncaption_prefix = "kelo, "\n'
        '[[dataset]]\npath = "more"\nframe_sampling = "chunks"\nbase_res = [32]\n'
    )(work)
    train_wan_lora.main(f"{SETS} --max_train_steps 1 --check_dataset".split())
    said = capsys.readouterr().out
    assert "kelo, a fox" in said and "an owl" in said
    train_wan_lora.main(f"{SETS} --max_train_steps 1 --output_dir new".split())
    assert len(list((work / "new").glob("*/checkpoints/wan-lora-*"))) == 1


def test_the_config_file_may_also_hold_the_folders(work, capsys):
    written("run.toml", 'max_train_steps = 1\nval_samples = 0\n[[dataset]]\npath = "clips"\nrepeats = 3\n')(work)
    options = MODEL.replace("--val_samples 0", "")
    train_wan_lora.main(f"--config run.toml {options} --output_dir new".split())
    assert "2 clips in 1 bucket, 6 steps per epoch; 1 step of training" in capsys.readouterr().out


def test_start_pictures_are_reported_where_they_are_not_used_and_listed_where_they_are(work, capsys):
    for name in ("fox", "hare"):
        image(work / "clips" / f"{name}_first.png", caption=None)
    train_wan_lora.main(f"{RUN} --check_dataset".split())
    said = capsys.readouterr().out
    assert "2 start pictures such as fox_first.png are not used: see --load_first_frame" in said
    assert "an epoch has 2 samples" in said
    given = "--dataset clips --base_res 64 --pretrained_model_name_or_path Wan-AI/Wan2.2-TI2V-5B --load_first_frame"
    train_wan_lora.main(f"{given} --check_dataset".split())
    said = capsys.readouterr().out
    assert "begins with fox_first.png" in said and "not used" not in said and "an epoch has 2 samples" in said
    image(work / "clips" / "hare_first.png", caption=None, size=(64, 64))
    code = run_script(partial(train_wan_lora.main, f"{given} --check_dataset".split()))
    assert code == 2 and "its start picture hare_first.png: its aspect ratio differs" in capsys.readouterr().err


def test_the_table_shows_how_many_frames_the_limits_leave(work, capsys):
    video(work / "clips" / "owl.mp4", frames=33)
    train_wan_lora.main(f"{RUN} --max_frames 2 --max_duration 1 --check_dataset".split())
    said = capsys.readouterr().out
    assert "--max_frames 2: 5 frames, as the model takes 4n + 1" in said
    assert re.search(r"fox\.mp4 .* 9 -> 5 .* ok", said) and re.search(r"owl\.mp4 .* 33 -> 5 .* used up to 1 s", said)
    train_wan_lora.main(f"{RUN} --max_duration 0.5 --token_limit 500 --fps 8 --check_dataset".split())
    assert re.search(r"owl\.mp4 .* 33 -> 5 .* used up to 0.5 s", capsys.readouterr().out)

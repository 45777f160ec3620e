"""What the LoRA files of a run tell others: a name, a picture, the trigger; and no path or prompt unless asked to."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import convert_lora_to_comfy
import train_wan_lora
from tests.checkout import ROOT, copy_prompts, run, write_checkout
from tests.loras import half, written
from tests.model_lists import Entry, a1111, comfyui, header_of, lora_manager, swarmui
from tests.tiny import write_clips
from utils.common.tensor_files import read_tensors
from utils.runs.session import Session

PROMPT, WORD, PREFIX = "a zebra plays chess", "ohwx", "kelo, "
SMALL = "--base_res 64 --max_frames 5 --token_limit 40 --num_workers 0 --val_samples 0 --learning_rate 1e-3"
STEPS = "--max_train_steps 3 --checkpointing_steps 1 --sample_every 2 --sample_steps 2 --ema_decay 0.9"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A checkout with the model that ships with the project, and clips elsewhere."""
    folder = write_checkout(tmp_path_factory.mktemp("secret place"))
    shutil.copytree(ROOT / "nano" / "model", folder / "nano" / "model")
    write_clips(folder / "elsewhere" / "foxes")
    return folder


def flags(work: Path, *more: str) -> list[str]:
    """A run whose paths are absolute, with prompts."""
    paths = {"dataset": work / "elsewhere" / "foxes", "cache_dir": work / "caches", "output_dir": work / "runs"}
    paths |= {"pretrained_model_name_or_path": work / "nano" / "model"}
    given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    given += ["--sample_prompts", PROMPT, "--caption_prefix", PREFIX]
    return [*given, *SMALL.split(), *STEPS.split(), *more]


@pytest.fixture(scope="module")
def standard(work) -> Path:
    """The checkpoints of a run with a name and a trigger."""
    run("train_wan_lora.py", *flags(work), "--name", "red-fox", "--trigger", WORD, cwd=work)
    (folder,) = (work / "runs").glob("*/checkpoints")
    return folder


def test_the_files_have_the_name_and_no_path_prompt_or_caption(work, standard):
    files = sorted(standard.glob("red-fox*"))
    assert [file.stem for file in files] == [
        f"red-fox-0000000{step}{kind}" for step in (1, 2, 3) for kind in ("-ema", "")
    ]
    captions = [file.read_text() for file in (work / "elsewhere").rglob("*.txt")]
    secrets = [str(work), work.name, work.parent.name, str(Path.home()), PROMPT, "zebra", PREFIX.strip(), *captions]
    for file in files:
        metadata, _ = header_of(file)
        text = json.dumps(metadata, ensure_ascii=False)
        assert not [secret for secret in secrets if secret in text]
        assert not re.search(r'[" :](?:/|[A-Za-z]:\\)', text.replace("https://", ""))
        assert {"steps", "base_model", "shift", "rank", "alpha", "targets", "control"} <= metadata.keys()
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (metadata["rank"], metadata["alpha"])


def test_programs_that_list_models_show_the_checkpoints_of_a_run(standard):
    for step in (1, 2, 3):
        file = standard / f"red-fox-0000000{step}.safetensors"
        found = swarmui(file)
        assert found == comfyui(file)
        assert (found.title, found.words) == (f"red-fox, step {step}", (WORD,))
        assert found.base == "wan-2_1-text2video-1_3b/lora" and (found.picture is not None) == (step > 1)
        assert step == 1 or 16 <= min(found.picture) <= max(found.picture) <= 256
        assert a1111(file) == Entry(file.stem, "model", (WORD,))
        assert lora_manager(file) == Entry(file.stem, "Wan Video 1.3B t2v", (WORD,))
        assert comfyui(file.with_stem(f"{file.stem}-ema")).picture is None
    metadata, _ = header_of(file)
    assert json.loads(metadata["ss_tag_frequency"]) == {"foxes": {WORD: 5}}
    assert metadata["modelspec.date"] == standard.parent.name[:10]


def test_the_picture_is_that_of_the_steps_own_preview(standard):
    pictures = [header_of(standard / f"red-fox-0000000{step}.safetensors")[0]["modelspec.thumbnail"] for step in (2, 3)]
    assert pictures[0] != pictures[1] and (standard.parent / "samples" / "00000002.png").exists()


def test_full_metadata_has_all_options_with_their_paths_and_prompts(work):
    run("train_wan_lora.py", *flags(work, "--output_dir", str(work / "full"), "--metadata", "full"), cwd=work)
    files = list((work / "full").glob("*/checkpoints/wan-lora*"))
    assert len(files) == 6
    for file in files:
        metadata, _ = header_of(file)
        options = json.loads(metadata["options"])
        assert options["dataset"] == str(work / "elsewhere" / "foxes") and options["sample_prompts"] == PROMPT
        assert not {"modelspec.trigger_phrase", "trained_words", "ss_tag_frequency"} & metadata.keys()


def test_a_converted_file_has_the_options_of_its_run_only_if_asked_for(tmp_path, capsys):
    """Earlier versions wrote them into every file, and the path of the base model too."""
    private = {"options": json.dumps({"sample_prompts": PROMPT, "fuse_lora": "/srv/me/style.safetensors"})}
    private |= {"base_model": "/srv/me/Wan2.1-T2V-1.3B"}
    source = written(tmp_path / "fox.safetensors", half("diffusion_model.blocks.0.self_attn.q"), private)
    said = "metadata  without the options of its run and the path of its base: --metadata full keeps them"
    for flags, count in (([], 1), (["--metadata", "full"], 0)):
        output = tmp_path / f"comfy{count}.safetensors"
        convert_lora_to_comfy.main(["--input_lora", str(source), "--output_lora", str(output), *flags])
        metadata, _ = header_of(output)
        assert capsys.readouterr().out.count(said) == count and ("srv" in str(metadata)) == (PROMPT in str(metadata))
        assert metadata == private if not count else metadata.keys() == {"base_model", "fused_lora"}
    convert_lora_to_comfy.main(["--input_lora", str(output)])
    assert "nothing to do" not in capsys.readouterr().out  # its metadata change
    assert header_of(tmp_path / "comfy0_comfy.safetensors")[0]["base_model"] == "Wan2.1-T2V-1.3B"


def test_the_options_of_a_run_are_kept_beside_its_files(work, standard):
    options = json.loads((standard.parent / "command_args.json").read_text())
    assert options["sample_prompts"] == PROMPT and options["output_dir"] == str(work / "runs")


def test_a_converted_file_says_the_same_with_the_hash_of_its_own_content(standard, tmp_path, capsys):
    source, output = standard / "red-fox-00000003.safetensors", tmp_path / "fox.safetensors"
    for message in ("wrote", "nothing to do"):
        convert_lora_to_comfy.main(
            ["--input_lora", str(source), "--output_lora", str(output), "--dtype", "bf16", "--to", "kohya"]
        )
        assert message in capsys.readouterr().out
    (before, _), (after, content) = header_of(source), header_of(output)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"modelspec.hash_sha256", "ss_output_name"} and before.keys() == after.keys()
    assert after["ss_output_name"] == "fox"
    assert after["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content).hexdigest()
    convert_lora_to_comfy.main(["--input_lora", str(source)])
    assert "nothing to do: the file already has the layout comfy" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError], ids=lambda error: error.__name__)
def test_a_checkpoint_is_written_where_its_preview_fails_and_the_run_continues_from_it(
    work, standard, tmp_path, monkeypatch, error
):
    monkeypatch.chdir(work)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", copy_prompts(tmp_path / "embeddings"))
    threads, show = torch.get_num_threads(), Session.show

    def interrupted(session, preview):
        if session.learner.step == 2:
            raise error
        return show(session, preview)

    arguments = flags(work, "--output_dir", str(tmp_path / "broken"), "--name", "red-fox", "--trigger", WORD)
    torch.set_num_threads(1)  # as in the process
    with monkeypatch.context() as patch:
        patch.setattr(Session, "show", interrupted)
        with pytest.raises(error):
            train_wan_lora.main(arguments)
    (folder,) = (tmp_path / "broken").glob("*/checkpoints")
    assert max(path.name for path in folder.glob("state-*")) == "state-00000002.safetensors"
    assert comfyui(folder / "red-fox-00000002.safetensors").picture is None
    train_wan_lora.main([*arguments, "--resume_from_checkpoint", str(folder.parent)])
    torch.set_num_threads(threads)
    assert (folder.parent / "samples" / "00000002.png").exists()
    for name in ("red-fox-00000003.safetensors", "red-fox-00000003-ema.safetensors", "red-fox-00000002.safetensors"):
        (found, said), (expected, there) = read_tensors(folder / name), read_tensors(standard / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        left_out = {"modelspec.date"} | ({"modelspec.thumbnail"} if "00000002" in name else set())
        differing = {key for key in there if said.get(key) != there[key]}
        assert differing <= left_out

"""A LoRA that was trained on top of another is sampled on top of it, wherever that file is now, or not in silence."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import test_wan_control_lora
import train_wan_lora
from tests.adapted import ALPHA, RANK, fill
from tests.checkout import copy_prompts
from tests.loras import metadata_of
from tests.tiny import tiny_shape, tiny_transformer, write_clips, write_model, write_transformer
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora import add_lora, extract_lora, select_modules, widen_patch_embedding
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import content_hash, fused_file, to_metadata
from utils.common.errors import UserError
from wan.checkpoints import open_model, transformer_fingerprint
from wan.configs import FAMILIES, Family

ONE, TWO = FAMILIES["wan2.1-t2v-1.3B"], FAMILIES["wan2.2-t2v-A14B"]
EXPERTS = ("high_noise", "low_noise")
SIZE = "--width 64 --height 48 --frames 5 --steps 2 --prompt cat --compare"
PARTS = "without the LoRA", "with the LoRA"


def draw_lora(path: Path, seed: int, metadata: dict[str, str] | None = None) -> Path:
    """A LoRA that changes a video a lot."""
    model = tiny_transformer()
    fill(add_lora(model, select_modules(model, ["self_attn.*"]), RANK, ALPHA), seed)
    write_lora(path, extract_lora(model, metadata or {}))
    return path


def train(model: str, fused: str, output: str, *more: str) -> Path:
    """A LoRA on top of another; the folder of its run."""
    flags = f"--dataset clips --pretrained_model_name_or_path {model} --base_res 64 --token_limit 60 --val_samples 0"
    flags += f" --num_workers 0 --learning_rate 0.02 --max_train_steps 2 --fuse_lora {fused} --output_dir {output}"
    train_wan_lora.main([*flags.split(), *more])
    (run,) = Path(output).iterdir()
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Path]:
    """Models with one transformer and with two, LoRAs for them, and LoRAs that were trained on top of those."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("utils.encoding.text.EMBEDDINGS", Path(copy_prompts(folder / "embeddings")))
        write_model(folder / "private" / "wan")
        write_model(folder / "private" / "pair", TWO)
        write_clips(folder / "clips")
        (folder / "loras").mkdir()
        draw_lora(Path("loras/style.safetensors"), 1)
        for seed, expert in enumerate(EXPERTS):
            draw_lora(Path(f"loras/pair_{expert}.safetensors"), 5 + seed)
        run = train("private/wan", "loras/style.safetensors", "runs", "--fuse_lora_weight", "0.5")
        run.rename("runs/one")
        run = train("private/pair", "loras/pair.safetensors", "pairs", "--expert_phase_steps", "1")
        run.rename("runs/two")
        yield folder


@pytest.fixture
def work(made, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", folder / "embeddings")
    return folder


Sampled = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def sample(monkeypatch) -> Sampled:
    """Videos by their labels, sampled by the test script with these options; the name of their file is a label too."""

    def run(flags: str) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        monkeypatch.setattr(
            test_wan_control_lora, "write", lambda _, stem, videos, *__: written.update(videos | {stem: torch.empty(0)})
        )
        test_wan_control_lora.main([*flags.split(), *SIZE.split()])
        return written

    return run


def by_hand(source: Path, folder: Path, *loras: tuple[str, Path, float], family: Family = ONE) -> Path:
    """A copy of a model with LoRAs in the weights of its experts."""
    shutil.copytree(source, folder)
    for seed, expert in enumerate(family.experts):
        model = tiny_transformer(tiny_shape(family), seed)
        for name, path, weight in loras:
            if name == expert.name:
                fuse_lora(model, read_lora(path), weight)
        write_transformer(folder / expert.folder, model, family=family)
    return folder


def stripped(path: Path, to: Path) -> Path:
    """The LoRA as a file that knows nothing of what it was trained on."""
    lora = read_lora(path)
    write_lora(to, replace(lora, metadata={key: lora.metadata[key] for key in lora.metadata.keys() & {"expert"}}))
    return to


LORA = Path("runs/one/checkpoints/wan-lora-00000002.safetensors")


def expected(work: Path, sample: Sampled, *fused: tuple[str, Path, float]) -> dict[str, Tensor]:
    """What the LoRA gives on a base that has others in its weights."""
    base = by_hand(work / "private" / "wan", work / "by_hand", *fused)
    plain = stripped(LORA, work / "plain.safetensors")
    return sample(f"--lora_path {plain} --pretrained_model_name_or_path {base}")


def assert_same(found: dict[str, Tensor], videos: dict[str, Tensor]) -> None:
    for part in PARTS:
        assert torch.equal(found[part], videos[part])
    assert not torch.equal(found[PARTS[0]], found[PARTS[1]])


def test_a_lora_file_says_what_it_was_trained_on_and_names_no_place(work):
    metadata = metadata_of(LORA)
    style = work / "loras" / "style.safetensors"
    (row,) = json.loads(metadata["fused_lora"])
    assert row == {
        "name": "style.safetensors",
        "sha256": content_hash(style),
        "weight": 0.5,
        "bytes": style.stat().st_size,
    }
    assert metadata["base_model"] == "wan"
    assert metadata["base_model_hash"] == transformer_fingerprint(open_model("private/wan").transformer)
    command = json.loads(Path("runs/one/command_args.json").read_text())
    assert command["pretrained_model_name_or_path"] == "private/wan"
    for expert, transformer in open_model("private/pair").transformers.items():
        metadata = metadata_of(Path(f"runs/two/checkpoints/wan-lora-00000004_{expert}.safetensors"))
        assert metadata["base_model_hash"] == transformer_fingerprint(transformer)
        (row,) = json.loads(metadata["fused_lora"])
        assert row["name"] == f"pair_{expert}.safetensors"
        assert row["sha256"] == content_hash(Path("loras") / row["name"])


def test_it_is_sampled_on_top_of_what_its_run_names(work, sample, capsys):
    style = work / "loras" / "style.safetensors"
    found = sample(f"--lora_path {LORA}")
    assert ", on top of style.safetensors at 0.5, with and without the LoRA" in capsys.readouterr().out
    assert "wan-lora-00000002_seed42" in found
    assert_same(found, expected(work, sample, ("transformer", style, 0.5)))
    # Both in the weights: the video without a LoRA is that with it.
    base = by_hand(work / "private" / "wan", work / "both", ("transformer", style, 0.5), ("transformer", LORA, 1.0))
    both = sample(f"--lora_path plain.safetensors --pretrained_model_name_or_path {base}")
    assert torch.equal(found["with the LoRA"], both["without the LoRA"])
    without = sample(f"--lora_path plain.safetensors --pretrained_model_name_or_path {work / 'private' / 'wan'}")
    assert not torch.equal(found["without the LoRA"], without["without the LoRA"])


def test_away_from_its_run_it_needs_its_base_and_the_fused_file_under_any_names(work, sample, capsys):
    lora = Path(shutil.move(LORA, "fox.safetensors"))
    with pytest.raises(UserError, match="was trained on 'wan', a folder whose transformer has the hash "):
        sample(f"--lora_path {lora}")
    shutil.move("private/wan", "elsewhere")
    given = f"--lora_path {lora} --pretrained_model_name_or_path elsewhere"
    digest = content_hash(Path("loras/style.safetensors"))
    draw_lora(Path("style.safetensors"), 3)  # another content under its name
    message = (
        rf"was trained on top of style\.safetensors \(weight 0\.5, SHA-256 {digest}\).*\nGive it as --fuse_lora FILE"
    )
    with pytest.raises(UserError, match=message):
        sample(given)
    with pytest.raises(UserError, match=f"{digest}(.|\n)*{content_hash(Path('style.safetensors'))}"):
        sample(f"{given} --fuse_lora style.safetensors")

    given_file = sample(f"{given} --fuse_lora loras/style.safetensors")
    shutil.move("loras/style.safetensors", "renamed.safetensors")
    beside = sample(given)
    assert_same(given_file, beside)
    assert "another file" not in capsys.readouterr().out
    damaged = Path("renamed.safetensors").read_bytes()
    Path("renamed.safetensors").write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    with pytest.raises(UserError, match="no such file is beside it"):
        sample(given)


def test_without_the_fused_file_it_is_sampled_if_asked_for_and_the_result_says_so(work, sample, capsys):
    Path("loras/style.safetensors").unlink()
    with pytest.raises(UserError, match="or sample without it: --without_fused"):
        sample(f"--lora_path {LORA}")
    found = sample(f"--lora_path {LORA} --without_fused")
    assert "wan-lora-00000002_without_fused_seed42" in found
    said = "without what the LoRA was trained on top of: style.safetensors at 0.5"
    assert said in capsys.readouterr().out
    assert_same(found, expected(work, sample))
    with pytest.raises(UserError, match="--fuse_lora and --without_fused exclude each other"):
        sample(f"--lora_path {LORA} --without_fused --fuse_lora x.safetensors")
    with pytest.raises(UserError, match=r"--without_fused: plain\.safetensors was not trained on top of a LoRA"):
        sample("--lora_path plain.safetensors --pretrained_model_name_or_path private/wan --without_fused")


def test_another_base_than_it_was_trained_on_is_said_and_used(work, sample, capsys):
    other = by_hand(work / "private" / "wan", work / "other", ("transformer", work / "loras/style.safetensors", 1.0))
    sample(f"--lora_path {LORA} --pretrained_model_name_or_path {other}")
    assert "wan-lora-00000002.safetensors was trained on wan, hash " in capsys.readouterr().out


def test_of_a_pair_each_expert_is_on_top_of_its_own(work, sample, capsys):
    halves = [Path(f"runs/two/checkpoints/wan-lora-00000004_{expert}.safetensors") for expert in EXPERTS]
    found = sample(f"--lora_path {halves[0]} {halves[1]}")
    fused = [(expert, work / "loras" / f"pair_{expert}.safetensors", 1.0) for expert in EXPERTS]
    base = by_hand(work / "private" / "pair", work / "by_hand", *fused, family=TWO)
    plain = [stripped(half, work / half.name) for half in halves]
    assert_same(found, sample(f"--lora_path {plain[0]} {plain[1]} --pretrained_model_name_or_path {base}"))

    for path in (*halves, *Path("loras").glob("pair_*")):
        shutil.move(path, path.name if path in halves else f"loras/{path.name.replace('pair', 'moved')}")
    moved = f"--lora_path {halves[0].name} {halves[1].name} --pretrained_model_name_or_path private/pair"
    with pytest.raises(UserError, match=r"on top of pair_high_noise\.safetensors"):
        sample(moved)
    assert_same(sample(f"{moved} --fuse_lora loras/moved.safetensors"), found)
    alone = sample(f"--lora_path {halves[1].name} --pretrained_model_name_or_path private/pair --without_fused")
    assert "wan-lora-00000004_low_noise_without_fused_seed42" in alone


def test_training_on_top_of_a_lora_that_is_on_top_of_another_fuses_and_records_both(work, sample, capsys):
    shutil.copy(LORA, "loras/fox.safetensors")
    run = train("private/wan", "loras/fox.safetensors", "chain")
    assert "was trained on top of loras/style.safetensors, which is fused too" in capsys.readouterr().out
    (lora,) = run.glob("checkpoints/wan-lora-*.safetensors")
    rows = json.loads(metadata_of(lora)["fused_lora"])
    assert [(row["name"], row["weight"]) for row in rows] == [("style.safetensors", 0.5), ("fox.safetensors", 1.0)]
    found = sample(f"--lora_path {lora}")
    fused = [
        ("transformer", work / "loras/style.safetensors", 0.5),
        ("transformer", work / "loras/fox.safetensors", 1.0),
    ]
    base = by_hand(work / "private" / "wan", work / "by_hand", *fused)
    plain = stripped(lora, work / "plain.safetensors")
    assert_same(found, sample(f"--lora_path {plain} --pretrained_model_name_or_path {base}"))

    Path("loras/style.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"fox\.safetensors was trained on top of style.*\nCopy it into .*loras, under that name"
    ):
        train("private/wan", "loras/fox.safetensors", "missing")


def test_further_loras_and_beginnings_that_were_on_top_of_others_are_noted(work, sample, capsys):
    style = fused_file(Path("loras/style.safetensors"), 0.5)
    speed = draw_lora(Path("loras/speed.safetensors"), 4, to_metadata([style.record]))
    stripped(LORA, Path("plain.safetensors"))
    note = f"note: --also_lora {speed} was trained on top of style.safetensors (weight 0.5"
    sample(f"--lora_path plain.safetensors --pretrained_model_name_or_path private/wan --also_lora {speed}")
    assert note in capsys.readouterr().out
    sample(f"--lora_path {LORA} --also_lora {speed}")  # the same is underneath
    assert note not in capsys.readouterr().out

    begin = f"--init_lora {LORA} --fuse_lora_weight"
    train("private/wan", "loras/style.safetensors", "again", *begin.split(), "0.5", "--max_train_steps", "1")
    assert "note: --init_lora" not in capsys.readouterr().out
    train("private/wan", "loras/style.safetensors", "more", *begin.split(), "1", "--max_train_steps", "1")
    assert "was trained on top of style.safetensors (weight 0.5" in capsys.readouterr().out


def test_on_top_of_a_control_lora_the_control_is_there_without_the_lora_too(work, sample):
    model = tiny_transformer()
    widen_patch_embedding(model, 32)
    fill(add_lora(model, ["patch_embedding"], RANK, ALPHA))
    write_lora(Path("loras/control.safetensors"), extract_lora(model, {}))
    run = train("private/wan", "loras/control.safetensors", "controlled", "--control_lora", "--max_train_steps", "1")
    (lora,) = run.glob("checkpoints/wan-lora-*.safetensors")
    found, other = (sample(f"--lora_path {lora} --input_video clips/{name}.mp4") for name in ("val/e", "train/a"))
    assert not torch.equal(found["without the LoRA"], other["without the LoRA"])
    assert not torch.equal(found["without the LoRA"], found["with the LoRA"])

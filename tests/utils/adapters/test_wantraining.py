"""Commands written for WanTraining: each of its spellings arrives as the value that it means here."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import test_wan_control_lora
import train_wan_lora
from tests.tiny import TINY_SHAPE, tiny_transformer, write_model
from utils.adapters.lora import select_modules
from utils.adapters.lora_file import LoraFile
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.training.validation import QUANTILES
from wan.checkpoints import open_model

TRAINER, TEST_SCRIPT = train_wan_lora.Options, test_wan_control_lora.Options


@pytest.mark.parametrize(
    ("cls", "flag", "value", "name", "meant"),
    [
        (TEST_SCRIPT, "lora", "a.safetensors", "lora_path", (Path("a.safetensors"),)),
        (TEST_SCRIPT, "control_video", "small.mp4", "input_video", Path("small.mp4")),
        (TEST_SCRIPT, "cfg", "6", "guidance", (6.0,)),
        (TEST_SCRIPT, "negative_embedding", "n.safetensors", "negative_embedding", Path("n.safetensors")),
        (TRAINER, "lora_targets", "self_attn, cross_attn", "lora_target", ("*self_attn*", "*cross_attn*")),
        (TRAINER, "lora_targets", "ffn,", "lora_target", ("*ffn*",)),
        (TRAINER, "lora_targets", "all-linear", "lora_target", ("all-linear",)),
        (TRAINER, "control_preprocess", "tile", "control_type", "tile"),
        (TRAINER, "control_preprocess", "none", "load_control", True),
    ],
)
def test_a_spelling_arrives_as_the_value_that_it_means(tmp_path, cls, flag, value, name, meant):
    control = ["--control_lora"] if cls is TRAINER else []
    assert getattr(parse_options(cls, [*control, f"--{flag}", value]), name) == meant
    if cls is TRAINER:
        (tmp_path / "run.toml").write_text(f"{flag} = '{value}'", encoding="utf-8")
        assert getattr(parse_options(cls, [*control, "--config", str(tmp_path / "run.toml")]), name) == meant


def test_a_negative_embedding_is_used_in_place_of_the_negative_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", tmp_path)
    rows = torch.rand(3, TINY_SHAPE.text_dim)
    save_file({"context": rows}, tmp_path / "n.safetensors")
    flags = ["--prompt", "a fox", "--cfg", "6", "--negative_embedding", str(tmp_path / "n.safetensors")]
    opts = parse_options(TEST_SCRIPT, flags)
    files = open_model(write_model(tmp_path / "model"))
    request = test_wan_control_lora.complete(opts, LoraFile({}), files.family)
    _, negative = test_wan_control_lora.embed(request, True, opts, files, torch.device("cpu"))
    assert torch.equal(negative, rows)


@pytest.mark.parametrize(("value", "meant"), [("tile", "tile"), ("none", "file")])
def test_the_control_of_the_test_script_is_made_or_the_video_itself(value, meant):
    opts = parse_options(TEST_SCRIPT, ["--control_video", "small.mp4", "--control_preprocess", value])
    assert opts.control_type == meant


@pytest.mark.parametrize(
    ("listed", "usual"),
    [("self_attn, cross_attn", ["attn"]), ("attn,ffn", ["all-linear"]), ("self_attn.q", ["self_attn.q"])],
)
def test_listed_targets_select_the_layers_whose_names_contain_them(listed, usual):
    opts = parse_options(TRAINER, ["--lora_targets", listed])
    model = tiny_transformer()
    assert select_modules(model, opts.lora_target) == select_modules(model, usual)


def test_control_files_are_used_with_tile_too_as_there():
    opts = parse_options(TRAINER, "--control_lora --load_control --control_preprocess tile".split())
    assert opts.load_control and opts.control_type == "tile"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--control_preprocess none", "--load_control requires --control_lora"),
        ("--control_preprocess none --no-load_control --control_lora", "have different values"),
        (
            "--control_preprocess depth",
            "must be one of none, tile, not 'depth'; make any other control video beforehand",
        ),
        ("--lora_targets ,", "--lora_targets needs at least one value"),
        ("--lora_target attn --lora_targets ffn", "--lora_target and --lora_targets have different values"),
        ("--use_dwt_loss", "--use_dwt_loss does not exist here: leave it out.*squared error.*--shift"),
        ("--val_timestep 500", "--val_timestep does not exist here: leave it out.*TensorBoard"),
        ("--clip_grad 1", "unknown option '--clip_grad'"),
    ],
)
def test_what_has_no_meaning_here_is_refused_with_what_to_use(flags, message):
    with pytest.raises(UserError, match=message):
        parse_options(TRAINER, flags.split())


def test_the_sigmas_that_replace_val_timestep_are_those_of_the_validation():
    with pytest.raises(UserError) as caught:
        parse_options(TRAINER, ["--val_timestep", "500"])
    assert "0.1, 0.3, 0.5, 0.7 and 0.9" in str(caught.value) and QUANTILES == (0.1, 0.3, 0.5, 0.7, 0.9)

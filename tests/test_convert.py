import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora_to_comfy
from tests.loras import comfy_merge
from utils.adapters.lora_file import LoraFile, LoraPair, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.provenance import FusedRecord, to_metadata
from utils.common.options import run_script
from wan.names import official_name

SCRIPT = Path(convert_lora_to_comfy.__file__)


def run(*arguments):
    """The script's exit code for a command line, without the cost of a new process."""
    return run_script(lambda: convert_lora_to_comfy.main([str(argument) for argument in arguments]))


def save(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)
    return path


def bare(key="blocks.0.self_attn.q", rank=2, size=24):
    return {f"{key}.lora_A.weight": torch.randn(rank, size), f"{key}.lora_B.weight": torch.randn(size, rank)}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=8, ffn_dim=32, num_layers=2, rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip


@pytest.fixture
def adapted(transformer):
    """diffusers name -> a pair for every linear and convolution, with ranks 2 to 4 and alphas 3 and 4."""
    weights = {key: w for key, w in transformer.state_dict().items() if w.ndim >= 2 and key.endswith(".weight")}
    return {
        key.removesuffix(".weight"): LoraPair(
            torch.randn(2 + i % 3, *w.shape[1:]), torch.randn(w.shape[0], 2 + i % 3, *[1] * (w.ndim - 2)), 3.0 + i % 2
        )
        for i, (key, w) in enumerate(weights.items())
    }


# -------------------------------------------------------------------------------------------------------- ComfyUI


@pytest.mark.parametrize(
    ("layout", "control"),
    [("wantraining", False), ("kohya", False), ("diffusers", False), ("wantraining", True), ("kohya", True)],
)
def test_comfyui_loads_every_key_and_changes_its_weights_by_our_delta(tmp_path, transformer, adapted, layout, control):
    pairs = {official_name(name): pair for name, pair in adapted.items()}
    weights = {official_name(name) + ".weight": transformer.get_parameter(name + ".weight") for name in adapted}
    if control:
        pairs["patch_embedding"] = LoraPair(torch.randn(2, 8, 1, 2, 2), torch.randn(24, 2, 1, 1, 1), 3.0)
    shapes = {"patch_embedding": (24, 8, 1, 2, 2)} if control else {}
    source, output = tmp_path / "lora.safetensors", tmp_path / "lora_comfy.safetensors"
    write_lora(source, LoraFile(pairs, input_shapes=shapes), layout)
    assert run("--input_lora", source) == 0

    merged, left = comfy_merge(weights, load_file(output), strength=0.7)
    assert not left
    for name, pair in pairs.items():
        before, change = weights[name + ".weight"], delta(pair, 0.7)
        if control and name == "patch_embedding":
            before = torch.cat((before, torch.zeros(24, 4, 1, 2, 2)), dim=1)
        assert (merged[name + ".weight"] - before - change).abs().max() <= 1e-6 * change.abs().max()


def test_a_control_lora_of_wantraining_widens_comfyuis_patch_embedding(tmp_path):
    down, up = torch.randn(2, 8, 1, 2, 2), torch.randn(24, 2, 1, 1, 1)
    tensors = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up} | bare()
    assert run("--input_lora", save(tmp_path / "c.safetensors", tensors), "--alpha", 1, "--dtype", "bf16") == 0
    weights = {"patch_embedding.weight": torch.randn(24, 4, 1, 2, 2)}
    weights |= {"blocks.0.self_attn.q.weight": torch.randn(24, 24)}
    merged, left = comfy_merge(weights, load_file(tmp_path / "c_comfy.safetensors"), strength=1.0)
    wide = merged["patch_embedding.weight"]
    new = torch.einsum("or,richw->oichw", up.flatten(1), down)[:, 4:] * 0.5
    assert not left and wide.shape == (24, 8, 1, 2, 2)
    torch.testing.assert_close(wide[:, 4:], new, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize(("layout", "only"), [("diffusers", ""), ("comfy", "blocks.")])
def test_diffusers_changes_its_weights_by_our_delta(tmp_path, transformer, adapted, layout, only):
    before = {key: weight.clone() for key, weight in transformer.state_dict().items()}
    adapted = {name: pair for name, pair in adapted.items() if name.startswith(only)}
    assert len(adapted) == (33 if only == "" else 24)
    source, output = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    write_lora(source, LoraFile({official_name(name): pair for name, pair in adapted.items()}), "kohya")
    assert run("--input_lora", source, "--output_lora", output, "--to", layout) == 0

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = WanPipeline(**parts, transformer=transformer)
    pipeline.load_lora_weights(str(output))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for key, weight in transformer.state_dict().items():
        pair = adapted.get(key.removesuffix(".weight"))
        change = torch.zeros_like(weight) if pair is None else delta(pair)
        assert (weight - before[key] - change).abs().max() <= 1e-6 * change.abs().max(), key


def test_alphas_that_diffusers_saved_itself_reach_comfyui_once(tmp_path, transformer, adapted):
    name = "blocks.0.attn1.to_q"
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {name: adapted[name].rank}}
    WanPipeline.save_lora_weights(
        tmp_path,
        {f"{name}.lora_A.weight": adapted[name].down, f"{name}.lora_B.weight": adapted[name].up},
        weight_name="saved.safetensors",
        transformer_lora_adapter_metadata=config,
    )
    assert run("--input_lora", tmp_path / "saved.safetensors") == 0
    assert read_lora(tmp_path / "saved_comfy.safetensors").pairs["blocks.0.self_attn.q"].alpha == 16.0
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "saved_comfy.safetensors")


# ------------------------------------------------------------------------------------------------ the command line


def test_the_script_runs_as_users_run_it(tmp_path):
    source = save(tmp_path / "wan-lora-00000100.safetensors", bare(rank=4), {"step": "100"})
    done = subprocess.run(
        [sys.executable, SCRIPT, "--input_lora", source, "--alpha", "8", "--dtype", "fp16"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    summary = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert summary["format"] == "no prefix, lora_A/lora_B.weight, official names"
    assert (summary["modules"], summary["rank"], summary["alpha"]) == ("1", "4", "8")
    assert (summary["dtype"], summary["control"]) == ("float32", "no")
    output = tmp_path / "wan-lora-00000100_comfy.safetensors"
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = load_file(output)
    assert list(tensors) == [f"{stem}.alpha", f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
    assert tensors[f"{stem}.alpha"] == 8 and tensors[f"{stem}.lora_A.weight"].dtype == torch.float16
    assert metadata_of(output) == {"step": "100"}


def test_a_bad_file_ends_with_code_two_and_one_message(tmp_path):
    source = save(tmp_path / "bad.safetensors", {"blocks.0.nose.lora_A.weight": torch.ones(2, 2)})
    done = subprocess.run([sys.executable, SCRIPT, "--input_lora", source], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {source}") and "nose" in done.stderr and "Traceback" not in done.stderr


def test_converting_twice_changes_nothing_and_reports_it(tmp_path, capsys):
    source, once = save(tmp_path / "lora.safetensors", bare()), tmp_path / "lora_comfy.safetensors"
    assert run("--input_lora", source) == 0 and "wrote" in capsys.readouterr().out
    before = snapshot(tmp_path)
    assert run("--input_lora", source) == 0 and f"{once} already holds this LoRA" in capsys.readouterr().out
    assert run("--input_lora", once) == 0 and "already has the layout comfy" in capsys.readouterr().out
    assert snapshot(tmp_path) == before
    assert run("--input_lora", once, "--output_lora", tmp_path / "copy.safetensors") == 0
    first, copy = load_file(once), load_file(tmp_path / "copy.safetensors")
    assert list(first) == list(copy) and all(torch.equal(first[key], copy[key]) for key in first)


@pytest.mark.parametrize("layout", ["wantraining", "kohya", "diffusers"])
def test_the_default_name_holds_the_layout_and_the_way_back_is_exact(tmp_path, layout):
    source, back = tmp_path / "start.safetensors", tmp_path / "back.safetensors"
    pairs = {"head.head": LoraPair(torch.randn(3, 5), torch.randn(6, 3), 0.1)}
    write_lora(source, LoraFile(pairs, metadata={"author": "me"}))
    there = tmp_path / f"start_{layout}.safetensors"
    assert run("--input_lora", source, "--to", layout) == 0
    assert run("--input_lora", there, "--output_lora", back) == 0
    first, last = load_file(source), load_file(back)
    assert list(first) == list(last) and all(torch.equal(first[key], last[key]) for key in first)
    assert metadata_of(source) == metadata_of(back) == {"author": "me"}


def test_a_different_file_is_only_replaced_with_overwrite(tmp_path, capsys):
    source, output = save(tmp_path / "lora.safetensors", bare()), tmp_path / "lora_comfy.safetensors"
    output.write_bytes(b"days of training")
    assert run("--input_lora", source) == 2 and "--overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"days of training"
    assert run("--input_lora", source, "--output_lora", source) == 2
    assert "is the input itself" in capsys.readouterr().err and list(load_file(source)) == list(bare())
    assert run("--input_lora", source, "--overwrite") == 0 and len(load_file(output)) == 2
    assert run("--input_lora", source, "--output_lora", source, "--overwrite") == 0
    assert source.read_bytes() == output.read_bytes()


def test_an_alpha_that_contradicts_the_file_is_an_error_that_names_both(tmp_path, capsys):
    source = save(tmp_path / "lora.safetensors", bare() | {"blocks.0.self_attn.q.alpha": torch.tensor(4.0)})
    assert run("--input_lora", source, "--alpha", 16) == 2
    message = capsys.readouterr().err
    assert str(source) in message and "alpha 4" in message and "16" in message
    assert list(tmp_path.iterdir()) == [source]
    assert run("--input_lora", source, "--alpha", 4) == 0


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
    + [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_a_dtype_has_our_name_and_that_of_wantrainings_converter(tmp_path, word, dtype):
    source = save(tmp_path / "lora.safetensors", {key: tensor.double() for key, tensor in bare().items()})
    assert run("--input_lora", source, "--dtype", word) == 0
    tensors = load_file(tmp_path / "lora_comfy.safetensors")
    assert {tensor.dtype for key, tensor in tensors.items() if "lora_" in key} == {dtype}


def test_the_former_name_of_wantrainings_layout_is_accepted_but_not_shown(tmp_path, capsys):
    source = save(tmp_path / "lora.safetensors", {f"diffusion_model.{key}": tensor for key, tensor in bare().items()})
    assert run("--input_lora", source, "--to", "predecessor") == 0
    assert "layout wantraining" in capsys.readouterr().out
    assert load_file(tmp_path / "lora_wantraining.safetensors").keys() == bare().keys()
    with pytest.raises(SystemExit):
        run("--help")
    shown = capsys.readouterr().out
    assert "{comfy,wantraining,kohya,diffusers,peft}" in shown and "predecessor" not in shown
    assert run("--input_lora", source, "--to", "lycoris") == 2
    assert "must be one of comfy, wantraining, kohya, diffusers" in capsys.readouterr().err


def test_a_conversion_reads_its_input_and_makes_the_output_once(tmp_path, monkeypatch):
    source, calls = save(tmp_path / "lora.safetensors", bare()), []

    def counted(name):
        function = getattr(convert_lora_to_comfy, name)
        monkeypatch.setattr(convert_lora_to_comfy, name, lambda *args: (calls.append(name), function(*args))[1])

    counted("read_experts")
    counted("to_state_dict")
    assert run("--input_lora", source) == 0 and (tmp_path / "lora_comfy.safetensors").exists()
    assert calls == ["read_experts", "to_state_dict"]


# ----------------------------------------------------------------------------------------------------------- pairs

PAIR = [f"style_{expert}-00000100" for expert in ("high_noise", "low_noise")]


@pytest.fixture
def pair(tmp_path):
    """The common name of two files, each with its own matrices and metadata."""
    for name in PAIR:
        save(tmp_path / f"{name}.safetensors", bare(), {"expert": name[6:-9]})
    return tmp_path / "style-00000100.safetensors"


def test_a_pair_is_converted_by_its_common_name_to_a_pair(tmp_path, pair, capsys):
    assert run("--input_lora", pair, "--alpha", 4, "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    for name, expert in zip(PAIR, ("high_noise", "low_noise"), strict=True):
        output = tmp_path / f"{name}_comfy.safetensors"
        assert f"expert    {expert}\n" in said and f"wrote {output}" in said
        assert metadata_of(output) == {"expert": expert}
        source, made = (
            read_lora(path).pairs["blocks.0.self_attn.q"] for path in (tmp_path / f"{name}.safetensors", output)
        )
        assert made.alpha == 4 and torch.equal(made.down, source.down.bfloat16())
    assert run("--input_lora", tmp_path / "style-00000100_comfy.safetensors") == 0
    assert capsys.readouterr().out.count("the file already has the layout comfy") == 2
    assert run("--input_lora", pair, "--alpha", 4, "--dtype", "bf16") == 0
    assert capsys.readouterr().out.count("already holds this LoRA") == 2


def test_one_file_of_a_pair_is_converted_alone(tmp_path, pair, capsys):
    assert run("--input_lora", tmp_path / f"{PAIR[1]}.safetensors", "--output_lora", tmp_path / "low.safetensors") == 0
    assert capsys.readouterr().out.count("wrote") == 1 and len(list(tmp_path.iterdir())) == 3


def test_the_output_of_a_pair_gets_the_names_of_its_experts(tmp_path, pair, capsys):
    before = snapshot(tmp_path)
    assert run("--input_lora", pair, "--output_lora", tmp_path / "out-low.safetensors") == 2
    assert "out-low.safetensors holds 'low'" in capsys.readouterr().err and snapshot(tmp_path) == before
    assert run("--input_lora", pair, "--output_lora", tmp_path / "out.safetensors", "--to", "kohya") == 0
    for name, expert in zip(PAIR, ("high_noise", "low_noise"), strict=True):
        given, made = (read_lora(tmp_path / f"{stem}.safetensors") for stem in (name, f"out_{expert}"))
        assert torch.equal(made.pairs["blocks.0.self_attn.q"].up, given.pairs["blocks.0.self_attn.q"].up)


def test_a_pair_is_converted_as_a_whole_or_not_at_all(tmp_path, pair, capsys):
    taken = tmp_path / f"{PAIR[1]}_comfy.safetensors"
    taken.write_bytes(b"days of training")
    before = snapshot(tmp_path)
    assert run("--input_lora", pair) == 2 and str(taken) in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    taken.unlink()
    save(tmp_path / f"{PAIR[1]}.safetensors", {"blocks.0.nose.lora_A.weight": torch.ones(2, 2)})
    before = snapshot(tmp_path)
    assert run("--input_lora", pair) == 2 and "nose" in capsys.readouterr().err and snapshot(tmp_path) == before


BAD_COMMANDS = {
    "no input": ([], "--input_lora"),
    "a missing file": (["--input_lora", "missing.safetensors"], "missing.safetensors"),
    "a pickle": (["--input_lora", "pickle.pt"], "can run code"),
    "a text file": (["--input_lora", "text.safetensors"], "text.safetensors"),
    "a cut file": (["--input_lora", "cut.safetensors"], "cut.safetensors"),
    "half a pair": (["--input_lora", "half.safetensors"], "half a pair"),
    "a number not finite": (["--input_lora", "nan.safetensors"], "NaN or infinite"),
    "a control LoRA for diffusers": (["--input_lora", "control.safetensors", "--to", "diffusers"], "control LoRA"),
    "an unknown layout": (["--input_lora", "good.safetensors", "--to", "lycoris"], "lycoris"),
    "an unknown dtype": (["--input_lora", "good.safetensors", "--dtype", "int8"], "int8"),
    "an unknown option": (["--input_lora", "good.safetensors", "--alfa", "1"], "alfa"),
    "an alpha of zero": (["--input_lora", "good.safetensors", "--alpha", "0"], "positive"),
    "an alpha of words": (["--input_lora", "good.safetensors", "--alpha", "high"], "high"),
    "an output of another kind": (["--input_lora", "good.safetensors", "--output_lora", "out.pt"], "out.pt"),
    "a folder as output": (
        ["--input_lora", "good.safetensors", "--output_lora", "."],
        "is a folder. Give a file in it",
    ),
    "a folder as output, to be replaced": (
        ["--input_lora", "good.safetensors", "--output_lora", ".", "--overwrite"],
        "is a folder. Give a file in it",
    ),
    "a file in place of a folder": (
        ["--input_lora", "good.safetensors", "--alpha", "2", "--to", "peft", "--output_lora", "text", "--overwrite"],
        "text: is a file, and the layout of PEFT is a folder",
    ),
    "no folder for a folder": (
        ["--input_lora", "good.safetensors", "--alpha", "2", "--to", "peft", "--output_lora", "no/x.safetensors"],
        "no/x: the folder no does not exist",
    ),
    "a missing folder": (["--input_lora", "good.safetensors", "--output_lora", "no/out.safetensors"], "no/out"),
}


@pytest.mark.parametrize("what", BAD_COMMANDS)
def test_a_bad_command_ends_with_code_two_and_damages_nothing(tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    good = save(tmp_path / "good.safetensors", bare())
    for name in ("text", "text.safetensors"):
        (tmp_path / name).write_text("not a LoRA")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-4])
    torch.save(bare(), tmp_path / "pickle.pt")
    save(tmp_path / "half.safetensors", {"head.head.lora_A.weight": torch.ones(2, 5)})
    save(tmp_path / "nan.safetensors", {key: tensor * torch.nan for key, tensor in bare().items()})
    wide = {"patch_embedding.lora_A.weight": torch.ones(2, 8, 1, 2, 2)}
    save(tmp_path / "control.safetensors", wide | {"patch_embedding.lora_B.weight": torch.ones(6, 2, 1, 1, 1)})
    before = snapshot(tmp_path)
    arguments, words = BAD_COMMANDS[what]
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and len(message.splitlines()) <= 3
    assert snapshot(tmp_path) == before


def test_the_alphas_are_listed_by_size_and_those_that_are_not_stated_are_counted(tmp_path, capsys):
    """So is what the LoRA is on top of: without it, it does not do what it was trained to do."""
    tensors = {}
    for number, alpha in enumerate((16.0, 4.0, None, None)):
        key = f"diffusion_model.blocks.{number}.self_attn.q"
        tensors |= {f"{key}.lora_A.weight": torch.ones(2, 5), f"{key}.lora_B.weight": torch.ones(6, 2)}
        tensors |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
    fused = FusedRecord("style.safetensors", "0" * 64, 0.5)
    assert run("--input_lora", save(tmp_path / "lora.safetensors", tensors, to_metadata([fused])), "--to", "kohya") == 0
    said = capsys.readouterr().out
    assert "\nalpha     4, 16; not stated in 2 modules, whose scale is 1\n" in said
    assert f"\non top of style.safetensors (weight 0.5, SHA-256 {'0' * 64})\n" in said


def test_a_damaged_record_is_noted(tmp_path, capsys):
    source = save(tmp_path / "lora.safetensors", bare(), {"fused_lora": "yes"})
    assert run("--input_lora", source) == 0
    assert "note: " in (said := capsys.readouterr().out) and "does not say what it was trained on" in said


def test_metadata_survives_and_is_readable(tmp_path):
    source = save(tmp_path / "lora.safetensors", bare(), {"config": json.dumps({"shift": 5})})
    assert run("--input_lora", source, "--to", "diffusers", "--alpha", 2) == 0
    metadata = metadata_of(tmp_path / "lora_diffusers.safetensors")
    assert json.loads(metadata["config"]) == {"shift": 5}
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 2.0

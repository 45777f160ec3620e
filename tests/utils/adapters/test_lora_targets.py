"""What a program cannot apply is said with its share, and the rest is written so that the program applies all of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file
from torch import Tensor

import convert_lora_to_comfy
from tests.loras import change_of, comfy_merge, make_loha, make_lokr, make_pair, metadata_of, save_all, written
from tests.peers import diffusers_transformer
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.dora import COMFY, Magnitude
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_targets import TARGETS, adapt, share, squared_norm, unsupported
from utils.adapters.lora_writer import to_state_dict, write_lora
from utils.common.options import run_script
from wan.names import diffusers_name

DIM = TINY_SHAPE.dim
Q, PATCH = "blocks.0.self_attn.q", "patch_embedding"
SHAPES = {name: tuple(value.shape) for name, value in tiny_transformer().named_parameters()}


def run(*arguments: object) -> int:
    return run_script(lambda: convert_lora_to_comfy.main([str(argument) for argument in arguments]))


def some(alphas: bool = True, ranks: bool = True) -> LoraFile:
    """Pairs of linear layers, of the patch embedding and of layers outside of blocks."""
    torch.manual_seed(0)
    names = [
        Q,
        "blocks.1.self_attn.q",
        "blocks.0.cross_attn.k",
        "blocks.1.ffn.2",
        "head.head",
        "time_embedding.0",
        PATCH,
    ]
    return LoraFile(
        {
            name: make_pair(SHAPES[f"{name}.weight"], 2 + i % 3 if ranks else 3, 1.0 + i // 2 if alphas else None)
            for i, name in enumerate(names)
        }
    )


# ----------------------------------------------------------------------------------------------------------- diffusers


def in_diffusers(path: Path) -> dict[str, Tensor]:
    """How much each parameter of diffusers' transformer changes by a file, by official names."""
    torch.manual_seed(1)
    transformer = diffusers_transformer(TINY_SHAPE)
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    pipeline = WanPipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=transformer)
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {name: weight - before[name] for name, weight in transformer.state_dict().items()}


def expected_of(lora: LoraFile) -> dict[str, Tensor]:
    """The changes that a LoRA states, by diffusers' names of parameters."""
    changes = {f"{diffusers_name(name)}.weight": change_of(p, p.weight_shape) for name, p in lora.pairs.items()}
    for key, diff in lora.diffs.items():
        name, _, role = key.rpartition(".")
        changes[f"{diffusers_name(name)}.{'bias' if role == 'diff_b' else 'weight'}"] = diff
    return changes


def biased(lora: LoraFile) -> LoraFile:
    biases = {f"{name}.diff_b": torch.randn(SHAPES[f"{name}.bias"]) for name in (Q, PATCH, "head.head")}
    return replace(lora, diffs=biases)


def with_full_changes(lora: LoraFile) -> LoraFile:
    names = [PATCH, "blocks.1.ffn.2", "blocks.0.ffn.0"]
    pairs = {name: pair for name, pair in lora.pairs.items() if name not in names}
    return LoraFile(pairs, {f"{name}.diff": torch.randn(SHAPES[f"{name}.weight"]) for name in names})


def flat(lora: LoraFile) -> LoraFile:
    return LoraFile({**lora.pairs, PATCH: lora.pairs[PATCH].map(lambda matrix: matrix.flatten(1))})


WAYS: dict[str, Callable[[], LoraFile]] = {
    "varying ranks and alphas": some,
    "varying ranks, no alpha known": lambda: some(alphas=False),
    "one rank, no alpha known": lambda: some(alphas=False, ranks=False),
    "one rank, varying alphas": lambda: some(ranks=False),
    "biases": lambda: biased(some()),
    "biases, no alpha known": lambda: biased(some(alphas=False, ranks=False)),
    "biases, varying ranks, no alpha known": lambda: biased(some(alphas=False)),
    "full changes": lambda: with_full_changes(some()),
    "full changes alone": lambda: with_full_changes(LoraFile({})),
    "a flattened patch embedding": lambda: flat(some()),
    "a negative alpha": lambda: LoraFile({Q: make_pair((DIM, DIM), 3, -2.0), PATCH: make_pair((DIM, 16, 1, 2, 2))}),
}


@pytest.mark.parametrize("what", WAYS)
def test_diffusers_changes_its_weights_and_biases_by_what_the_lora_states(tmp_path, what):
    lora = WAYS[what]()
    path = tmp_path / "lora.safetensors"
    write_lora(path, lora, "diffusers")
    found, expected = in_diffusers(path), expected_of(lora)
    assert expected.keys() <= found.keys()
    for name, change in found.items():
        wanted = expected.get(name, torch.zeros(())).double().reshape(change.shape if name in expected else ())
        assert (change - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max()), name


def test_no_alpha_is_stated_for_diffusers_where_it_takes_the_rank_by_itself(tmp_path):
    write_lora(tmp_path / "lora.safetensors", some(alphas=False, ranks=False), "diffusers")
    assert "lora_adapter_metadata" not in (metadata_of(tmp_path / "lora.safetensors") or {})
    assert {pair.alpha for pair in read_lora(tmp_path / "lora.safetensors").pairs.values()} == {None}


# -------------------------------------------------------------------------------------------------------------- shares


def every_kind() -> LoraFile:
    """Pairs, LoHa, LoKr and full changes of everything that can have one."""
    torch.manual_seed(0)
    diffs = {
        "blocks.0.modulation.diff": (1, 6, DIM),
        "head.modulation.diff": (1, 2, DIM),
        "blocks.0.norm3.diff": (DIM,),
        "blocks.0.norm3.diff_b": (DIM,),
        "blocks.1.self_attn.norm_q.diff": (DIM,),
        "blocks.1.ffn.0.diff": (2 * DIM, DIM),
        f"{Q}.diff_b": (DIM,),
        "blocks.1.self_attn.k.diff_b": (DIM,),
    }
    return LoraFile(
        {Q: make_pair((DIM, DIM), 3, 2.0), PATCH: make_pair((DIM, 16, 1, 2, 2), 4, 1.0)},
        {key: torch.randn(shape) for key, shape in diffs.items()},
        lycoris={"blocks.0.ffn.0": make_loha((96, DIM)), "blocks.0.ffn.2": make_lokr((DIM, 96), "second", 2)},
    )


LEFT = {
    "comfy": ["blocks.0.modulation.diff", "head.modulation.diff"],
    "kohya": ["blocks.0.modulation.diff", "head.modulation.diff"],
    "diffusers": [
        *("blocks.0.modulation.diff", "blocks.0.norm3.diff", "blocks.0.norm3.diff_b"),
        *("blocks.1.self_attn.k.diff_b", "blocks.1.self_attn.norm_q.diff", "head.modulation.diff"),
    ],
}
LEFT["peft"] = LEFT["diffusers"]
LEFT["wantraining"] = sorted([*LEFT["diffusers"], f"{Q}.diff_b"])


@pytest.mark.parametrize("layout", TARGETS)
def test_what_a_program_cannot_apply_is_known_with_its_share_of_all_squared_changes(layout):
    lora = every_kind()
    adapted = adapt(lora, TARGETS[layout])
    assert unsupported(adapted, TARGETS[layout]) == LEFT[layout]
    squares = {n: change_of(each, each.weight_shape).square().sum().item() for n, each in lora.factors.items()}
    squares |= {key: diff.double().square().sum().item() for key, diff in lora.diffs.items()}
    expected = sum(squares[key] for key in LEFT[layout]) / sum(squares.values())
    assert 0 < expected < 0.5 and share(adapted, LEFT[layout]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [None, 4.0, -3.0, 0.0])
@pytest.mark.parametrize("kind", ["whole", "second", "both", "core", "kernel"])
def test_the_squared_norm_of_a_lokr_is_that_of_its_change(kind, alpha):
    lokr = make_lokr((6, 8, 1, 2, 2), kind, 1, alpha)
    expected = change_of(lokr, (6, 8, 1, 2, 2)).square().sum().item()
    assert squared_norm(lokr) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("factors", [make_pair((6, 4, 1, 2, 2), 3, -2.0), make_loha((6, 4, 1, 2, 2), 3, 2.0, True)])
def test_the_squared_norm_of_a_pair_or_a_loha_is_that_of_its_change(factors):
    assert squared_norm(factors) == pytest.approx(change_of(factors, (6, 4, 1, 2, 2)).square().sum().item(), rel=1e-5)


def test_the_share_of_a_dora_depends_on_its_base_and_of_nothing_it_is_zero():
    lora = LoraFile({Q: make_pair()}, magnitudes={Q: Magnitude(torch.ones(6, 1), COMFY)})
    assert share(lora, []) is None and share(LoraFile({}), []) == 0


def test_a_bias_whose_pair_has_no_scale_cannot_be_a_bias_of_the_pair():
    lora = LoraFile({Q: make_pair(alpha=0.0)}, {f"{Q}.diff_b": torch.ones(6)})
    assert unsupported(lora, TARGETS["diffusers"]) == [f"{Q}.diff_b"] and not unsupported(lora, TARGETS["comfy"])


# -------------------------------------------------------------------------------------------------- --drop_unsupported


def test_the_converter_leaves_out_what_cannot_be_applied_only_where_it_is_told_to(tmp_path, capsys):
    lora = replace(every_kind(), lycoris={})
    source, out = save_all(tmp_path / "in.safetensors", lora), tmp_path / "in_comfy.safetensors"
    left = sum(lora.diffs[key].double().square().sum() for key in LEFT["comfy"])
    whole = sum(change_of(p, p.weight_shape).square().sum() for p in lora.pairs.values())
    whole += sum(diff.double().square().sum() for diff in lora.diffs.values())
    said = "ComfyUI cannot apply 2 changes of this LoRA (head.modulation.diff, modulation.diff). "
    said += f"They are {left / whole:.2%} of the squared change of all weights."
    assert run("--input_lora", source) == 2
    message = capsys.readouterr().err
    assert said in message and "--drop_unsupported" in message and list(tmp_path.iterdir()) == [source]
    assert run("--input_lora", source, "--drop_unsupported") == 0
    assert f"left out: {said}" in capsys.readouterr().out
    model = tiny_transformer()
    before = {name: value.detach() for name, value in model.named_parameters()}
    merged, rest = comfy_merge(before, load_file(out), 1.0)
    assert not rest
    for name, weight in merged.items():
        module, _, role = name.rpartition(".")
        key = f"{module}.{'diff_b' if role == 'bias' else 'diff'}"
        change = lora.diffs.get(key, torch.zeros(())) if module not in lora.pairs or role == "bias" else None
        change = change_of(lora.pairs[module], tuple(weight.shape)) if change is None else change
        assert (weight - before[name] - change).abs().max() <= 2e-6 * max(1.0, change.abs().max()), name


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_what_is_left_after_dropping_is_applied_by_other_programs(tmp_path, capsys, layout):
    lora = replace(every_kind(), lycoris={})
    source = save_all(tmp_path / "in.safetensors", lora)
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    assert run("--input_lora", source, "--to", layout, "--output_lora", out) == 2
    program = TARGETS[layout].program
    assert f"{program} cannot apply 6 changes of this LoRA" in capsys.readouterr().err and not out.exists()
    assert run("--input_lora", source, "--to", layout, "--output_lora", out, "--drop_unsupported") == 0
    kept = {key: diff for key, diff in lora.diffs.items() if key not in LEFT[layout]}
    expected = expected_of(replace(lora, diffs=kept))
    if layout == "diffusers":
        found = in_diffusers(out)
        assert {name for name, change in found.items() if change.abs().max() > 1e-5} == expected.keys()
        assert all((found[name] - change).abs().max() < 1e-5 for name, change in expected.items())


def test_a_lora_of_which_nothing_can_be_applied_is_not_written_empty(tmp_path, capsys):
    lora = LoraFile({}, {"blocks.0.norm3.diff": torch.ones(DIM)})
    source = save_all(tmp_path / "in.safetensors", lora)
    for layout in ("diffusers", "peft", "wantraining"):
        for more in ([], ["--drop_unsupported"]):
            assert run("--input_lora", source, "--to", layout, *more) == 2
            assert "can apply nothing of this LoRA (norm3.diff)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


# ------------------------------------------------------------------------------------------------------------- control


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("out", [DIM, 200])  # fewer outputs than inputs x kernel, and more
def test_a_full_change_of_a_widened_embedding_becomes_a_pair_that_comfyui_applies_exactly(
    tmp_path, layout, is_flat, out
):
    diff = torch.randn(out, 32, 1, 2, 2)
    source = {f"diffusion_model.{PATCH}.diff": diff.flatten(1) if is_flat else diff}
    source |= {f"diffusion_model.{PATCH}.diff_b": torch.randn(out)}
    lora = read_lora(written(tmp_path / "l.safetensors", source))
    assert lora.input_shapes == {PATCH: (out, 32, 1, 2, 2)}
    tensors, _ = to_state_dict(lora, layout)
    base, bias = torch.randn(out, 16, 1, 2, 2), torch.randn(out)
    merged, left = comfy_merge({f"{PATCH}.weight": base, f"{PATCH}.bias": bias}, tensors, 1.0)
    assert not left
    padded = torch.cat([base, torch.zeros(out, 16, 1, 2, 2)], dim=1)
    assert torch.equal(merged[f"{PATCH}.weight"], padded + diff)
    assert torch.equal(merged[f"{PATCH}.bias"], bias + source[f"diffusion_model.{PATCH}.diff_b"])


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_flattened_pair_of_a_widened_embedding_is_a_control_lora_too(tmp_path, prefix):
    tensors = {
        f"{prefix}{PATCH}.lora_A.weight": torch.randn(2, 128),
        f"{prefix}{PATCH}.lora_B.weight": torch.randn(DIM, 2),
    }
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    assert lora.input_shapes == {PATCH: (DIM, 32, 1, 2, 2)}
    base = torch.randn(DIM, 16, 1, 2, 2)
    merged, left = comfy_merge({f"{PATCH}.weight": base}, to_state_dict(lora)[0], 1.0)
    change = change_of(lora.pairs[PATCH], (DIM, 32, 1, 2, 2))
    padded = torch.cat([base, torch.zeros(DIM, 16, 1, 2, 2)], dim=1)
    assert not left and (merged[f"{PATCH}.weight"] - padded - change).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
@pytest.mark.parametrize("kind", ["loha", "flat loha", "loha with cores", "lokr", "flat lokr"])
def test_a_loha_or_lokr_of_a_widened_embedding_becomes_a_pair_that_comfyui_applies(tmp_path, layout, kind):
    shape = (DIM, 128) if kind.startswith("flat") else (DIM, 32, 1, 2, 2)
    factors = make_lokr(shape) if kind.endswith("lokr") else make_loha(shape, core=kind.endswith("cores"))
    tensors = {f"diffusion_model.{PATCH}.{role}": factor for role, factor in factors.factors.items()}
    tensors[f"diffusion_model.{PATCH}.alpha"] = torch.tensor(factors.alpha)
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    assert lora.input_shapes == {PATCH: (DIM, 32, 1, 2, 2)} and PATCH in lora.lycoris
    base, written_tensors = torch.randn(DIM, 16, 1, 2, 2), to_state_dict(lora, layout)[0]
    merged, left = comfy_merge({f"{PATCH}.weight": base}, written_tensors, 1.0)
    padded = torch.cat([base, torch.zeros(DIM, 16, 1, 2, 2)], dim=1)
    change = change_of(factors, (DIM, 32, 1, 2, 2)).float()
    assert not left and not [key for key in written_tensors if "hada_" in key or "lokr_" in key]
    torch.testing.assert_close(merged[f"{PATCH}.weight"], padded + change, rtol=1e-5, atol=1e-5)
    model = tiny_transformer()
    expected = torch.cat([model.patch_embedding.weight, torch.zeros(DIM, 16, 1, 2, 2)], dim=1) + change
    fuse_lora(model, lora)
    torch.testing.assert_close(model.patch_embedding.weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("channels", [16, 36, 48, 52])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_an_embedding_of_a_released_width_is_no_control(tmp_path, prefix, channels, is_flat):
    down = torch.randn(2, channels * 4) if is_flat else torch.randn(2, channels, 1, 2, 2)
    tensors = {f"{prefix}{PATCH}.lora_A.weight": down, f"{prefix}{PATCH}.lora_B.weight": torch.randn(DIM, 2)}
    assert read_lora(written(tmp_path / "l.safetensors", tensors)).input_shapes == (
        {PATCH: (DIM, 52, 1, 2, 2)} if (prefix, channels) == ("", 52) else {}
    )


def test_full_changes_get_the_shape_of_the_weight_without_which_comfyui_leaves_it(tmp_path):
    stored = {f"{PATCH}.diff": (DIM, 64), "blocks.0.norm3.diff": (DIM, 1), "blocks.0.norm3.diff_b": (1, DIM)}
    tensors = {f"diffusion_model.{key}": torch.randn(shape) for key, shape in stored.items()}
    lora = read_lora(written(tmp_path / "l.safetensors", tensors))
    base = {name: p.detach() for name, p in tiny_transformer().named_parameters()}
    merged, left = comfy_merge(base, to_state_dict(lora)[0], 1.0)
    assert not left
    for key, name in ((f"{PATCH}.diff", f"{PATCH}.weight"), ("blocks.0.norm3.diff_b", "blocks.0.norm3.bias")):
        expected = base[name] + tensors[f"diffusion_model.{key}"].reshape(base[name].shape)
        assert torch.equal(merged[name], expected)


def test_a_change_of_the_embedding_without_its_kernel_is_refused():
    for lora in (LoraFile({}, {f"{PATCH}.diff": torch.ones(DIM, 7)}), LoraFile({PATCH: make_pair((DIM, 7))})):
        with pytest.raises(LoraError, match="patch_embedding has 7 numbers for an output, so it is of no Wan"):
            to_state_dict(lora, "diffusers")

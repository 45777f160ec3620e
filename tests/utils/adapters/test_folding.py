"""LoHa, LoKr and DoRA as plain pairs of a rank: exact where the rank suffices, else as close as any pair can be."""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import convert_lora_to_comfy
from tests.layouts import KINDS, read_model, write_diffusers, write_transformers
from tests.loras import change_of, dora_weight, make_loha, make_lokr, make_pair, written
from tests.tiny import FAMILY, TINY_SHAPE, tiny_transformer, write_model, write_transformer
from utils.adapters import folding
from utils.adapters.dora import COMFY, PEFT, Magnitude
from utils.adapters.folding import Loss, fold, needs_base
from utils.adapters.lora_file import LoraFile, delta
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, to_state_dict
from utils.adapters.lycoris import Lycoris
from utils.common.options import run_script

LINEAR, KERNEL = (12, 8), (12, 8, 1, 2, 2)
Q, K, PATCH = "blocks.0.self_attn.q", "blocks.0.self_attn.k", "patch_embedding"
# What is folded, and a rank that holds all of it: r^2 for a LoHa, the product of both ranks for a LoKr.
KINDS_OF: dict[str, tuple[Callable[..., Lycoris], int]] = {
    "LoHa": (lambda shape, alpha: make_loha(shape, 2, alpha), 4),
    "LoKr of whole factors": (lambda shape, alpha: make_lokr(shape, "whole", alpha=alpha), 12),
    "LoKr, the second decomposed": (lambda shape, alpha: make_lokr(shape, "second", 2, alpha), 4),
    "LoKr, both decomposed": (lambda shape, alpha: make_lokr(shape, "both", 1, alpha), 1),
    "LoHa with cores": (lambda shape, alpha: make_loha(shape, 2, alpha, core=True), 4),
    "LoKr with a core": (lambda shape, alpha: make_lokr(shape, "core", 2, alpha), 4),
    "LoKr with a kernel": (lambda shape, alpha: make_lokr(shape, "kernel", 2, alpha), 4),
}
LINEAR_KINDS = [kind for kind in KINDS_OF if kind.split()[-1] not in ("cores", "core", "kernel")]
CASES = [(kind, LINEAR) for kind in LINEAR_KINDS] + [(kind, KERNEL) for kind in KINDS_OF]


def of(kind: str, shape: tuple[int, ...], alpha: float = 5.0) -> LoraFile:
    torch.manual_seed(0)
    return LoraFile({K: make_pair()}, lycoris={Q: KINDS_OF[kind][0](shape, alpha)})


def reading(weights: dict[str, Tensor]) -> folding.Read:
    def read(modules: Sequence[str]) -> list[tuple[str, Tensor]]:
        return [(name, weights[name]) for name in modules]

    return read


def rest(change: Tensor, rank: int) -> float:
    """|change - the best of this rank|^2, by Eckart and Young: the squares of the singular values beyond it."""
    return torch.linalg.svdvals(change.double().flatten(1))[rank:].square().sum().item()


@pytest.mark.parametrize("alpha", [5.0, -3.0])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_rank_that_suffices_keeps_the_change(kind, shape, alpha):
    lora = of(kind, shape, alpha)
    folded, loss = fold(lora, KINDS_OF[kind][1], None)
    pair, expected = folded.pairs[Q], change_of(lora.lycoris[Q], shape)
    assert pair.up.shape[2:].numel() == 1 and pair.scale == 1
    assert pair.rank == min(KINDS_OF[kind][1], 8 if shape == LINEAR else 12)
    assert (delta(pair).reshape(shape).double() - expected).norm() <= 2e-6 * expected.norm() and loss.residual < 1e-3
    assert not folded.lycoris and folded.pairs[K] is lora.pairs[K]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_what_a_smaller_rank_loses_is_what_any_pair_of_it_must_lose_and_is_said(kind, shape, rank):
    lora = of(kind, shape, -3.0)
    folded, loss = fold(lora, rank, None)
    expected = change_of(lora.lycoris[Q], shape)
    lost, least = (delta(folded.pairs[Q]).reshape(shape).double() - expected).norm().item(), rest(expected, rank) ** 0.5
    assert folded.pairs[Q].rank <= rank
    assert abs(lost - least) <= 1e-5 * expected.norm()
    assert loss.residual == pytest.approx(least / expected.norm().item(), abs=1e-3)
    assert loss.worst == (Q, pytest.approx(loss.residual))


def test_the_loss_of_a_file_is_that_of_all_its_changes_together():
    loss = Loss({"a": 16.0, "b": 9.0}, {"a": 4.0, "b": 5.0})
    assert loss.residual == pytest.approx((9 / 25) ** 0.5) and loss.worst == ("b", pytest.approx((5 / 9) ** 0.5))
    assert Loss({"a": 0.0}, {"a": 0.0}).residual == 0


def test_a_change_of_nothing_folds_to_nothing():
    folded, loss = fold(LoraFile({}, lycoris={Q: Lycoris(make_loha().map(torch.zeros_like).factors, 2.0)}), 3, None)
    assert delta(folded.pairs[Q]).eq(0).all() and loss.residual == 0 and loss.worst == (Q, 0)


# --------------------------------------------------------------------------------------------------------------- DoRA


def dora(rule: str, shape: tuple[int, ...], seed: int = 0) -> tuple[LoraFile, Tensor]:
    """A DoRA of a LoKr and a pair, and the base weight of both."""
    torch.manual_seed(seed)
    stored = (shape[0],) if rule == PEFT else (shape[0], *[1] * (len(shape) - 1))
    magnitudes = {name: Magnitude(1 + torch.rand(stored), rule) for name in (Q, K)}
    return LoraFile({K: make_pair(shape)}, lycoris={Q: make_lokr(shape)}, magnitudes=magnitudes), torch.randn(shape)


@pytest.mark.parametrize("rank", [2, 12])
@pytest.mark.parametrize("shape", [LINEAR, KERNEL])
@pytest.mark.parametrize("rule", [PEFT, COMFY])
def test_a_dora_is_folded_with_the_weights_that_it_depends_on(rule, shape, rank):
    lora, weight = dora(rule, shape)
    folded, loss = fold(lora, rank, reading({Q: weight, K: 2 * weight}))
    lost = whole = 0.0
    for name, base in ((Q, weight), (K, 2 * weight)):
        change = dora_weight(base, change_of(lora.factors[name], shape), lora.magnitudes[name]) - base
        found = delta(folded.pairs[name]).double()
        assert found.shape == shape
        assert (found - change).norm().item() == pytest.approx(
            rest(change, rank) ** 0.5, abs=1e-5 * change.norm().item()
        )
        lost, whole = lost + rest(change, rank), whole + change.square().sum().item()
    assert loss.residual == pytest.approx((lost / whole) ** 0.5, abs=1e-5)
    assert needs_base(lora) == [K, Q] and not folded.magnitudes and not folded.lycoris


def test_large_matrices_are_folded_by_iteration_to_the_same_pair_every_time(monkeypatch):
    lora, weight = dora(PEFT, (96, 80))
    read = reading({Q: weight, K: weight})
    dense, exact = fold(lora, 4, read)
    monkeypatch.setattr(folding, "DENSE", 16)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, loss = fold(lora, 4, read)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, _ = fold(lora, 4, read)
    for name in (Q, K):
        assert torch.equal(first.pairs[name].down, again.pairs[name].down)
        assert torch.equal(first.pairs[name].up, again.pairs[name].up)
        assert (delta(first.pairs[name]) - delta(dense.pairs[name])).norm() <= 0.02 * delta(dense.pairs[name]).norm()
    assert loss.residual == pytest.approx(exact.residual, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- the command line


def run(*arguments: object) -> int:
    return run_script(lambda: convert_lora_to_comfy.main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folded_file_is_written_in_every_layout_and_the_loss_is_said(tmp_path, capsys, layout):
    lora = of("LoHa", LINEAR)
    source = written(tmp_path / "l.safetensors", to_state_dict(LoraFile({}, lycoris=lora.lycoris))[0])
    out = tmp_path / ("out" if layout == "peft" else "out.safetensors")
    assert run("--input_lora", source, "--to", layout, "--fold", 2, "--output_lora", out) == 0
    expected = change_of(lora.lycoris[Q], LINEAR)
    share = (rest(expected, 2) ** 0.5) / expected.norm().item()
    residual = f"relative residual {share:.2%}, at most {share:.2%} ({Q})"
    said = f"folded    1 module to rank 2: {share**2:.2%} of their squared change is lost, {residual}\n"
    assert f"{said}          a higher --fold loses less\n" in capsys.readouterr().out
    found = delta(read_lora(out).pairs[Q]).double()
    assert (found - expected).norm().item() == pytest.approx(rest(expected, 2) ** 0.5, rel=1e-4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A small model in every layout in which a transformer may come."""
    folder = tmp_path_factory.mktemp("bases")
    model = read_model(write_model(folder / "official"), FAMILY)
    (folder / "sharded").mkdir()
    write_transformer(folder / "sharded", tiny_transformer(), shards=3)
    places = {
        "a folder": folder / "official",
        "a file of a folder": folder / "official/diffusion_pytorch_model.safetensors",
        "shards": folder / "sharded",
        "diffusers": write_diffusers(folder / "diffusers", model) / "transformer",
    }
    for name in ("fp32", "bf16", "fp8-scaled-old", "fp8-scaled-rows"):
        places[name] = next(iter(write_transformers(folder / name, model, KINDS[name])[0].values()))
    return places


DIM = TINY_SHAPE.dim


@pytest.mark.parametrize("rule", [PEFT, COMFY])
@pytest.mark.parametrize(
    "base",
    ["a folder", "a file of a folder", "shards", "diffusers", "fp32", "bf16", "fp8-scaled-old", "fp8-scaled-rows"],
)
def test_the_base_of_a_dora_is_read_in_every_layout(tmp_path, bases, base, rule):
    torch.manual_seed(0)
    shapes = {Q: (DIM, DIM), PATCH: (DIM, 16, 1, 2, 2)}
    role, ones = ("lora_magnitude_vector", []) if rule == PEFT else ("dora_scale", [1])
    pairs, tensors = {name: make_pair(shape, alpha=None) for name, shape in shapes.items()}, {}
    for name, pair in pairs.items():
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up}
        tensors[f"{stem}.{role}"] = 1 + torch.rand(DIM, *ones * (len(shapes[name]) - 1))
    out = tmp_path / "out.safetensors"
    source = written(tmp_path / "dora.safetensors", tensors)
    assert run("--input_lora", source, "--fold", DIM, "--base", bases[base], "--output_lora", out) == 0
    model, found = tiny_transformer(), read_lora(out)
    for name, pair in pairs.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        magnitude = Magnitude(tensors[f"diffusion_model.{name}.{role}"], rule)
        expected = dora_weight(weight, change_of(pair, shapes[name]), magnitude) - weight
        exact = {"bf16": 0.02, "fp8-scaled-old": 0.1, "fp8-scaled-rows": 0.1}.get(base, 1e-5)
        assert (delta(found.pairs[name]) - expected).norm() <= exact * expected.norm()


def test_without_its_base_a_dora_is_not_folded_and_nothing_is_written(tmp_path, bases, capsys):
    lora, _ = dora(COMFY, (DIM, DIM))
    source = written(tmp_path / "dora.safetensors", to_state_dict(lora)[0])
    before = load_file(source)
    assert run("--input_lora", source, "--fold", 4, "--to", "diffusers") == 2
    assert "give its transformer with --base FILE" in capsys.readouterr().err
    assert run("--input_lora", source, "--base", bases["a folder"]) == 2
    assert "fold" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    written(other, {key.replace("blocks.0", "blocks.7"): tensor for key, tensor in before.items()})
    capsys.readouterr()
    assert run("--input_lora", other, "--fold", 4, "--base", bases["a folder"]) == 2
    assert "has no blocks.7.self_attn.k, which the LoRA adapts" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dora.safetensors", "other.safetensors"]


@pytest.mark.parametrize(("base", "message"), [("Wan2.1_VAE.pth", "not a Wan transformer"), ("nowhere", "nowhere")])
def test_a_base_that_is_none_ends_the_script_with_code_two_and_one_message(
    tmp_path, bases, monkeypatch, capsys, base, message
):
    source = written(tmp_path / "dora.safetensors", to_state_dict(dora(COMFY, (DIM, DIM))[0])[0])
    options = ["--input_lora", source, "--fold", 4, "--base", bases["a folder"] / base]
    monkeypatch.setattr("sys.argv", ["convert_lora_to_comfy.py", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(convert_lora_to_comfy.__file__)), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and message in said and "Traceback" not in said


def test_a_control_dora_is_folded_with_zeros_for_the_inputs_that_its_base_lacks():
    shape, wide = (12, 4, 1, 2, 2), (12, 8, 1, 2, 2)
    torch.manual_seed(0)
    pair, magnitude, base = make_pair(wide), Magnitude(1 + torch.rand(12), PEFT), torch.randn(shape)
    lora = LoraFile({PATCH: pair}, {}, {PATCH: wide}, magnitudes={PATCH: magnitude})
    folded, _ = fold(lora, 12, reading({PATCH: base}))
    padded = torch.cat([base, torch.zeros(shape)], dim=1)
    expected = dora_weight(padded, change_of(pair, wide), magnitude) - padded
    assert (delta(folded.pairs[PATCH]).double() - expected).norm() <= 1e-5 * expected.norm()
    assert folded.input_shapes == {PATCH: wide}


def test_a_base_of_another_width_is_refused_by_name(tmp_path, bases, capsys):
    lora, _ = dora(COMFY, (DIM + 8, DIM))
    source = written(tmp_path / "dora.safetensors", to_state_dict(lora)[0])
    assert run("--input_lora", source, "--fold", 4, "--base", bases["a folder"], "--to", "diffusers") == 2
    assert f"the LoRA has (56, 48) at {K}, the base model (48, 48): is it for another Wan?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dora.safetensors"]

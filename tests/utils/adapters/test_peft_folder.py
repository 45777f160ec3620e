"""PEFT's folders mean here what they mean in PEFT, and PEFT reads what is written for it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor

import convert_lora_to_comfy
from tests.loras import half, make_loha, make_pair, written
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.adapters.dora import PEFT, Magnitude
from utils.adapters.fusion import fuse_lora
from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import write_lora
from utils.adapters.peft_folder import find_weights
from utils.common.errors import UserError
from wan.modules.model import WanModel

# PEFT takes a bias for a matrix that was cut.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")

DIM = TINY_SHAPE.dim
Q, PATCH = "blocks.0.self_attn.q", "patch_embedding"
SOME = ["self_attn.q", "ffn.0", "head.head"]
PATTERNS = {
    "rank_pattern": {"blocks.1.self_attn.q": 2, "head.head": 3, ".*1.ffn.0": 5},
    "alpha_pattern": {"ffn.0": 3, "^head.head": 7.5, r"blocks\.1\.self_attn\.q": 1},
}
CONFIGS: dict[str, PeftConfig] = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=[*SOME, PATCH]),
    "defaults": LoraConfig(target_modules=SOME),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[*SOME, PATCH]),
    "patterns": LoraConfig(r=4, lora_alpha=6, target_modules=SOME, **PATTERNS),
    "rsLoRA with patterns": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=SOME, **PATTERNS),
    "biases": LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=[*SOME, PATCH]),
    "biases, rsLoRA": LoraConfig(r=4, lora_alpha=6, lora_bias=True, use_rslora=True, target_modules=SOME),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=[*SOME, PATCH]),
    "DoRA, rsLoRA with patterns": LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=SOME, **PATTERNS
    ),
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=SOME),
    "LoHa with patterns": LoHaConfig(r=3, alpha=5, target_modules=SOME, **PATTERNS),
    "LoKr, the second decomposed": LoKrConfig(r=2, alpha=5, target_modules=SOME),
    "LoKr, both decomposed": LoKrConfig(r=2, alpha=5, decompose_both=True, target_modules=SOME),
    "LoKr of whole factors": LoKrConfig(r=40, alpha=5, target_modules=SOME),
    "LoKr of whole factors, some": LoKrConfig(
        r=5, alpha=3, target_modules=SOME, rank_pattern={"ffn.0": 40, "head.head": 2}, alpha_pattern={"ffn.0": 10}
    ),
    "LoKr of another division": LoKrConfig(r=2, alpha=5, decompose_factor=4, target_modules=SOME),
}


def filled(model: torch.nn.Module) -> None:
    """Draws every number of an adapter: magnitudes stay near the lengths that they begin with."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.2 * drawn.abs())
        elif any(word in name for word in ("lora_", "hada_", "lokr_")):
            parameter.data = 0.2 * drawn


def merged(model: PeftModel) -> dict[str, Tensor]:
    return model.merge_and_unload().state_dict()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], changed: set[str]) -> None:
    base = tiny_transformer().state_dict()
    assert found.keys() == expected.keys() == base.keys()
    assert {name for name in base if not torch.equal(expected[name], base[name])} == changed
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 2e-6 * max(1.0, weight.abs().max()), name


def fused(lora: LoraFile) -> dict[str, Tensor]:
    model = tiny_transformer()
    fuse_lora(model, lora)
    return model.state_dict()


@pytest.mark.parametrize("what", CONFIGS)
def test_a_folder_that_peft_saved_changes_the_weights_as_peft_does(tmp_path, what):
    model = get_peft_model(tiny_transformer(), CONFIGS[what])
    filled(model)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    layers = set(lora.factors)
    assert len(layers) == 5 + (PATCH in layers) and lora.notes == ()
    roles = ["weight", "bias"] if "biases" in what else ["weight"]
    assert_same(fused(lora), merged(model), {f"{name}.{role}" for name in layers for role in roles})
    assert fused(read_lora(tmp_path / "adapter_model.safetensors")).keys()


# ----------------------------------------------------------------------------------------------------------- to PEFT


def varied() -> LoraFile:
    """Ranks 2 to 4 and alphas that differ, a convolution among the modules."""
    torch.manual_seed(0)
    shapes = {name: tuple(p.shape) for name, p in tiny_transformer().named_parameters()}
    names = [
        Q,
        "blocks.1.self_attn.q",
        "blocks.0.cross_attn.q",
        "blocks.1.ffn.2",
        "head.head",
        "time_projection.1",
        PATCH,
    ]
    pairs = {n: make_pair(shapes[f"{n}.weight"], 2 + i % 3, 0.5 + i // 2) for i, n in enumerate(names)}
    return LoraFile({name: replace(pair, down=0.2 * pair.down) for name, pair in pairs.items()})


def flat(lora: LoraFile) -> LoraFile:
    return LoraFile({**lora.pairs, PATCH: lora.pairs[PATCH].map(lambda matrix: matrix.flatten(1))})


def half_flat(lora: LoraFile) -> LoraFile:
    return LoraFile({**lora.pairs, PATCH: replace(lora.pairs[PATCH], up=lora.pairs[PATCH].up.flatten(1))})


def biased(lora: LoraFile) -> LoraFile:
    return LoraFile(lora.pairs, {f"{Q}.diff_b": torch.randn(DIM), f"{PATCH}.diff_b": torch.randn(DIM)})


def with_full_changes(lora: LoraFile) -> LoraFile:
    """Of matrices, which become pairs of full rank: one higher than wide, one wider than high, a convolution."""
    pairs = {name: pair for name, pair in lora.pairs.items() if name not in (PATCH, "blocks.1.ffn.2")}
    shapes = {"blocks.0.ffn.0": (96, 48), "blocks.1.ffn.2": (48, 96), PATCH: (48, 16, 1, 2, 2)}
    return LoraFile(pairs, {f"{name}.diff": 0.1 * torch.randn(shape) for name, shape in shapes.items()})


def with_magnitudes(lora: LoraFile) -> LoraFile:
    model = tiny_transformer()
    lengths = {name: model.get_parameter(f"{name}.weight").flatten(1).norm(dim=1) for name in lora.pairs}
    return replace(lora, magnitudes={name: Magnitude(1.2 * length, PEFT) for name, length in lengths.items()})


WAYS: dict[str, Callable[[LoraFile], LoraFile]] = {
    "varying ranks and alphas": lambda lora: lora,
    "a flattened convolution": flat,
    "a convolution flattened in one matrix": half_flat,
    "biases": biased,
    "full changes": with_full_changes,
    "DoRA": with_magnitudes,
}


@pytest.mark.parametrize("what", WAYS)
def test_peft_makes_of_a_written_folder_the_weights_that_are_fused_here(tmp_path, what):
    lora = WAYS[what](varied())
    write_lora(tmp_path / "folder", lora, "peft")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path / "folder"))
    changed = {f"{name}.weight" for name in lora.pairs}
    changed |= {key.replace(".diff_b", ".bias").replace(".diff", ".weight") for key in lora.diffs}
    assert_same(merged(model), fused(lora), changed)
    assert_same(fused(read_lora(tmp_path / "folder")), fused(lora), changed)


def test_what_peft_has_no_way_to_hold_is_refused_and_no_folder_is_made(tmp_path):
    for lora, message in (
        (LoraFile({Q: make_pair()}, {"blocks.0.norm3.diff": torch.ones(6)}), "PEFT cannot apply blocks.0.norm3.diff"),
        (
            LoraFile({Q: make_pair()}, {"blocks.0.ffn.0.diff_b": torch.ones(6)}),
            "PEFT cannot apply blocks.0.ffn.0.diff_b",
        ),
        (LoraFile({}, lycoris={Q: make_loha()}), "PEFT reads holds no LoHa"),
        (LoraFile({PATCH: make_pair((6, 32, 1, 2, 2))}, {}, {PATCH: (6, 32, 1, 2, 2)}), "cannot load a control LoRA"),
        (LoraFile({Q: make_pair(alpha=None)}), "states none .blocks.0.self_attn.q.. Give it with --alpha"),
    ):
        with pytest.raises(LoraError, match=message):
            write_lora(tmp_path / "folder", lora, "peft")
        assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- files and folders


def adapter(folder: Path, fields: dict[str, object] | str | None, name: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    if fields is not None:
        text = fields if isinstance(fields, str) else json.dumps(fields)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    written(folder / name, half(f"base_model.model.{Q}", (4, 5), (6, 4)))
    return folder


def scale(path: Path) -> float:
    return read_lora(path).pairs[Q].scale


def test_a_configuration_counts_for_the_files_that_it_belongs_to(tmp_path):
    folder = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    assert scale(folder) == scale(folder / "adapter_model.safetensors") == 4
    written(folder / "other.safetensors", half(f"base_model.model.{Q}", (4, 5), (6, 4)))
    assert scale(folder) == 4 and scale(folder / "other.safetensors") == 1
    renamed = adapter(tmp_path / "b", {"r": 4, "lora_alpha": 16}, "my_lora.safetensors")
    assert scale(renamed) == scale(renamed / "my_lora.safetensors") == 4
    assert scale(adapter(tmp_path / "c", None)) == 1
    assert find_weights(tmp_path / "c/adapter_model.safetensors") == (tmp_path / "c/adapter_model.safetensors", None)


def test_a_folder_means_one_file_or_is_refused(tmp_path):
    with pytest.raises(LoraError, match="the folder has no LoRA"):
        read_lora(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(LoraError, match="is the folder of a run. Give one of its LoRAs, in .*run/checkpoints"):
        read_lora(tmp_path / "run")
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", half())
    with pytest.raises(LoraError, match="has 2 .safetensors files, and none is adapter_model.safetensors. Give one"):
        read_lora(tmp_path)


ALPHAS = {
    "lora_alpha alone": ({"lora_alpha": 2}, 2 / 4),
    "nothing: PEFT's default": ({}, 8 / 4),
    "null is no statement": ({"lora_alpha": None, "use_rslora": None, "alpha_pattern": None}, None),
    "rsLoRA": ({"lora_alpha": 6, "use_rslora": True}, 6 / 2),
    "a rank that the tensors contradict": ({"r": 99, "lora_alpha": 6}, 6 / 4),
    "a pattern": ({"lora_alpha": 6, "alpha_pattern": {"self_attn.q": 3}}, 3 / 4),
    "a pattern for another module": ({"lora_alpha": 6, "alpha_pattern": {"self_attn.k": 3}}, 6 / 4),
    "zero": ({"lora_alpha": 0}, 0.0),
    "init by eva, which leaves the base alone": ({"lora_alpha": 6, "init_lora_weights": "eva"}, 6 / 4),
    "init switched off": ({"lora_alpha": 6, "init_lora_weights": False}, 6 / 4),
    "fields that are off": (
        {"lora_alpha": 6, "fan_in_fan_out": False, "arrow_config": None, "loftq_config": {}},
        6 / 4,
    ),
}


@pytest.mark.parametrize("what", ALPHAS)
def test_the_scale_is_that_of_the_configuration(tmp_path, what):
    fields, expected = ALPHAS[what]
    lora = read_lora(adapter(tmp_path / "a", fields))
    assert lora.pairs[Q].scale == pytest.approx(1.0 if expected is None else expected)


REFUSED = {
    **{
        f"init {start}": ({"init_lora_weights": start}, f"init_lora_weights is {start}, which changes the base model")
        for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    },
    **{
        f"peft_type {kind}": ({"peft_type": kind}, f"peft_type is {kind}; those that are read are LORA, LOHA, LOKR")
        for kind in ("OFT", "BOFT", "IA3", "VERA", "ADALORA", "lora", "")
    },
    "no text as peft_type": ({"peft_type": ["LORA"]}, "the peft_type is"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
    "use_qalora": ({"use_qalora": True}, "use_qalora is set"),
    "arrow_config": ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
    "half of its JSON": ('{"r": 4, "lora_alpha"', "is damaged"),
    "nothing": ("", "is damaged"),
    "lists in lists": ("[" * 10**5, "is damaged"),
    "a list": ("[]", "the peft_type is None"),
    "an alpha in words": ({"lora_alpha": "16"}, "gives no usable alpha: lora_alpha is 16, not a finite number"),
    "an infinite alpha": ('{"lora_alpha": Infinity}', "gives no usable alpha"),
    "an expression": ({"alpha_pattern": {"(a+)+$": 3}}, "a regular expression; name modules"),
    "rank stabilisation in words": ({"use_rslora": "yes"}, "use_rslora is yes, not true or false"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_configuration_that_means_another_change_or_nothing_is_refused(tmp_path, what):
    fields, message = REFUSED[what]
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(adapter(tmp_path / "a", fields))
    assert "adapter_config.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_the_rank_pattern_of_a_lokr_is_named_where_it_is_the_fault(tmp_path):
    folder = tmp_path / "a"
    adapter(folder, {"peft_type": "LOKR", "rank_pattern": {"to_(q|k)": 3}, "alpha": 4})
    written(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{Q}.lokr_w1": torch.ones(2, 2), f"base_model.model.{Q}.lokr_w2": torch.ones(3, 4)},
    )
    with pytest.raises(LoraError, match="rank_pattern has .*a regular expression"):
        read_lora(folder)


def test_a_configuration_that_is_huge_or_no_text_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", None)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoraError, match="is damaged"):
        read_lora(folder)
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(LoraError, match="more than 16 MB"):
        read_lora(folder)


def test_a_tensor_that_the_configuration_contradicts_counts_with_a_note(tmp_path):
    folder = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    tensors = half(f"base_model.model.{Q}", (4, 5), (6, 4)) | {f"base_model.model.{Q}.alpha": torch.tensor(4.0)}
    written(folder / "adapter_model.safetensors", tensors)
    lora = read_lora(folder)
    assert lora.pairs[Q].alpha == 4
    (note,) = lora.notes
    assert f"adapter_config.json says alpha 16, the tensors 4 ({Q}): these count" in note


def test_a_configuration_and_metadata_that_disagree_are_an_error_with_both(tmp_path):
    folder = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    tensors = half(f"base_model.model.{Q}", (4, 5), (6, 4))
    written(folder / "adapter_model.safetensors", tensors, {"lora_alpha": "8"})
    with pytest.raises(
        LoraError, match="adapter_config.json says 16, the metadata lora_alpha says 8. Remove the wrong"
    ):
        read_lora(folder)
    written(folder / "adapter_model.safetensors", tensors, {"lora_alpha": "16"})
    assert scale(folder) == 4


def test_a_folder_from_pefts_model_is_read_without_its_own_wan(tmp_path):
    """The names are those of the model; a LoRA that fits none of its layers would be silent."""
    model = get_peft_model(tiny_transformer(), CONFIGS["LoRA"])
    model.save_pretrained(tmp_path)
    assert isinstance(model.base_model.model, WanModel) and set(read_lora(tmp_path).pairs) >= {Q, PATCH}


def test_a_rank_of_zero_by_which_peft_would_divide_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", {"peft_type": "LOKR", "r": 0, "alpha": 4})
    tensors = {f"base_model.model.{Q}.lokr_w1": torch.ones(2, 2), f"base_model.model.{Q}.lokr_w2": torch.ones(3, 4)}
    written(folder / "adapter_model.safetensors", tensors)
    with pytest.raises(LoraError, match=f"gives no usable rank: that of {Q} is 0"):
        read_lora(folder)


def test_the_converter_makes_the_folder_that_is_named_and_knows_it_again(tmp_path, capsys):
    source = written(tmp_path / "style_v1.5.safetensors", half(f"diffusion_model.{Q}"))
    for output, made in (("", "style_v1.5_peft"), ("other_v2.5", "other_v2.5"), ("third.safetensors", "third")):
        arguments = ["--input_lora", source, "--to", "peft", "--alpha", 8]
        arguments += ["--output_lora", tmp_path / output] if output else []
        for said in ("wrote", "nothing to do"):
            convert_lora_to_comfy.main([str(argument) for argument in arguments])
            assert f"{said}" in capsys.readouterr().out
        assert read_lora(tmp_path / made).pairs[Q].alpha == 8
    assert len(list(tmp_path.iterdir())) == 4
    config = tmp_path / "third/adapter_config.json"
    config.write_text(config.read_text().replace("8.0", "9.0"), encoding="utf-8")
    with pytest.raises(UserError, match="third exists and holds something else"):
        convert_lora_to_comfy.main([str(argument) for argument in arguments])


def test_a_rank_that_the_tensors_do_not_have_is_noted(tmp_path):
    folder = adapter(tmp_path / "a", {"r": 8, "lora_alpha": 8})
    lora = read_lora(folder)
    (note,) = lora.notes
    assert f"adapter_config.json says rank 8, the tensors 4 ({Q}): these count" in note and lora.pairs[Q].scale == 2


def test_a_conversion_beside_its_source_does_not_change_what_that_means(tmp_path):
    folder = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16}, "style.safetensors")
    for _ in range(2):
        assert scale(folder / "style.safetensors") == 4
        convert_lora_to_comfy.main(["--input_lora", str(folder / "style.safetensors"), "--overwrite"])
    assert scale(folder / "style_comfy.safetensors") == 4

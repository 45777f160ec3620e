"""VACE, Fun and their like are recognised by tensors and by config.json, and refused by name; plain Wan is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.damage import edit_config, edit_tensors, refused
from tests.manifests import FOLDER, load_manifest
from tests.tiny import write_model
from wan.checkpoints import find_family, open_model
from wan.checkpoints.transformer import Config
from wan.checkpoints.variants import refuse_variant_by_config, refuse_variant_by_tensors
from wan.configs import FAMILIES

PATH = Path("models/some/config.json")
ONE, TWO = ("transformer",), ("high_noise", "low_noise")
VARIANTS = {
    "wan2.1_vace_1.3b": "Wan 2.1 VACE-1.3B",
    "wan2.1_vace_14b": "Wan 2.1 VACE-14B",
    "wan2.1_fun_1.3b_inp": "Wan 2.1 Fun-1.3B-InP",
    "wan2.1_fun_1.3b_control": "Wan 2.1 Fun-1.3B-Control",
    "wan2.1_fun_14b_control": "Wan 2.1 Fun-14B-Control",
    "wan2.1_fun_v1.1_1.3b_control": "Wan 2.1 Fun-1.3B-Control",
    "wan2.1_fun_v1.1_14b_control": "Wan 2.1 Fun-14B-Control",
    "wan2.1_fun_v1.1_1.3b_control_camera": "Wan 2.1 Fun-1.3B-Control-Camera",
    "wan2.1_fun_v1.1_14b_control_camera": "Wan 2.1 Fun-14B-Control-Camera",
    "wan2.2_fun_a14b_control_expert": "Wan 2.2 Fun-A14B-Control",
    "wan2.2_fun_a14b_control_camera_expert": "Wan 2.2 Fun-A14B-Control-Camera",
}
SIGNS = {
    "casual_audio_encoder.encoder.final_linear.weight": "Wan 2.2 S2V-14B",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan 2.2 Animate-14B",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
}
PLAIN = sorted(path.stem for path in FOLDER.glob("wan2.?_*") if not path.stem.endswith("vae"))


def by_config(values: dict[str, Any], transformers: Sequence[str]) -> None:
    traits = Config(PATH, values).traits(is_alone=len(transformers) == 1)
    refuse_variant_by_config(PATH, values, traits)


def message(name: str) -> str:
    return rf"is of {name} \(.+\): not trained here yet$"


@pytest.mark.parametrize(("manifest", "name"), VARIANTS.items())
def test_a_released_variant_is_named_by_its_tensors(manifest, name):
    refused(message(name), refuse_variant_by_tensors, PATH, load_manifest(manifest))


@pytest.mark.parametrize(("sign", "name"), SIGNS.items())
def test_a_tensor_that_only_one_model_has_names_it(sign, name):
    shapes = load_manifest("wan2.1_t2v_14b") | {sign: (1,)}
    assert sign in refused(message(name), refuse_variant_by_tensors, PATH, shapes)


@pytest.mark.parametrize(("in_dim", "name"), [(100, "Wan 2.2 Fun-5B-InP"), (148, "Wan 2.2 Fun-5B-Control")])
def test_the_5b_variants_are_named_by_their_channels(in_dim, name):
    shapes = load_manifest("wan2.2_ti2v_5b") | {"patch_embedding.weight": (3072, in_dim, 1, 2, 2)}
    refused(message(name), refuse_variant_by_tensors, PATH, shapes)


@pytest.mark.parametrize("manifest", [name for name in PLAIN if name not in VARIANTS])
def test_the_released_layouts_are_no_variants(manifest):
    refuse_variant_by_tensors(PATH, load_manifest(manifest))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_configs_of_released_models_are_no_variants(family):
    values = {"model_type": family.task, "dim": family.shape.dim, "in_dim": family.in_dim, "out_dim": family.out_dim}
    by_config(values, [expert.name for expert in family.experts])


@pytest.mark.parametrize("shapes", [{}, {"patch_embedding.weight": ()}, {"head.head.weight": (7,), "x": ()}])
def test_tensors_that_are_no_wan_are_no_variants(shapes):
    refuse_variant_by_tensors(PATH, shapes)


@pytest.mark.parametrize(
    ("values", "transformers", "name"),
    [
        ({"model_type": "vace", "dim": 5120, "in_dim": 16, "out_dim": 16}, ONE, "Wan 2.1 VACE-14B"),
        ({"model_type": "t2v", "dim": 1536, "vace_layers": [0, 2]}, ONE, "Wan 2.1 VACE-1.3B"),
        ({"model_type": "s2v", "dim": 5120}, ONE, "Wan 2.2 S2V-14B"),
        ({"model_type": "animate", "dim": 5120}, ONE, "Wan 2.2 Animate-14B"),
        ({"model_type": "humo", "dim": 5120}, ONE, "HuMo"),
        ({"model_type": "i2v", "dim": 1536, "in_dim": 36, "out_dim": 16}, ONE, "Wan 2.1 Fun-1.3B-InP"),
        ({"model_type": "i2v", "dim": 5120, "in_dim": 48, "out_dim": 16}, ONE, "Wan 2.1 Fun-14B-Control"),
        ({"model_type": "i2v", "dim": 192, "in_dim": 48, "out_dim": 16}, ONE, "Wan 2.1 Fun-Control"),
        ({"model_type": "i2v", "dim": 5120, "in_dim": 52, "out_dim": 16}, TWO, "Wan 2.2 Fun-A14B-Control"),
        ({"model_type": "i2v", "add_control_adapter": True, "dim": 5120}, TWO, "Wan 2.2 Fun-A14B-Control-Camera"),
        ({"model_type": "i2v", "add_ref_conv": True, "dim": 5120}, ONE, "Wan 2.1 Fun-14B-Control"),
        ({"model_type": "ti2v", "dim": 3072, "in_dim": 100, "out_dim": 48}, ONE, "Wan 2.2 Fun-5B-InP"),
        ({"model_type": "vace", "dim": [5120]}, ONE, "Wan 2.1 VACE"),
    ],
)
def test_a_variant_is_named_by_its_config(values, transformers, name):
    refused(message(name), by_config, values, transformers)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": [], "dim": {}, "in_dim": [48], "out_dim": None},
        {"model_type": "i2v", "add_ref_conv": False, "dim": 5120, "in_dim": 36, "out_dim": 16},
        {"model_type": "i2v", "dim": 192, "in_dim": 36, "out_dim": 16},
        {"model_type": "t2v", "dim": 5120, "in_dim": 32, "out_dim": 16},
    ],
)
def test_other_configs_are_no_variants(values):
    by_config(values, ONE)


@pytest.mark.parametrize("task", ["t2v", "vace", "unheard"])
def test_the_name_of_a_variant_comes_before_every_other_fault(tmp_path, task):
    folder = write_model(tmp_path / "model")
    weight = {"vace_patch_embedding.weight": torch.zeros(48, 96, 1, 2, 2)}
    edit_tensors(folder, lambda state: (state.update(weight), state.pop("head.modulation")))
    edit_config(folder, model_type=task)
    assert str(folder) in refused(message("Wan 2.1 VACE"), open_model, folder)
    if task == "vace":  # before anything but config.json is downloaded
        assert "config.json is of" in refused(message("Wan 2.1 VACE"), find_family, folder)


def test_a_variant_that_only_its_config_tells_is_named(tmp_path):
    folder = write_model(tmp_path / "model")
    edit_config(folder, model_type="s2v")
    for find_it in (open_model, find_family):
        assert "config.json is of" in refused(message("Wan 2.2 S2V"), find_it, folder)

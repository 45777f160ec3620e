"""Which module and which role every spelling of a key means, written out by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import convert_lora_to_comfy
from tests.loras import NAMES, half, metadata_of, written
from utils.adapters.lora_file import LoraError
from utils.adapters.lora_keys import HIGH, LOW, names_wan, parse_key, refusal
from utils.adapters.lora_reader import read_experts, read_lora
from utils.common.options import run_script

Q = "blocks.0.self_attn.q"
PREFIXES = [
    *("", "diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model.", "unet.", "lycoris_"),
    *("lora_unet_", "lora_unet__", "lora_transformer_", "pipe.dit.", "dit.", "model.", "module.", "_orig_mod."),
    *("base_model.model.diffusion_model.", "base_model.model.transformer.", "diffusion_model._orig_mod."),
    *("_orig_mod.diffusion_model.", "base_model.model._orig_mod.", "module._orig_mod.", "_orig_mod.module.model."),
    *("_fsdp_wrapped_module.", "model._fsdp_wrapped_module._orig_mod.", "transformer.module.", "pipe.dit.module."),
]
SECOND = ["transformer_2.", "dit2.", "pipe.dit2.", "base_model.model.transformer_2.", "lora_transformer_2_"]


@pytest.mark.parametrize("prefix", [*PREFIXES, *SECOND])
def test_a_module_is_known_in_every_spelling_after_every_prefix(prefix):
    for official, diffusers, underscored in NAMES:
        flat = diffusers.replace(".", "_")
        for spelled in (official, diffusers, underscored, flat):
            key = parse_key(f"{prefix}{spelled}.lora_A.weight")
            assert key is not None and (key.name, key.role, key.prefix) == (official, "down", prefix)
            assert key.expert == (LOW if prefix in SECOND else None)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("blocks._orig_mod.0.self_attn.q", Q),
        ("blocks.0._orig_mod.self_attn.q", Q),
        ("blocks.0.module.self_attn.q", Q),
        ("blocks.0._checkpoint_wrapped_module.self_attn._fsdp_wrapped_module.q", Q),
        ("blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0", "blocks.0.ffn.0"),
        ("blocks.10._orig_mod.attn1.to_out.0", "blocks.10.self_attn.o"),
        ("blocks_0.cross_attn.k", "blocks.0.cross_attn.k"),
        ("blocks_0_attn2_add_k_proj", "blocks.0.cross_attn.k_img"),
    ],
)
def test_wrappers_in_the_middle_of_a_name_are_no_part_of_it(spelled, name):
    for prefix in ("", "diffusion_model.", "base_model.model."):
        key = parse_key(f"{prefix}{spelled}.lora_up.weight")
        assert key is not None and (key.name, key.role) == (name, "up")


ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.my_style.weight": "up",
    "lora_A": "down",
    "lora_B.default_0": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_B.bias": "bias",
    "lora_B.default.bias": "bias",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "reshape_weight": "reshape_weight",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.my_style.weight": "magnitude",
    **{role: role for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{role: role for role in ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}


@pytest.mark.parametrize("word", ROLES)
def test_a_role_is_known_by_every_word_for_it(word):
    for stem in (f"diffusion_model.{Q}", "lora_unet_blocks_0_self_attn_q", f"base_model.model.{Q}"):
        key = parse_key(f"{stem}.{word}")
        assert key is not None and (key.name, key.role) == (Q, ROLES[word])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("diffusion_model.blocks.3.diff_m", "blocks.3.modulation"),
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.blocks.3.modulation.diff", "blocks.3.modulation"),
        ("transformer.blocks.3.scale_shift_table.diff", "blocks.3.modulation"),
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("img_emb.emb_pos.diff", "img_emb.emb_pos"),
        ("lora_unet_blocks_3_modulation.diff", "blocks.3.modulation"),
    ],
)
def test_bare_parameters_have_full_changes(key, name):
    found = parse_key(key)
    assert found is not None and (found.name, found.role) == (name, "diff")


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.0.self_attn.q.weight",
        "diffusion_model.blocks.0.self_attn.q.bias",
        "diffusion_model.blocks.0.self_attn.q.lora_C.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_A.bias",
        "diffusion_model.blocks.0.self_attn.q.lokr_w3",
        "diffusion_model.blocks.0.self_attn.q.hada_w1",
        "diffusion_model.blocks.0.self_attn.q.lokr_t1",
        "diffusion_model.blocks.0.modulation.lora_A.weight",
        "diffusion_model.blocks.0.modulation.diff_b",
        "diffusion_model.blocks.0.modulation.alpha",
        "diffusion_model.blocks.00.self_attn.q.alpha",
        "diffusion_model.blocks.-1.self_attn.q.alpha",
        "text_encoder.blocks.0.self_attn.q.alpha",
        "xmodule.blocks.0.self_attn.q.alpha",
        "lora_te_blocks_0_self_attn_q.alpha",
        "blocks.0.self_attn.q.extra.alpha",
        "",
        ".alpha",
    ],
)
def test_other_keys_are_of_no_wan_lora(key):
    assert parse_key(key) is None


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (f"{Q}.set_weight", "replaces a whole weight"),
        (f"{Q}.lora_mid.weight", "Tucker"),
        ("blocks.0.self_attn.q_loras.down.weight", "Stand-In"),
        (f"{Q}.oft_blocks", "OFT"),
        (f"{Q}.oft_diag", "OFT"),
        (f"{Q}.boft_R", "OFT"),
        (f"{Q}.a1.weight", "GLoRA"),
        (f"{Q}.b2.weight", "GLoRA"),
        (f"{Q}.lora_embedding_A", "embedding table"),
    ],
)
def test_adapters_that_change_no_weight_by_a_sum_are_refused_by_name(tmp_path, key, words):
    assert words in refusal(key)
    with pytest.raises(LoraError, match=f"{key} .*{words}"):
        read_lora(written(tmp_path / "l.safetensors", half() | {key: torch.ones(2, 2)}))


def test_a_key_of_a_lora_is_not_refused_and_wan_is_known_by_its_modules():
    assert not any(refusal(f"diffusion_model.{Q}.{word}") for word in ROLES)
    assert names_wan(f"diffusion_model.{Q}.lora_C.x") is False and names_wan(f"diffusion_model.{Q}.alpha")
    assert names_wan("patch_embedding.lora_A.weight")
    assert not names_wan("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight")


# ------------------------------------------------------------------------------------------------------------ experts


def two(second: str = "transformer_2.", first: str = "transformer.") -> dict[str, Tensor]:
    high = {key: 2 * tensor for key, tensor in half(f"{first}blocks.0.attn1.to_q").items()}
    return high | {key: 3 * tensor for key, tensor in half(f"{second}blocks.0.attn1.to_q").items()}


def run(*arguments: object) -> int:
    return run_script(lambda: convert_lora_to_comfy.main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("second", SECOND)
def test_a_file_of_the_second_expert_alone_says_so(tmp_path, second):
    path = written(tmp_path / "l.safetensors", half(f"{second}blocks.0.attn1.to_q"), {"author": "me"})
    lora = read_lora(path)
    assert lora.metadata == {"author": "me", "expert": LOW} and list(read_experts(path)) == [""]
    first = written(tmp_path / "l.safetensors", half("transformer.blocks.0.attn1.to_q"))
    assert "expert" not in read_lora(first).metadata
    stated = written(tmp_path / "l.safetensors", half(f"{second}blocks.0.attn1.to_q"), {"expert": HIGH})
    assert read_lora(stated).metadata["expert"] == HIGH


@pytest.mark.parametrize(("first", "second"), [("transformer.", "transformer_2."), ("pipe.dit.", "pipe.dit2.")])
def test_a_file_with_both_experts_is_read_as_two_and_converted_to_two_files(tmp_path, capsys, first, second):
    path = written(tmp_path / "style.safetensors", two(second, first), {"author": "me"})
    found = read_experts(path)
    assert {name: lora.pairs[Q].down[0, 0].item() for name, lora in found.items()} == {HIGH: 2.0, LOW: 3.0}
    with pytest.raises(LoraError, match="holds the LoRAs of two experts. Make a file for each first"):
        read_lora(path)
    assert run("--input_lora", path) == 0 and capsys.readouterr().out.count("wrote") == 2
    outputs = sorted(file for file in tmp_path.iterdir() if file != path)
    assert [file.name for file in outputs] == [
        "style_comfy_high_noise.safetensors",
        "style_comfy_low_noise.safetensors",
    ]
    for file, expert, value in zip(outputs, (HIGH, LOW), (2.0, 3.0), strict=True):
        assert metadata_of(file) == {"author": "me", "expert": expert}
        assert load_file(file)[f"diffusion_model.{Q}.lora_A.weight"].eq(value).all()
    assert run("--input_lora", path, "--output_lora", tmp_path / "x.safetensors", "--to", "diffusers") == 0
    assert {file.name for file in tmp_path.glob("x*")} == {"x_high_noise.safetensors", "x_low_noise.safetensors"}


def test_each_expert_gets_the_alpha_that_its_own_metadata_state(tmp_path: Path):
    said = '{"transformer.lora_alpha": 4, "transformer.r": 2, "transformer_2.lora_alpha": 6, "transformer_2.r": 2}'
    path = written(tmp_path / "l.safetensors", two(), {"lora_adapter_metadata": said})
    assert {name: lora.pairs[Q].alpha for name, lora in read_experts(path).items()} == {HIGH: 4.0, LOW: 6.0}
    alone = written(
        tmp_path / "l.safetensors", half("transformer_2.blocks.0.attn1.to_q"), {"lora_adapter_metadata": said}
    )
    assert read_lora(alone).pairs[Q].alpha == 6.0


def test_alpha_tensors_belong_to_the_expert_of_their_prefix(tmp_path):
    tensors = two() | {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(5.0)}
    found = read_experts(written(tmp_path / "l.safetensors", tensors))
    assert {name: lora.pairs[Q].alpha for name, lora in found.items()} == {HIGH: 5.0, LOW: None}

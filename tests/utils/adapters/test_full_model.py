import json

import torch
from safetensors.torch import load_file

from tests.tiny import FAMILY, TINY_SHAPE, tiny_text_encoder, tiny_transformer, tiny_vae
from utils.adapters.full_model import write_pth, write_text_encoder, write_transformer, write_vae
from wan.modules.model import WanModel, is_fp32


def test_a_transformer_is_written_in_bf16_except_for_what_computes_in_fp32(tmp_path):
    model = tiny_transformer()
    write_transformer(tmp_path / "new" / "folder", model, FAMILY)
    weights = load_file(tmp_path / "new" / "folder" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if is_fp32(name)} == {torch.float32}
    assert {weight.dtype for name, weight in weights.items() if not is_fp32(name)} == {torch.bfloat16}
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name].float(), weight if is_fp32(name) else weight.bfloat16().float())
    WanModel(TINY_SHAPE).load_state_dict(weights, strict=True)


def test_the_config_has_the_fields_of_the_released_one(tmp_path):
    write_transformer(tmp_path, tiny_transformer(), FAMILY)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {
        **{"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"},
        **{"dim": 48, "eps": 1e-6, "ffn_dim": 96, "freq_dim": 32, "in_dim": 16, "num_heads": 2, "num_layers": 2},
        **{"out_dim": 16, "text_len": 64},
    }


def test_vae_and_text_encoder_are_flat_dictionaries_of_bf16_that_load_without_unpickling(tmp_path):
    vae, encoder = tiny_vae(), tiny_text_encoder()
    write_vae(tmp_path / "model", vae, FAMILY)
    write_text_encoder(tmp_path / "model", encoder, FAMILY)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"]
    for name, module in zip(names, (vae, encoder), strict=True):
        state = torch.load(tmp_path / "model" / name, weights_only=True)
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[key], weight.bfloat16()) for key, weight in module.state_dict().items())


def test_equal_weights_give_equal_files_whatever_their_names(tmp_path):
    for name in ("one", "other"):
        write_pth(tmp_path / f"{name}.pth", tiny_vae())
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()

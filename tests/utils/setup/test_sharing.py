"""What files that are given to others say of their run: no path and no prompt, but which LoRA was fused."""

import json
from pathlib import Path

import pytest

from utils.adapters.provenance import FusedRecord, read_records
from utils.setup.sharing import shareable

FILE = Path("fox.safetensors")
OPTIONS = {"fuse_lora": "/srv/me/loras/style.safetensors", "fuse_lora_weight": 0.5, "sample_prompts": ["a secret"]}


def test_the_options_of_a_run_are_left_out_but_for_which_lora_was_fused():
    found = shareable({"steps": "7", "options": json.dumps(OPTIONS)}, FILE)
    assert found.keys() == {"steps", "fused_lora"} and "srv" not in str(found) and "secret" not in str(found)
    assert read_records(found, FILE) == [FusedRecord("style.safetensors", None, 0.5)]
    assert shareable({"options": json.dumps(OPTIONS), "fused_lora": "[]"}, FILE) == {"fused_lora": "[]"}
    assert shareable({"options": "{"}, FILE) == shareable({"options": '{"fuse_lora": ""}'}, FILE) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/srv/me/models/Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B"),
        (r"D:\models\Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B"),
        ("../models/wan/", "wan"),
        ("~/wan", "wan"),
        ("/", "/"),
        ("Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("high.safetensors + low.safetensors", "high.safetensors + low.safetensors"),
        ("/a/high.safetensors + /b/low.safetensors", "high.safetensors + low.safetensors"),
    ],
)
def test_a_base_model_is_named_without_where_it_is(name, expected):
    assert shareable({"base_model": name}, FILE) == {"base_model": expected}


def test_metadata_without_anything_private_stay():
    metadata = {"base_model": "wan", "ss_network_dim": "4", "modelspec.title": "fox / 7", "empty": ""}
    assert shareable(metadata, FILE) == metadata

import pytest

from tests.loras import NAMES
from tests.manifests import FOLDER, load_manifest
from tests.peers import to_diffusers
from wan.names import diffusers_name, is_parameter, official_name

RELEASED = sorted(path.stem for path in FOLDER.glob("wan2.?_*") if not path.stem.endswith("vae"))
BEYOND = ("control_adapter", "ref_conv")  # of models that are refused


@pytest.mark.parametrize(("official", "diffusers", "underscored"), NAMES)
def test_a_name_is_the_same_in_every_spelling(official, diffusers, underscored):
    assert {official_name(official), official_name(diffusers), official_name(underscored)} == {official}
    assert diffusers_name(official) == diffusers


@pytest.mark.parametrize("manifest", RELEASED)
def test_every_tensor_of_a_released_model_has_the_diffusers_name_of_the_key_map(manifest):
    for name in load_manifest(manifest):
        if name.startswith(BEYOND):
            continue
        module, _, kind = name.rpartition(".")
        named, expected = (name, to_diffusers(name)) if is_parameter(name) else (module, to_diffusers(name))
        suffix = "" if is_parameter(name) else f".{kind}"
        assert diffusers_name(named) + suffix == expected
        assert official_name(diffusers_name(named)) == named


def test_norms_trade_numbers_between_official_and_diffusers_names():
    assert official_name("blocks.3.norm2") == "blocks.3.norm3" and diffusers_name("blocks.3.norm3") == "blocks.3.norm2"
    assert official_name("scale_shift_table") == "head.modulation"
    assert official_name("blocks.3.scale_shift_table") == "blocks.3.modulation"


@pytest.mark.parametrize("name", ["blocks.0", "blocks.x.ffn.0", "blocks.01.ffn.0", "xblocks.0.ffn.0", "self_attn.q"])
def test_a_name_outside_wan_is_not_guessed(name):
    assert official_name(name) is None

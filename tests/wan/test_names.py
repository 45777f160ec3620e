import pytest

from tests.loras import NAMES
from wan.names import diffusers_name, official_name


@pytest.mark.parametrize(("official", "diffusers", "underscored"), NAMES)
def test_a_name_is_the_same_in_every_spelling(official, diffusers, underscored):
    assert {official_name(official), official_name(diffusers), official_name(underscored)} == {official}
    assert diffusers_name(official) == diffusers


def test_norms_trade_numbers_between_official_and_diffusers_names():
    assert official_name("blocks.3.norm2") == "blocks.3.norm3" and diffusers_name("blocks.3.norm3") == "blocks.3.norm2"
    assert official_name("scale_shift_table") == "head.modulation"
    assert official_name("blocks.3.scale_shift_table") == "blocks.3.modulation"


@pytest.mark.parametrize("name", ["blocks.0", "blocks.x.ffn.0", "blocks.01.ffn.0", "xblocks.0.ffn.0", "self_attn.q"])
def test_a_name_outside_wan_is_not_guessed(name):
    assert official_name(name) is None

import json
from dataclasses import replace

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from tests.loras import half, make_pair, metadata_of, written
from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_metadata import NUMBER_KEYS
from utils.adapters.lora_reader import read_lora
from utils.adapters.lora_writer import LAYOUTS, to_state_dict, write_lora
from utils.adapters.lycoris import Lycoris


def test_alpha_comes_from_the_metadata_of_diffusers_where_no_tensor_states_it(tmp_path):
    config = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"^blocks.0.attn1.to_q": 5, "ffn.net.2": 6.5}}
    tensors = half("transformer.blocks.0.attn1.to_q") | half("transformer.blocks.0.attn1.to_k")
    tensors |= half("transformer.blocks.0.ffn.net.2") | half("transformer.proj_out")
    tensors |= {"transformer.proj_out.alpha": torch.tensor(1.0)}
    for prefix in ("transformer.", ""):
        said = json.dumps({prefix + key: value for key, value in config.items()})
        lora = read_lora(written(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": said, "author": "me"}))
        alphas = {name: pair.alpha for name, pair in lora.pairs.items()}
        wanted = {"blocks.0.self_attn.q": 5.0, "blocks.0.self_attn.k": 8.0, "blocks.0.ffn.2": 6.5, "head.head": 1.0}
        assert alphas == wanted and lora.metadata == {"author": "me"}


def test_rank_stabilised_scaling_becomes_an_alpha(tmp_path):
    said = json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    path = written(
        tmp_path / "l.safetensors",
        half("transformer.blocks.0.attn1.to_q", (4, 5), (6, 4)),
        {"lora_adapter_metadata": said},
    )
    assert read_lora(path).pairs["blocks.0.self_attn.q"].scale == 8 / 4**0.5


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "wan_lora_scaling"])
@pytest.mark.parametrize(
    "value",
    [
        "{",
        "[1]",
        '"x"',
        '{"lora_alpha": "high", "alpha": {"a": "high"}}',
        '{"lora_alpha": [], "alpha": {}, "shapes": {"a": 1}}',
        '{"lora_alpha": 1, "alpha_pattern": {"(": 2}, "alpha": 1}',
    ],
)
def test_metadata_of_another_form_is_refused(tmp_path, key, value):
    path = written(tmp_path / "bad.safetensors", half(), {key: value})
    with pytest.raises(LoraError, match=f"the metadata {key}"):
        read_lora(path)


OWN = {
    "no table of alphas": {"shapes": {}},
    "no table of shapes": {"alpha": {}},
    "a list of alphas": {"alpha": [1], "shapes": {}},
    "an alpha in words": {"alpha": {"head.head": "8"}, "shapes": {}},
    "an alpha of NaN": {"alpha": {"head.head": float("nan")}, "shapes": {}},
    "an infinite alpha": {"alpha": {"head.head": float("-inf")}, "shapes": {}},
    "an alpha beyond fp32": {"alpha": {"head.head": 1e39}, "shapes": {}},
    "an alpha beyond every float": {"alpha": {"head.head": 10**400}, "shapes": {}},
    "an alpha of yes or no": {"alpha": {"head.head": True}, "shapes": {}},
    "no alpha": {"alpha": {"head.head": None}, "shapes": {}},
    "a shape in words": {"alpha": {}, "shapes": {"head.head": "65"}},
    "a shape of words": {"alpha": {}, "shapes": {"head.head": ["6", "5"]}},
    "a shape with a fraction": {"alpha": {}, "shapes": {"head.head": [6, 5.5]}},
    "a shape with NaN": {"alpha": {}, "shapes": {"head.head": [6, float("nan")]}},
    "a shape with zero": {"alpha": {}, "shapes": {"head.head": [6, 0]}},
    "a negative shape": {"alpha": {}, "shapes": {"head.head": [-6, -5]}},
    "an empty shape": {"alpha": {}, "shapes": {"head.head": []}},
    "a flat shape": {"alpha": {}, "shapes": {"head.head": [30]}},
    "a shape of a thousand sizes": {"alpha": {}, "shapes": {"head.head": [1] * 1000}},
    "a shape of yes and no": {"alpha": {}, "shapes": {"head.head": [True, True]}},
}
PEFT = {
    "an alpha in words": {"lora_alpha": "8"},
    "an alpha of NaN": {"lora_alpha": float("nan")},
    "an alpha beyond every float": {"lora_alpha": 10**400},
    "an alpha of yes or no": {"lora_alpha": True},
    "a list of patterns": {"alpha_pattern": ["to_q"]},
    "a pattern for words": {"alpha_pattern": {"to_q": "8"}},
    "a pattern for nothing": {"alpha_pattern": {"to_q": None}},
    "a pattern for infinity": {"alpha_pattern": {"to_q": float("inf")}},
    "rank stabilisation in words": {"lora_alpha": 8, "use_rslora": "no"},
    "rank stabilisation in numbers": {"lora_alpha": 8, "use_rslora": 1},
}
CONTENTS = [("wan_lora_scaling", what, json.dumps(content)) for what, content in OWN.items()]
CONTENTS += [("lora_adapter_metadata", what, json.dumps(content)) for what, content in PEFT.items()]
CONTENTS += [
    (key, what, text)
    for key in ("wan_lora_scaling", "lora_adapter_metadata")
    for what, text in (("nested lists", "[" * 10**5), ("a number of 5000 digits", "1" * 5000), ("nothing", ""))
]


@pytest.mark.parametrize(("key", "what", "text"), CONTENTS, ids=[f"{key}: {what}" for key, what, _ in CONTENTS])
def test_every_value_in_the_metadata_is_checked_before_it_is_used(tmp_path, key, what, text):
    path = written(tmp_path / "bad.safetensors", half("head.head"), {key: text})
    with pytest.raises(LoraError, match=f"the metadata {key} gives no usable ") as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


# ---------------------------------------------------------------------------------------------- which statement counts

RANKED = half("diffusion_model.blocks.0.self_attn.q", (4, 5), (6, 4)) | half(
    "diffusion_model.head.head", (2, 5), (6, 2)
)
OUTSIDE = {
    "lora_adapter_metadata": '{"transformer.lora_alpha": %s}',
    "wan_lora_scaling": '{"alpha": {"blocks.0.self_attn.q": %s, "head.head": %s}, "shapes": {}}',
    "lora_alpha": "%s",
    "network_alpha": "%s",
    "ss_network_alpha": "%s",
}


UNSTATED = "states no alpha: it is taken to be the rank, so the scale is 1"


def said(key, alpha):
    return {key: OUTSIDE[key].replace("%s", str(alpha))}


def alphas(lora):
    return [lora.pairs[name].alpha for name in ("blocks.0.self_attn.q", "head.head")]


@pytest.mark.parametrize("key", OUTSIDE)
def test_an_alpha_that_is_stated_outside_of_the_tensors_alone_counts_and_is_written(tmp_path, key):
    lora = read_lora(written(tmp_path / "l.safetensors", RANKED, said(key, 16)))
    assert alphas(lora) == [16.0, 16.0] and lora.notes == ()
    assert [pair.scale for pair in lora.pairs.values()] == [4.0, 8.0]
    for layout in LAYOUTS:
        path = tmp_path / ("folder" if layout == "peft" else "out.safetensors")
        write_lora(path, lora, layout)
        again = read_lora(path)
        assert alphas(again) == [16.0, 16.0] and again.notes == ()


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_tensor_counts_before_what_the_metadata_say_with_one_note(tmp_path, key):
    """A resized file keeps the metadata of the file that it was made from."""
    tensors = RANKED | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    lora = read_lora(written(tmp_path / "l.safetensors", tensors, said(key, 16)))
    of_all = key in NUMBER_KEYS  # what is not the number of all modules is not taken for any
    assert alphas(lora) == [2.0, None if of_all else 16.0] and len(lora.remarks("l")) == 1 + of_all
    (note,) = lora.notes
    assert f"{key} says alpha 16, the tensors 2 (blocks.0.self_attn.q): these count" in note
    agreeing = tensors | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(0.1).bfloat16()}
    assert read_lora(written(tmp_path / "l.safetensors", agreeing, said(key, 0.1))).notes == ()


def test_a_note_names_the_first_module_and_counts_the_others(tmp_path):
    stems = ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.head.head")
    tensors = RANKED | {f"{stem}.alpha": torch.tensor(2.0) for stem in stems}
    (note,) = read_lora(written(tmp_path / "l.safetensors", tensors, {"network_alpha": "8"})).notes
    assert "says alpha 8, the tensors 2 (blocks.0.self_attn.q and 1 more): these count" in note


@pytest.mark.parametrize("first", OUTSIDE)
@pytest.mark.parametrize("other", OUTSIDE)
def test_two_statements_outside_of_the_tensors_that_disagree_are_an_error_with_both(tmp_path, first, other):
    if first == other:
        return
    path = written(tmp_path / "l.safetensors", RANKED, said(first, 8) | said(other, 4))
    with pytest.raises(LoraError, match="the alpha of blocks.0.self_attn.q is stated twice, and differently") as caught:
        read_lora(path)
    assert f"metadata {first} says 8" in str(caught.value) and f"metadata {other} says 4" in str(caught.value)
    assert alphas(read_lora(written(tmp_path / "l.safetensors", RANKED, said(first, 8) | said(other, 8.0)))) == [8, 8]
    tensors = RANKED | {
        "diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0),
        "diffusion_model.head.head.alpha": torch.tensor(8.0),
    }
    lora = read_lora(written(tmp_path / "l.safetensors", tensors, said(first, 8) | said(other, 4)))
    assert alphas(lora) == [2.0, 8.0] and len(lora.notes) == 2


@pytest.mark.parametrize("text", ["Dynamic", "None", "", "nan", "inf", "1e39", "half"])
@pytest.mark.parametrize("key", ["ss_network_alpha", "network_alpha", "lora_alpha"])
def test_words_in_place_of_a_number_state_nothing_and_nothing_is_written(tmp_path, key, text):
    lora = read_lora(written(tmp_path / "l.safetensors", RANKED, {key: text}))
    assert alphas(lora) == [None, None] and lora.remarks("l") == [f"l {UNSTATED}"]
    for layout in ("comfy", "kohya", "wantraining"):
        write_lora(tmp_path / "out.safetensors", lora, layout)
        assert alphas(read_lora(tmp_path / "out.safetensors")) == [None, None]
        assert not any("alpha" in name for name in load_file(tmp_path / "out.safetensors"))


def test_what_states_alphas_in_one_way_is_not_copied_into_a_file_that_states_them_in_another(tmp_path):
    metadata = {key: value for name in OUTSIDE for key, value in said(name, 8).items()} | {"author": "me"}
    lora = read_lora(written(tmp_path / "l.safetensors", RANKED, metadata))
    assert lora.metadata == {"author": "me", "ss_network_alpha": "8"}


# ------------------------------------------------------------------------------------------- patterns in a LoraConfig

MODULES = ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.10.attn1.to_q", "blocks.0.attn2.to_q"]
MODULES += ["blocks.0.ffn.net.2", "proj_out"]
PATTERNS = [
    *("^blocks.0.attn1.to_q", r"^blocks\.0\.attn1\.to_q", "^to_q", "^proj_out", "^blocks.0.attn1.to_q$"),
    *("blocks.0.attn1.to_q", "attn1.to_q", "to_q", "0.attn1.to_q", "net.2", "proj_out", "to_q$", "to_k"),
    *(".*attn1.to_q", r".*\.attn1\.to_q", ".*to_q", ".*q", ".*0.attn1.to_q", ".*out", ".*blocks.0.attn1.to_q"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_the_modules_that_it_means_in_peft(tmp_path, pattern):
    alphas = {pattern: 5.0, "to_q": 6.0, ".*out": 7.0}
    said = json.dumps({"lora_alpha": 8.0, "alpha_pattern": alphas})
    tensors = {key: tensor for name in MODULES for key, tensor in half(f"transformer.{name}").items()}
    pairs = read_lora(written(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": said})).pairs
    wanted = [alphas.get(get_pattern_key(list(alphas), name), 8.0) for name in MODULES]
    names = ["blocks.0.self_attn.q", "blocks.1.self_attn.q", "blocks.10.self_attn.q", "blocks.0.cross_attn.q"]
    assert [pairs[name].alpha for name in [*names, "blocks.0.ffn.2", "head.head"]] == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(([a-z0-9._])+)+!",
        ".*.*.*to_q",
        ".*",
        "^",
        "",
        "[",
        "to_(q|k)",
        r"blocks.\d.attn1",
        "to_q|to_k",
        "a{9}",
    ]
    + ["^.*to_q", "to_.+", "blocks.0\nattn1", "a" * 10**6 + "*"],
)
def test_a_regular_expression_from_a_file_is_refused_and_never_run(tmp_path, pattern):
    said = json.dumps({"lora_alpha": 8, "alpha_pattern": {pattern: 5}})
    path = written(tmp_path / "l.safetensors", half("transformer.blocks.0.attn1.to_q"), {"lora_adapter_metadata": said})
    with pytest.raises(LoraError, match="alpha_pattern has .*, a regular expression; name modules") as caught:
        read_lora(path)
    assert len(str(caught.value)) < 500 + len(str(path))


# ------------------------------------------------------------------------------------------ files of earlier versions


def test_metadata_that_version_0_1_wrote_is_read_and_written_unchanged(tmp_path):
    """Copied from files that version 0.1 wrote."""
    lora = LoraFile(
        {
            "blocks.0.self_attn.q": make_pair(rank=2, alpha=3.0),
            "blocks.0.self_attn.k": make_pair(rank=2, alpha=3.0),
            "blocks.1.ffn.2": make_pair(rank=4, alpha=0.1),
        }
    )
    peft = (
        r'{"transformer.alpha_pattern": {"^blocks\\.1\\.ffn\\.net\\.2": 0.1}, "transformer.lora_alpha": 3.0, '
        r'"transformer.r": 2, "transformer.rank_pattern": {"^blocks\\.1\\.ffn\\.net\\.2": 4}, '
        r'"transformer.target_modules": ["blocks.0.attn1.to_k", "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"]}'
    )
    own = '{"alpha": {"blocks.0.self_attn.k": 3.0, "blocks.0.self_attn.q": 3.0, "blocks.1.ffn.2": 0.1}, "shapes": {}}'
    for layout, metadata in (
        ("diffusers", {"lora_adapter_metadata": peft}),
        ("wantraining", {"wan_lora_scaling": own}),
    ):
        write_lora(tmp_path / "lora.safetensors", lora, layout)
        assert metadata_of(tmp_path / "lora.safetensors") == metadata
        found = read_lora(tmp_path / "lora.safetensors").pairs
        assert {name: pair.alpha for name, pair in found.items()} == {n: pair.alpha for n, pair in lora.pairs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_written_file_states_the_rank_and_alpha_that_it_has(tmp_path, layout):
    """What its source said of them may be old, and would contradict what the layout says."""
    stale = {"ss_network_dim": "128", "ss_network_alpha": "16", "ss_network_module": "networks.lora_wan"}
    lora = LoraFile({"head.head": make_pair(rank=2, alpha=2.0), "img_emb.proj.1": make_pair(alpha=2.0)}, metadata=stale)
    path = tmp_path / ("folder" if layout == "peft" else "out.safetensors")
    write_lora(path, lora, layout)
    again = read_lora(path)
    assert again.notes == () and {pair.scale for pair in again.pairs.values()} == {1.0}
    assert (again.metadata["ss_network_dim"], again.metadata["ss_network_alpha"]) == ("2", "2")
    mixed = LoraFile({"head.head": make_pair(rank=2, alpha=2.0), "blocks.0.ffn.0": make_pair(rank=4)}, metadata=stale)
    _, metadata = to_state_dict(mixed, layout)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    unknown = LoraFile({"head.head": make_pair(alpha=None)}, metadata=stale)
    assert "ss_network_alpha" not in to_state_dict(unknown, layout)[1]


@pytest.mark.parametrize("layout", ["comfy", "kohya"])
def test_a_rank_and_an_alpha_that_nothing_has_any_more_are_not_stated(tmp_path, layout):
    """A LoKr of whole factors has neither, and full changes have none."""
    stale = {"ss_network_dim": "4", "ss_network_alpha": "1"}
    whole = Lycoris({"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(3, 4)}, 100000.0)
    for lora in (LoraFile({}, lycoris={"head.head": whole}), LoraFile({}, {"head.head.diff": torch.ones(6, 5)})):
        tensors, metadata = to_state_dict(replace(lora, metadata=stale), layout)
        assert not metadata
        again = read_lora(written(tmp_path / "l.safetensors", tensors, stale))
        assert again.notes == () and again.modules == {"head.head"}

"""Every tensor of every released part is known by each of its names, at full size, by the published maps."""

import json

import pytest

from tests.layouts import to_diffusers
from tests.manifests import load_manifest
from tests.tiny import DATA
from wan.checkpoints.spellings import PREFIXES, SPELLINGS, find_spelling, spellings_of

# Layout, manifest, part
MAPS = [
    ("vae21_diffusers", "wan2.1_vae", "vae"),
    ("vae22_diffusers", "wan2.2_vae", "vae"),
    ("umt5_transformers", "t5_umt5_xxl_enc", "text_encoder"),
    ("clip_transformers", "clip_xlm_roberta_vit_h_14", "clip"),
]
TRANSFORMERS = ["wan2.1_t2v_1.3b", "wan2.1_i2v_14b_480p", "wan2.1_flf2v_14b_720p", "wan2.1_fun_14b_inp"]
TRANSFORMERS += ["wan2.2_t2v_a14b_high_noise", "wan2.2_i2v_a14b_low_noise", "wan2.2_ti2v_5b", "wan2.1_vace_14b"]


def pairs_of(layout: str) -> dict[str, list[str]]:
    """Official name -> the stored names that are joined to it, for all tensors that are read."""
    pairs = json.loads((DATA / f"keymap_{layout}.json").read_text(encoding="utf-8"))["pairs"]
    unread = ("visual.head",)  # transposed, and not used
    return {
        official: [stored] if isinstance(stored, str) else stored
        for official, stored in pairs.items()
        if official not in unread
    }


@pytest.mark.parametrize(("layout", "manifest", "part"), MAPS)
def test_our_map_is_the_published_one_in_both_directions_with_nothing_left_over(layout, manifest, part):
    pairs = pairs_of(layout)
    spelling, prefix = find_spelling([name for names in pairs.values() for name in names], part)
    assert prefix == ""
    found: dict[str, dict[int, str]] = {}
    for stored in (name for names in pairs.values() for name in names):
        official, number = spelling.target(stored)
        assert number not in found.setdefault(official, {}) and not stored.startswith(spelling.unread or ("\0",))
        found[official][number] = stored
    assert {official: [rows[number] for number in sorted(rows)] for official, rows in found.items()} == pairs
    released = {name for name in load_manifest(manifest) if not name.startswith(("textual.", "log_scale"))}
    assert released - pairs.keys() == ({"visual.head"} if part == "clip" else set())


def test_the_names_of_a_clip_are_known_with_the_prefix_of_files_and_with_what_is_beside_them():
    stored = [name for names in pairs_of("clip_transformers").values() for name in names]
    beside = ["visual_projection.weight", "text_model.embeddings.position_ids", "logit_scale"]
    spelling, _ = find_spelling([f"vision_model.{name}" for name in stored], "clip")
    assert [spelling.target(f"vision_model.{name}") for name in stored] == [spelling.target(name) for name in stored]
    for name in (*beside, "vision_model.embeddings.position_ids", "embeddings.position_ids"):
        assert name.startswith(spelling.unread)


@pytest.mark.parametrize("manifest", TRANSFORMERS)
def test_a_transformer_is_known_by_the_names_of_diffusers_and_by_its_own(manifest):
    official = list(load_manifest(manifest))
    stored = [to_diffusers(name) for name in official]
    assert not set(stored) & {name for name in official if not name.startswith(("patch_emb", "vace_patch_emb"))}
    spelling, prefix = find_spelling(stored, "transformer")
    assert (prefix, [spelling.target(name) for name in stored]) == ("", [(name, 0) for name in official])
    own, _ = find_spelling(official, "transformer")
    assert [own.target(name) for name in official] == [(name, 0) for name in official] and own is not spelling


@pytest.mark.parametrize(("manifest", "part"), [(manifest, part) for _, manifest, part in MAPS])
def test_official_names_are_what_they_are(manifest, part):
    names = [name for name in load_manifest(manifest) if not name.startswith(("textual.", "log_scale"))]
    spelling, prefix = find_spelling(names, part)
    assert (prefix, [spelling.target(name) for name in names]) == ("", [(name, 0) for name in names])
    assert not any(name.startswith(spelling.unread or ("\0",)) for name in names)


# By the code of open_clip: the official names of Wan's CLIP were made from these.
OPEN_CLIP = {
    "visual.class_embedding": "visual.cls_embedding",
    "visual.positional_embedding": "visual.pos_embedding",
    "visual.conv1.weight": "visual.patch_embedding.weight",
    "visual.proj": "visual.head",
    **{f"visual.ln_{x}.{leaf}": f"visual.{x}_norm.{leaf}" for x in ("pre", "post") for leaf in ("weight", "bias")},
}
for _block in range(32):
    _theirs, _ours = f"visual.transformer.resblocks.{_block}", f"visual.transformer.{_block}"
    for _leaf in ("weight", "bias"):
        OPEN_CLIP |= {
            f"{_theirs}.ln_1.{_leaf}": f"{_ours}.norm1.{_leaf}",
            f"{_theirs}.ln_2.{_leaf}": f"{_ours}.norm2.{_leaf}",
            f"{_theirs}.attn.in_proj_{_leaf}": f"{_ours}.attn.to_qkv.{_leaf}",
            f"{_theirs}.attn.out_proj.{_leaf}": f"{_ours}.attn.proj.{_leaf}",
            f"{_theirs}.mlp.c_fc.{_leaf}": f"{_ours}.mlp.0.{_leaf}",
            f"{_theirs}.mlp.c_proj.{_leaf}": f"{_ours}.mlp.2.{_leaf}",
        }


def test_the_names_of_open_clip_are_those_of_the_whole_encoder():
    released = {name for name in load_manifest("clip_xlm_roberta_vit_h_14") if name.startswith("visual.")}
    assert set(OPEN_CLIP.values()) == released and len(OPEN_CLIP) == len(released)
    spelling, _ = find_spelling(OPEN_CLIP, "clip")
    assert {name: spelling.target(name) for name in OPEN_CLIP} == {name: (ours, 0) for name, ours in OPEN_CLIP.items()}
    for beside in (
        "transformer.resblocks.0.ln_1.weight",
        "token_embedding.weight",
        "text.transformer.x",
        "logit_scale",
    ):
        assert beside.startswith(spelling.unread)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: f"{spelling.part}:{spelling.signs[0]}")
def test_one_sign_is_enough_below_every_prefix(spelling, prefix):
    for sign in spelling.signs:
        assert find_spelling({prefix + sign, "other"}, spelling.part) == (spelling, prefix)
        assert spellings_of({prefix + sign, "other"}) == [(spelling, prefix)]


def test_a_checkpoint_of_several_parts_has_each_below_its_prefix():
    names = {"model.diffusion_model.head.modulation", "vae.decoder.middle.0.residual.0.gamma"}
    names |= {"text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"}
    found = {spelling.part: prefix for spelling, prefix in spellings_of(names)}
    prefixes = {"transformer": "model.diffusion_model.", "vae": "vae."}
    assert found == prefixes | {"text_encoder": "text_encoders.umt5xxl.transformer."}
    assert find_spelling(names, "clip") is None


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "clip"])
def test_names_of_nothing_known_stay_as_they_are(part):
    names = ["", ".", "weight", "blocks.0.", "encoder.layers.x.weight", "visual.transformer.resblocks..ln_1.weight"]
    names += ["encoder.block.0.layer.9.x.weight", "encoder.down_blocks.99.x", "encoder.layers.0.nothing.weight"]
    for spelling in SPELLINGS:
        if spelling.part == part:
            assert [spelling.target(name) for name in names] == [(name, 0) for name in names]

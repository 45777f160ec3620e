"""The rows of released models: what follows from a row, and which row a checkpoint belongs to."""

from dataclasses import replace

import pytest

from tests.tiny import FAMILY
from wan.configs import FAMILIES, Traits, match_family, named_family
from wan.configs.grid import Grid

ALONE, EXPERTS = ("transformer",), ("high_noise", "low_noise")
T2V, I2V, FLF2V = Traits(1536, 16, 16), Traits(5120, 36, 16, True, False), Traits(5120, 36, 16, True, True)


def test_a_token_covers_4_frames_of_16_pixels_squared_or_of_32_where_the_vae_halves_once_more():
    coarse = FAMILIES["wan2.2-ti2v-5B"]
    assert coarse.grid == Grid(frame=4, side=32)
    assert {row.grid for row in FAMILIES.values() if row is not coarse} == {Grid(frame=4, side=16)}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_experts_of_a_release_share_all_noise_levels(family):
    intervals = sorted(expert.sigmas for expert in family.experts)
    assert [expert.sigmas for expert in family.experts] == intervals[::-1]
    assert (intervals[0][0], intervals[-1][1]) == (0.0, 1.0)
    assert all(first[1] == second[0] for first, second in zip(intervals, intervals[1:], strict=False))
    assert len({expert.name for expert in family.experts}) == len(family.experts)


def test_what_is_downloaded_of_a_release_is_named_by_its_row():
    patterns = ("config.json", "diffusion_pytorch_model*", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth")
    assert FAMILY.hub_patterns == (*patterns, "google/umt5-xxl/*")
    assert FAMILY.config_files == ("config.json",)


def test_a_release_is_named_by_the_end_of_its_hub_name_in_any_case():
    assert named_family("Wan-AI/Wan2.1-T2V-14B") is FAMILIES["wan2.1-t2v-14B"]
    assert named_family("models/wan2.1-t2v-1.3b/") is FAMILIES["wan2.1-t2v-1.3B"]
    assert named_family("Wan-AI/Wan2.2-I2V-A14B-Diffusers") is FAMILIES["wan2.2-i2v-A14B"]
    assert named_family("alibaba-pai/Wan2.1-Fun-14B-InP") is FAMILIES["wan2.1-fun-14B-InP"]
    for name in ("Wan-AI/Wan2.1-T2V", "", "Diffusers", "-Diffusers"):
        assert named_family(name) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_knows_its_name_and_its_traits(name):
    row = FAMILIES[name]
    assert row.name == name and named_family(name) is row
    shape = row.shape
    positions = shape.image_positions > 0
    assert row.traits == Traits(shape.dim, row.in_dim, row.out_dim, row.clip != "", positions, row.task)
    assert shape.image_dim == (1280 if row.clip else 0)


def test_a_checkpoint_belongs_to_the_row_of_its_width_or_else_to_the_first_of_its_kind():
    assert match_family(replace(T2V, dim=5120), ALONE) is FAMILIES["wan2.1-t2v-14B"]
    for dim in (192, None, "1536", [], 1536):
        assert match_family(replace(T2V, dim=dim), ALONE) is FAMILIES["wan2.1-t2v-1.3B"]


def test_the_name_of_its_folder_decides_between_rows_with_the_same_transformers():
    small, large = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-i2v-14B-720P"]
    for dim in (5120, 192):
        traits = replace(I2V, dim=dim)
        assert match_family(traits, ALONE) is small
        assert match_family(traits, ALONE, "Wan2.1-I2V-14B-480P") is small
        assert match_family(traits, ALONE, "wan2.1-i2v-14b-720p") is large
        assert match_family(traits, ALONE, "Wan2.1-I2V-14B-720P-Diffusers") is large
        assert match_family(traits, ALONE, "Wan2.1-Fun-14B-InP") is FAMILIES["wan2.1-fun-14B-InP"]
        assert match_family(traits, ALONE, "Wan2.2-I2V-A14B") is small
    # A name does not make a 14B of a 1.3B model, nor an I2V of a T2V.
    assert match_family(T2V, ALONE, "Wan2.1-T2V-14B") is FAMILIES["wan2.1-t2v-1.3B"]
    assert match_family(replace(T2V, dim=5120), ALONE, "Wan2.1-I2V-14B-720P") is FAMILIES["wan2.1-t2v-14B"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_found_again_by_its_tensors_and_name(name):
    row = FAMILIES[name]
    known = replace(row.traits, task=None)  # which no tensor tells
    experts = [expert.name for expert in row.experts]
    assert match_family(known, experts, f"Wan-AI/{name}") is row
    for alone in experts:  # one expert is enough
        assert match_family(known, [alone], f"Wan-AI/{name}") is row
        assert row.allows_transformers([alone]) and not row.allows_transformers([alone, "other"])
    assert match_family(known, experts).shape == row.shape  # and without the name one with the same transformers


def test_image_tokens_and_positions_tell_apart_what_has_the_same_channels():
    assert match_family(I2V, ALONE) is FAMILIES["wan2.1-i2v-14B-480P"]
    assert match_family(FLF2V, ALONE) is FAMILIES["wan2.1-flf2v-14B-720P"]
    expert = replace(I2V, image=False)
    assert match_family(expert, EXPERTS) is match_family(expert, ["low_noise"]) is FAMILIES["wan2.2-i2v-A14B"]
    for traits, transformers in ((expert, ALONE), (I2V, EXPERTS), (FLF2V, EXPERTS)):
        assert match_family(traits, transformers) is None


def test_what_is_not_known_of_a_checkpoint_excludes_no_row():
    unknown = Traits(None, None, None)
    assert all(row.agrees(unknown) and row.agrees(row.traits) for row in FAMILIES.values())
    assert match_family(unknown, ALONE) is FAMILY and match_family(unknown, ["x"]) is None
    assert not FAMILY.agrees(replace(unknown, image=True)) and not FAMILY.agrees(replace(unknown, task="i2v"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_found_again_by_its_config_and_name(name):
    row = FAMILIES[name]
    experts = [expert.name for expert in row.experts]
    said = Traits(row.shape.dim, row.in_dim, None, image=row.clip != "", task=row.task)
    assert match_family(said, experts, f"Wan-AI/{name}") is row
    assert match_family(replace(said, dim=192), experts).task == row.task


@pytest.mark.parametrize(
    ("task", "in_dim", "transformers"),
    [
        ("i2v", 16, ALONE),
        ("t2v", 36, ALONE),
        ("x", 16, ALONE),
        ([], 16, ALONE),
        ("t2v", [], ALONE),
        ("t2v", 16, ("high_noise", "transformer")),
        ("ti2v", 48, EXPERTS),
        ("flf2v", 36, EXPERTS),
    ],
)
def test_a_checkpoint_of_another_kind_belongs_to_no_row(task, in_dim, transformers):
    assert match_family(Traits(1536, in_dim, None, task=task), transformers) is None


def test_small_videos_from_pictures_have_a_shift_of_their_own_whatever_release_makes_them():
    for release in ("wan2.1-i2v-14B-480P", "wan2.1-i2v-14B-720P"):
        shifts = [FAMILIES[release].shift_at(*size) for size in ((832, 480), (480, 832), (848, 480), (1280, 720))]
        assert shifts == [3.0, 3.0, 5.0, 5.0]
    assert {FAMILIES["wan2.1-flf2v-14B-720P"].shift_at(*size) for size in ((832, 480), (1280, 720))} == {16.0}
    assert FAMILY.shift_at(832, 480) == 5.0

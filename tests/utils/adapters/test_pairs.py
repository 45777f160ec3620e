"""Pairs of LoRAs: whose a file is by its name and metadata, and what one or two of them mean for a model."""

from pathlib import Path

import pytest

from tests.loras import half, written
from utils.adapters.pairs import (
    expert_of,
    find_pair,
    lora_of,
    parse_also_lora,
    remarks,
    resolve_also_loras,
    resolve_experts,
    trained_for,
    with_expert,
)
from utils.common.errors import UserError

HIGH, LOW = "high_noise", "low_noise"
TWO, ONE = (HIGH, LOW), ("transformer",)


def lora(path: Path, expert: str | None = None) -> Path:
    return written(path, half(), {"expert": expert} if expert else {"format": "pt"})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pairs as different trainers name them, a half of one, and files of no expert."""
    names = [f"wan-lora_{expert}-00000100.safetensors" for expert in TWO]
    names += [f"wan-lora-00000200{average}_{expert}.safetensors" for expert in TWO for average in ("", "-ema")]
    names += ["high_noise_model.safetensors", "low_noise_model.safetensors"]
    names += ["style_HighNoise.safetensors", "style_LowNoise.safetensors", "half_high_noise.safetensors"]
    names += ["double_high.safetensors", "double-high.safetensors", "double_low.safetensors", "plain.safetensors"]
    for name in names:
        lora(tmp_path / name)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan-lora_high_noise-00000100", HIGH),
        ("wan-lora_low_noise-00000100-ema", LOW),
        ("wan-lora-00000100_high_noise", HIGH),
        ("wan-lora-00000100-ema_low_noise", LOW),
        ("high_noise_model", HIGH),
        ("low_noise_model", LOW),
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step", HIGH),
        ("Wan2.2_I2V_A14B_HIGH_lightx2v_4step_lora_rank_64_bf16", HIGH),
        ("X_HighNoise", HIGH),
        ("XLowNoise", LOW),
        ("foxHIGH", HIGH),
        ("x_lownoise_v2", LOW),
        ("x-high-noise", HIGH),
        ("x_hinoise", HIGH),
        ("Wan22-I2V-LOW-Fox", LOW),
        ("fox_high", HIGH),
        ("fox.low.v1", LOW),
        ("HIGH14B-fox", HIGH),
        ("low_poly_high_noise", HIGH),
        ("high_noise_lora_high", HIGH),
        ("X-H", None),
        ("fox", None),
        ("fox_high_low", None),
        ("high_noise_or_low_noise", None),
        ("flow_noise", None),
        ("yellow", None),
        ("thigh", None),
        ("highlights", None),
        ("lower", None),
        ("low_poly", None),
        ("high-quality-fox", None),
        ("low_light_city", None),
    ],
)
def test_a_name_says_its_expert_with_one_of_two_words(name, expert):
    assert expert_of(Path("low_noise", f"{name}.safetensors"), {}) == expert


def test_metadata_counts_before_the_name_unless_it_names_no_expert():
    path = Path("fox_high_noise.safetensors")
    assert expert_of(path, {"expert": LOW}) == LOW
    assert expert_of(path, {"expert": "transformer"}) == HIGH
    assert expert_of(Path("fox.safetensors"), {"expert": HIGH}) == HIGH


@pytest.mark.parametrize(
    ("common", "high", "low"),
    [
        ("wan-lora-00000100", "wan-lora_high_noise-00000100", "wan-lora_low_noise-00000100"),
        ("wan-lora-00000200", "wan-lora-00000200_high_noise", "wan-lora-00000200_low_noise"),
        ("wan-lora-00000200-ema", "wan-lora-00000200-ema_high_noise", "wan-lora-00000200-ema_low_noise"),
        ("model", "high_noise_model", "low_noise_model"),
        ("style", "style_HighNoise", "style_LowNoise"),
    ],
)
def test_a_common_name_means_the_two_files_beside_it(folder, common, high, low):
    pair = find_pair(folder / f"{common}.safetensors")
    assert list(pair.items()) == [(HIGH, folder / f"{high}.safetensors"), (LOW, folder / f"{low}.safetensors")]


@pytest.mark.parametrize(
    "name",
    [
        "half.safetensors",
        "double.safetensors",
        "plain.safetensors",
        "wan-lora.safetensors",
        "wan-lora_high_noise-00000100.safetensors",
        "style",
        "nowhere/style.safetensors",
    ],
)
def test_a_name_without_exactly_two_halves_means_no_pair(folder, name):
    assert find_pair(folder / name) == {}


def test_a_file_that_exists_is_meant_before_a_pair_of_that_common_name(folder):
    lora(folder / "style.safetensors")
    assert find_pair(folder / "style.safetensors") == {}


def test_an_expert_is_appended_to_a_name_that_holds_no_such_word():
    assert with_expert(Path("out/flow.safetensors"), LOW) == Path("out/flow_low_noise.safetensors")
    for name in ("fox_high", "fox-Low-v2", "fox_low_noise", "HighNoise", "low_poly", "fox_hinoise"):
        with pytest.raises(UserError, match="Give a name without the word"):
            with_expert(Path(f"{name}.safetensors"), HIGH)


# ---------------------------------------------------------------------------------------------- the LoRAs of a model


def test_two_files_are_high_and_low_in_this_order(tmp_path):
    first, second = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors")
    assert list(resolve_experts([first, second], TWO).items()) == [(HIGH, first), (LOW, second)]


@pytest.mark.parametrize(("first", "second"), [(LOW, None), (None, HIGH), (LOW, HIGH)])
def test_files_that_say_otherwise_are_swapped(tmp_path, first, second):
    given = [lora(tmp_path / "a.safetensors", first), lora(tmp_path / "b.safetensors", second)]
    assert list(resolve_experts(given, TWO).items()) == [(HIGH, given[1]), (LOW, given[0])]


@pytest.mark.parametrize(("first", "second"), [(HIGH, None), (None, LOW), (HIGH, LOW)])
def test_files_that_say_the_same_keep_their_order(tmp_path, first, second):
    given = [lora(tmp_path / "a.safetensors", first), lora(tmp_path / "b.safetensors", second)]
    assert resolve_experts(given, TWO) == {HIGH: given[0], LOW: given[1]}


def test_one_pair_name_is_both_and_one_file_of_an_expert_is_that_expert_alone(folder):
    common = folder / "wan-lora-00000100.safetensors"
    assert resolve_experts([common], TWO) == find_pair(common) != {}
    low = folder / "low_noise_model.safetensors"
    assert resolve_experts([low], TWO) == {LOW: low}
    assert remarks({LOW: low}, TWO) == ["no LoRA for the high_noise expert: it runs as the base"]
    assert remarks(find_pair(common), TWO) == [] == remarks({}, ()) and resolve_experts([], TWO) == {}


def test_a_model_without_experts_takes_any_single_file(folder):
    plain, low = folder / "plain.safetensors", folder / "low_noise_model.safetensors"
    assert resolve_experts([plain], ONE) == {"transformer": plain} and remarks({"transformer": plain}, ONE) == []
    assert resolve_experts([low], ONE) == {"transformer": low}
    (said,) = remarks({"transformer": low}, ONE)
    assert said == f"{low} was trained for the low_noise expert of a Wan 2.2; here it is used on all noise levels"


def test_the_family_counts_before_the_name_where_it_has_no_experts(tmp_path):
    for family, expert in (("wan2.1-t2v-1.3B", None), ("wan2.2-t2v-A14B", LOW), ("unheard of", LOW)):
        path = written(tmp_path / "low_fox.safetensors", half(), {"family": family})
        assert trained_for(path, {"family": family}) == expert
        assert len(remarks(resolve_experts([path], ONE), ONE)) == (expert is not None)
        assert resolve_experts([path], TWO) == {LOW: path}  # there its name decides


@pytest.mark.parametrize(
    ("names", "experts", "message"),
    [
        (["plain"], TWO, r"does not say which expert.*two files.*rename it to plain_high_noise\.safetensors"),
        (["high_noise_model", "half_high_noise"], TWO, "are both for the high_noise expert"),
        (["style", "plain"], TWO, "means two files already.*Give it alone"),
        (["plain", "style"], TWO, "means two files already.*Give it alone"),
        (["plain", "plain", "plain"], TWO, "3 LoRAs are given, but the model has two experts.*--also_lora"),
        (["plain", "plain"], ONE, "2 LoRAs are given, but the model has one transformer.*--also_lora"),
        (["style"], ONE, "means style_HighNoise.safetensors and style_LowNoise.safetensors, but this model has one"),
        (["half"], TWO, "half.safetensors: there is no such file, and no pair"),
        (["half"], ONE, "half.safetensors: there is no such file, and no pair"),
        (["plain", "half"], TWO, "half.safetensors: there is no such file, and no pair"),
    ],
)
def test_files_that_fit_no_expert_are_refused_with_what_to_do(folder, names, experts, message):
    with pytest.raises(UserError, match=message):
        resolve_experts([folder / f"{name}.safetensors" for name in names], experts)


# ----------------------------------------------------------------------------------------------------- further LoRAs


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("a.safetensors:.25", "a.safetensors", 0.25),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:0.7", r"C:\loras\a.safetensors", 0.7),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        ("a.safetensors:", "a.safetensors:", 1.0),
        ("a.safetensors:nan", "a.safetensors:nan", 1.0),
        ("a.safetensors:strong", "a.safetensors:strong", 1.0),
    ],
)
def test_a_strength_is_a_number_after_the_last_colon(text, path, strength):
    assert parse_also_lora(text) == (Path(path), strength)


@pytest.mark.parametrize("text", [":0.5", "a.safetensors:1e999", "a.safetensors:-1e999"])
def test_a_strength_without_a_file_and_one_that_is_too_large_are_refused(text):
    with pytest.raises(UserError, match=f"{text}: write FILE or FILE:STRENGTH"):
        parse_also_lora(text)


def test_further_loras_go_to_the_expert_that_they_name_and_else_to_all(folder):
    texts = [
        f"{folder}/plain.safetensors:0.5",
        f"{folder}/style.safetensors",
        f"{folder}/low_noise_model.safetensors:2",
    ]
    plain = (folder / "plain.safetensors", 0.5)
    assert resolve_also_loras(texts, TWO) == {
        HIGH: [plain, (folder / "style_HighNoise.safetensors", 1.0)],
        LOW: [plain, (folder / "style_LowNoise.safetensors", 1.0), (folder / "low_noise_model.safetensors", 2.0)],
    }
    low = (folder / "low_noise_model.safetensors", 2.0)
    assert resolve_also_loras([texts[0], texts[2]], ONE) == {"transformer": [plain, low]}
    with pytest.raises(UserError, match="this model has one transformer"):
        resolve_also_loras([texts[1]], ONE)
    with pytest.raises(UserError, match="there is no such file"):
        resolve_also_loras(["nowhere.safetensors:1"], TWO)


def test_of_one_name_each_expert_gets_its_own_file_or_the_one_that_says_no_expert(folder):
    style, plain, low = (folder / f"{name}.safetensors" for name in ("style", "plain", "low_noise_model"))
    assert [lora_of(style, expert, TWO) for expert in TWO] == [
        folder / "style_HighNoise.safetensors",
        folder / "style_LowNoise.safetensors",
    ]
    assert [lora_of(plain, expert, TWO) for expert in TWO] == [plain, plain]
    assert [lora_of(low, expert, TWO) for expert in TWO] == [None, low]
    assert lora_of(low, "transformer", ONE) == low and lora_of(plain, "transformer", ONE) == plain
    for name, message in ((style, "this model has one transformer"), (folder / "nowhere", "there is no such file")):
        with pytest.raises(UserError, match=message):
            lora_of(name, "transformer", ONE)

"""A model may be a folder, single files, or both; what tensors do not tell is asked, printed, and never guessed."""

import shlex
import shutil
from pathlib import Path

import pytest

from tests.tiny import FAMILY, write_model
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.setup.model import SingleFiles, contradictions, doubts, refuse_missing_base
from wan.checkpoints import TRANSFORMER, CheckpointError, ModelFiles, TransformerFiles, Weights
from wan.configs import FAMILIES

EXPERTS = FAMILIES["wan2.2-t2v-A14B"]
DEFAULT = "Wan-AI/Wan2.1-T2V-1.3B"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "kept")


@pytest.fixture
def files(kept, tmp_path, monkeypatch) -> SingleFiles:
    """A whole model as single files, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    parts = {part: kept / getattr(FAMILY, part) for part in ("vae", "text_encoder", "tokenizer")}
    return SingleFiles(transformer=kept / TRANSFORMER, **parts)


def released(name: str, source: str = "folder", **places: str) -> ModelFiles:
    """A released model as far as its family is concerned."""
    family, nothing = FAMILIES[name], Weights(Path(), {})
    parts = places or {expert.name: f"{expert.name}.safetensors" for expert in family.experts}
    transformers = {part: TransformerFiles(Path(place), {}, family.shape) for part, place in parts.items()}
    return ModelFiles(source, family, transformers, nothing, nothing, Path(), text_len=512)


# ----------------------------------------------------------------------------------------------------- what is opened


def test_single_files_make_a_model_though_the_default_folder_is_not_there(files, capsys):
    found = files.open_model(DEFAULT, is_default=True)
    assert found.source == str(files.transformer) and found.family is FAMILY
    said = capsys.readouterr().out
    assert all(str(path) in said for path in files.files.values())
    assert said.splitlines()[-1] == "model: wan2.1-t2v-1.3B"
    assert files.find_family(DEFAULT, is_default=True) is FAMILY


def test_a_folder_that_is_named_has_to_be_there(files):
    with pytest.raises(UserError, match="no model at Wan-AI/Wan2.1-T2V-1.3B.*\ndownload it with"):
        files.open_model(DEFAULT)
    with pytest.raises(UserError, match="download it with"):
        SingleFiles().open_model(DEFAULT, is_default=True)


def test_the_default_folder_has_the_other_parts_where_it_is_there(files, kept):
    folder = Path(shutil.copytree(kept, Path("models") / DEFAULT))
    found = SingleFiles(transformer=files.transformer).open_model(DEFAULT, is_default=True)
    assert found.transformer.path == files.transformer and found.vae.path == folder / FAMILY.vae
    assert found.source == DEFAULT


def test_of_a_folder_alone_nothing_is_printed(kept, capsys):
    assert SingleFiles().open_model(str(kept)).source == str(kept)
    assert capsys.readouterr().out == ""


def test_a_family_that_is_named_needs_no_files_to_be_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SingleFiles(family=EXPERTS.name).find_family(DEFAULT, is_default=True) is EXPERTS
    assert SingleFiles().find_family(DEFAULT, is_default=True) is FAMILY


def test_a_named_family_is_printed_and_checked(kept, capsys):
    assert SingleFiles(family=FAMILY.name).open_model(str(kept)).family is FAMILY
    assert capsys.readouterr().out == "model: wan2.1-t2v-1.3B, as --family says\n"
    with pytest.raises(CheckpointError, match="wan2.2-t2v-A14B has high_noise and low_noise"):
        SingleFiles(family=EXPERTS.name).open_model(str(kept))


def test_the_flags_of_a_run_open_the_same_files_again(files, kept, tmp_path):
    spaced = Path(shutil.copy(files.transformer, tmp_path / "a file.safetensors"))
    given = SingleFiles(transformer=spaced, family=FAMILY.name)
    for options, name in ((files, None), (given, str(kept))):
        found = options.open_model(name)
        words = shlex.split(options.flags(found))
        folder = words[words.index("--pretrained_model_name_or_path") + 1] if name else None
        rest = [word for word in words if word not in ("--pretrained_model_name_or_path", folder)]
        again = parse_options(SingleFiles, rest)
        assert again == options and folder == name
        assert again.open_model(folder).transformer == found.transformer
    assert SingleFiles().flags(SingleFiles().open_model(str(kept))) == ""


def test_a_lora_names_its_base_by_the_folder_or_by_the_files():
    assert SingleFiles(vae=Path("a/vae.safetensors")).base_name(DEFAULT) == DEFAULT
    assert SingleFiles(transformer=Path("a/wan.safetensors")).base_name(DEFAULT) == "wan.safetensors"
    both = SingleFiles(high_noise=Path("x/h.safetensors"), low_noise=Path("x/l.safetensors"))
    assert both.base_name(DEFAULT) == "h.safetensors + l.safetensors"
    for name in ("wan.safetensors", both.base_name(DEFAULT)):
        with pytest.raises(UserError, match="give the file with --transformer"):
            refuse_missing_base(name)
    refuse_missing_base(DEFAULT)


# ------------------------------------------------------------------------------------------- what tensors do not tell


@pytest.mark.parametrize(
    ("name", "is_given", "expected"),
    [
        ("wan2.1-t2v-1.3B", True, []),
        ("wan2.2-ti2v-5B", True, []),
        ("wan2.1-flf2v-14B-720P", True, []),
        ("wan2.1-t2v-14B", True, ["by --high_noise and --low_noise it is wan2.2-t2v-A14B"]),
        ("wan2.1-t2v-14B", False, []),
        ("wan2.2-t2v-A14B", True, ["by --transformer it is wan2.1-t2v-14B"]),
        ("wan2.1-i2v-14B-480P", True, ["unless --family says wan2.1-i2v-14B-720P or wan2.1-fun-14B-InP"]),
        ("wan2.1-i2v-14B-480P", False, ["unless --family says wan2.1-i2v-14B-720P or wan2.1-fun-14B-InP"]),
        ("wan2.2-i2v-A14B", True, ["unless --family says wan2.2-fun-A14B-InP"]),
    ],
)
def test_models_with_the_same_tensors_are_named(name, is_given, expected):
    found = list(doubts(released(name), is_given))
    assert len(found) == len(expected) and all(end in text for text, end in zip(found, expected, strict=True))


def test_the_name_of_a_folder_leaves_no_doubt():
    assert not list(doubts(released("wan2.1-i2v-14B-480P", "models/Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"), False))


def test_one_expert_alone_is_one_of_two():
    (text,) = doubts(released("wan2.2-t2v-A14B", low_noise="low.safetensors"), True)
    assert text == "because it is given so; by --transformer it is wan2.1-t2v-14B"


@pytest.mark.parametrize(
    ("part", "file", "family", "said"),
    [
        ("transformer", "wan2.1_t2v_1.3B_bf16", "wan2.1-t2v-1.3B", ""),
        ("transformer", "Wan2_1-T2V-14B_fp8_e4m3fn", "wan2.1-t2v-14B", ""),
        ("transformer", "wan2.2_ti2v_5B_fp16", "wan2.2-ti2v-5B", ""),
        ("transformer", "wan2.1_i2v_480p_14B_fp16", "wan2.1-i2v-14B-480P", ""),
        ("transformer", "diffusion_pytorch_model", "wan2.2-ti2v-5B", ""),
        ("transformer", "my_yellow_highlights", "wan2.1-t2v-14B", ""),
        ("high_noise", "wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2-t2v-A14B", ""),
        ("low_noise", "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "wan2.2-t2v-A14B", ""),
        ("low_noise", "wan2.2_fun_inpaint_low_noise_14B_bf16", "wan2.2-fun-A14B-InP", ""),
        ("high_noise", "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "wan2.2-t2v-A14B", "low"),
        ("low_noise", "Wan2.2-I2V-A14B-HighNoise-bf16", "wan2.2-i2v-A14B", "highnoise"),
        ("transformer", "wan2.2_t2v_high_noise_14B_fp16", "wan2.1-t2v-14B", "high and 2.2"),
        ("high_noise", "wan2.1_t2v_14B_fp16", "wan2.2-t2v-A14B", "2.1"),
        ("high_noise", "wan22_i2v_high_noise", "wan2.2-t2v-A14B", "i2v"),
        ("high_noise", "wan2.2_fun_inpaint_high_noise_14B_bf16", "wan2.2-i2v-A14B", "fun"),
        ("vae", "wan2.2_vae_low", "wan2.1-t2v-14B", ""),
    ],
)
def test_a_file_name_that_says_something_else_is_reported_and_decides_nothing(part, file, family, said):
    remarks = list(contradictions({part: Path(f"somewhere/{file}.safetensors")}, FAMILIES[family]))
    expected = f"note: {file}.safetensors: its name says {said}, but it is used as {part} of {family}"
    assert remarks == ([expected] if said else [])

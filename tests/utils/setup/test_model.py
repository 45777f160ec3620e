"""A model may be a folder, single files, or both; what tensors do not tell is asked, printed, and never guessed."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import FAMILY, TINY_SHAPE, write_model
from utils.common.errors import UserError
from utils.common.options import parse_options
from utils.setup import model
from utils.setup.model import (
    SingleFiles,
    alternatives,
    contradictions,
    find_given_family,
    find_given_tokenizer,
    need_experts,
    open_given,
)
from wan.checkpoints import (
    TOKENIZER,
    TRANSFORMER,
    CheckpointError,
    ModelFiles,
    TransformerFiles,
    Weights,
    find_tokenizer,
)
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
    found = open_given(files, DEFAULT, is_default=True)
    assert found.source == str(files.transformer) and found.family is FAMILY
    said = capsys.readouterr().out
    assert all(str(path) in said for path in files.given.values())
    assert said.endswith("\nmodel: wan2.1-t2v-1.3B\n\n")
    assert find_given_family(files, DEFAULT, is_default=True) is FAMILY


def test_a_tokenizer_is_found_without_the_rest_of_the_model_and_missing_without_an_error(files, kept, tmp_path):
    tokenizer = kept / FAMILY.tokenizer
    of_model = tokenizer, TINY_SHAPE.text_len
    assert find_given_tokenizer(files, DEFAULT) == find_given_tokenizer(SingleFiles(), str(kept)) == of_model
    assert find_tokenizer() is None and find_given_tokenizer(SingleFiles(), DEFAULT) is None
    assert find_given_tokenizer(SingleFiles(tokenizer=tokenizer), DEFAULT) == (tokenizer, 512)
    assert find_given_tokenizer(SingleFiles(tokenizer=tmp_path), DEFAULT) is None
    shutil.copytree(tokenizer, Path("models") / TOKENIZER)
    assert find_given_tokenizer(SingleFiles(), DEFAULT) == (Path("models") / TOKENIZER, 512)


def test_a_folder_that_is_named_has_to_be_there(files):
    with pytest.raises(UserError, match="no model at Wan-AI/Wan2.1-T2V-1.3B.*\ndownload it with"):
        open_given(files, DEFAULT)
    with pytest.raises(UserError, match="download it with"):
        open_given(SingleFiles(family=EXPERTS.name), DEFAULT)
    for options in (SingleFiles(), SingleFiles(vae=files.vae)):
        with pytest.raises(UserError, match="download it with"):
            open_given(options, DEFAULT, is_default=True)
    with pytest.raises(UserError, match="--family wan2.2-t2v-A14B: name its folder with --pretrained_model_name_or_pa"):
        open_given(SingleFiles(family=EXPERTS.name), DEFAULT, is_default=True)


def test_a_file_of_the_name_of_the_base_is_no_folder(files, kept, tmp_path):
    (tmp_path / "wan.safetensors").symlink_to(kept / TRANSFORMER)
    assert open_given(files, "wan.safetensors", is_default=True).source == str(files.transformer)


def test_the_default_folder_has_the_other_parts_where_it_is_there(files, kept):
    folder = Path(shutil.copytree(kept, Path("models") / DEFAULT))
    found = open_given(SingleFiles(transformer=files.transformer), DEFAULT, is_default=True)
    assert found.transformer.path == files.transformer and found.vae.path == folder / FAMILY.vae
    assert found.source == DEFAULT


def test_bytes_after_the_last_tensor_of_any_part_are_said_in_one_line_each(kept, tmp_path, capsys):
    folder = Path(shutil.copytree(kept, tmp_path / "long"))
    vae = (folder / FAMILY.vae).with_suffix(".safetensors")
    save_file(torch.load(folder / FAMILY.vae, weights_only=True), vae)
    (folder / FAMILY.vae).unlink()
    for path, more in ((folder / TRANSFORMER, b"x"), (vae, b"more")):
        path.write_bytes(path.read_bytes() + more)
    open_given(SingleFiles(), str(folder))
    what = "after its last tensor: read by its header, without them"
    said = [f"note: {vae} has 4 bytes {what}", f"note: {folder / TRANSFORMER} has 1 byte {what}"]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(said)


def test_of_a_folder_alone_nothing_is_printed(kept, capsys):
    assert open_given(SingleFiles(), str(kept)).source == str(kept)
    assert capsys.readouterr().out == ""


def test_of_another_part_given_beside_a_folder_all_that_is_used_is_printed(files, kept, capsys):
    open_given(SingleFiles(vae=files.vae), str(kept))
    table, said = capsys.readouterr().out.split("\nmodel: ")
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["transformer", "vae", "text_encoder", "tokenizer"]
    assert str(files.vae) in table and said == "wan2.1-t2v-1.3B\n\n"


def test_a_family_that_is_named_needs_no_files_to_be_known(files):
    for vae in (None, files.vae):
        named = SingleFiles(family=EXPERTS.name, vae=vae)
        assert find_given_family(named, DEFAULT, is_default=True) is EXPERTS
        assert find_given_family(SingleFiles(vae=vae), DEFAULT, is_default=True) is FAMILY


def test_a_named_family_is_printed_and_checked(kept, capsys):
    assert open_given(SingleFiles(family=FAMILY.name), str(kept)).family is FAMILY
    assert capsys.readouterr().out == "model: wan2.1-t2v-1.3B, as --family says\n"
    with pytest.raises(CheckpointError, match="wan2.2-t2v-A14B has high_noise and low_noise"):
        open_given(SingleFiles(family=EXPERTS.name), str(kept))


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        (("vae",), "give --vae, or a folder that has them as --pretrained_model_name_or_path"),
        (("vae", "text_encoder"), "give --vae and --text_encoder, or a folder"),
        (
            ("vae", "text_encoder", "tokenizer"),
            "give --vae, --text_encoder and --tokenizer, or a folder that has them as --pretrained_model_name_or_path; "
            "the tokenizer alone: python train_wan_lora.py --download_tokenizer",
        ),
    ],
)
def test_all_parts_that_are_missing_are_named_with_the_options_that_give_them(files, missing, advice):
    incomplete = replace(files, **dict.fromkeys(missing))
    with pytest.raises(UserError) as caught:
        open_given(incomplete, None)
    first, second = str(caught.value).splitlines()
    assert first == f"no {', no '.join(missing)} is given, and no model folder that has it" and advice in second


def test_the_flags_of_a_run_open_the_same_files_again(files, kept, tmp_path):
    spaced = Path(shutil.copy(files.transformer, tmp_path / "a file.safetensors"))
    given = SingleFiles(transformer=spaced, family=FAMILY.name)
    for options, name in ((files, None), (given, str(kept))):
        found = open_given(options, name)
        words = shlex.split(options.flags(found))
        folder = words[words.index("--pretrained_model_name_or_path") + 1] if name else None
        rest = [word for word in words if word not in ("--pretrained_model_name_or_path", folder)]
        again = parse_options(SingleFiles, rest)
        assert again == options and folder == name
        assert open_given(again, folder).transformer == found.transformer
    assert SingleFiles().flags(open_given(SingleFiles(), str(kept))) == ""


def test_the_flags_of_a_run_of_one_expert_ask_for_the_other():
    alone = released(EXPERTS.name, "h.safetensors", high_noise="h.safetensors")
    options = SingleFiles(high_noise=Path("h.safetensors"))
    assert options.flags(alone) == " --high_noise h.safetensors --low_noise ..."


def test_the_experts_that_are_trained_or_sampled_with_have_to_be_given():
    alone = released(EXPERTS.name, low_noise="low.safetensors")
    need_experts(alone, ["low_noise"], [])
    need_experts(released(EXPERTS.name), ["high_noise", "low_noise"], ["sampling"])
    with pytest.raises(UserError, match="the high_noise expert is not given: --high_noise FILE, or train .* low$"):
        need_experts(alone, ["high_noise", "low_noise"], [])
    with pytest.raises(UserError, match="not given, but needed for previews and sampling: --high_noise FILE"):
        need_experts(alone, ["low_noise"], ["previews", "sampling"])


def test_a_lora_names_its_base_by_the_folder_or_by_the_files():
    assert SingleFiles(vae=Path("a/vae.safetensors")).base(DEFAULT) == {"base_model": DEFAULT}
    one = SingleFiles(transformer=Path("a/transformer"))
    assert one.base(DEFAULT) == {"base_model": "transformer", "base_files": "--transformer transformer"}
    both = SingleFiles(high_noise=Path("x/h.safetensors"), low_noise=Path("x/l.safetensors"))
    flags = "--high_noise h.safetensors --low_noise l.safetensors"
    assert both.base(DEFAULT) == {"base_model": "h.safetensors + l.safetensors", "base_files": flags}


def test_a_lora_names_a_local_base_without_the_folders_above_it(tmp_path, monkeypatch):
    folder = tmp_path / "private" / "wan-fox"
    (folder / "inner").mkdir(parents=True)
    for name in (folder, f"{folder}/", folder / "inner" / ".."):
        assert SingleFiles().base(str(name)) == {"base_model": "wan-fox"}
    monkeypatch.chdir(folder)
    assert SingleFiles().base(".") == {"base_model": "wan-fox"}
    assert SingleFiles().base("Wan-AI/Wan2.1-T2V-1.3B") == {"base_model": "Wan-AI/Wan2.1-T2V-1.3B"}


# ------------------------------------------------------------------------------------------- what tensors do not tell

OTHERS = "; if it is another: --family wan2.1-i2v-14B-720P or wan2.1-fun-14B-InP"
AS_EXPERTS = " (the same tensors as wan2.2-t2v-A14B, which is given with --high_noise and --low_noise)"
AS_ONE = " (the same tensors as wan2.1-t2v-14B, which is given with --transformer)"


@pytest.mark.parametrize(
    ("name", "is_given", "expected"),
    [
        ("wan2.1-t2v-1.3B", True, []),
        ("wan2.2-ti2v-5B", True, []),
        ("wan2.1-flf2v-14B-720P", True, []),
        ("wan2.1-t2v-14B", True, [AS_EXPERTS]),
        ("wan2.1-t2v-14B", False, []),
        ("wan2.2-t2v-A14B", True, [AS_ONE]),
        ("wan2.1-i2v-14B-480P", True, [OTHERS]),
        ("wan2.1-i2v-14B-480P", False, [OTHERS]),
        ("wan2.2-i2v-A14B", True, ["; if it is another: --family wan2.2-fun-A14B-InP"]),
    ],
)
def test_models_with_the_same_tensors_are_named(name, is_given, expected):
    assert list(alternatives(released(name), is_given)) == expected


def test_the_name_of_a_folder_leaves_no_doubt(tmp_path, monkeypatch):
    assert not list(alternatives(released("wan2.1-i2v-14B-480P", "models/Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"), False))
    assert list(alternatives(released("wan2.1-i2v-14B-480P", "models/Wan-AI/Wan2.1-T2V-14B"), False)) == [OTHERS]
    (tmp_path / "Wan2.1-I2V-14B-480P").mkdir()
    monkeypatch.chdir(tmp_path / "Wan2.1-I2V-14B-480P")
    assert not list(alternatives(released("wan2.1-i2v-14B-480P", "."), False))


def test_one_expert_alone_is_one_of_two():
    assert list(alternatives(released("wan2.2-t2v-A14B", low_noise="low.safetensors"), True)) == [AS_ONE]


def test_of_a_width_that_was_never_released_nothing_is_known_of_others():
    found = released("wan2.1-t2v-14B")
    (files,) = found.transformers.values()
    small = replace(files, shape=replace(files.shape, dim=192))
    assert not list(alternatives(replace(found, transformers={"transformer": small}), True))


def test_what_tensors_leave_open_and_names_contradict_is_printed_of_given_transformers_alone(monkeypatch, capsys):
    monkeypatch.setattr(model, "open_model", lambda *_, **__: released("wan2.1-t2v-14B"))
    open_given(SingleFiles(vae=Path("wan2.2_vae.safetensors")), "folder")
    assert capsys.readouterr().out.endswith("\nmodel: wan2.1-t2v-14B\n\n")
    open_given(SingleFiles(transformer=Path("i2v.safetensors")), "folder")
    note = "note: i2v.safetensors: its name says i2v, but it is used as transformer of wan2.1-t2v-14B"
    assert capsys.readouterr().out.endswith(f"\nmodel: wan2.1-t2v-14B{AS_EXPERTS}\n{note}\n\n")
    with_clip = replace(released("wan2.1-flf2v-14B-720P"), clip=Weights(Path("vision.pth"), {}))
    monkeypatch.setattr(model, "open_model", lambda *_, **__: with_clip)
    open_given(SingleFiles(clip=Path("vision.pth")), "folder")
    assert ["clip", "vision.pth"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("part", "file", "family", "said"),
    [
        ("transformer", "wan2.1_t2v_1.3B_bf16", "wan2.1-t2v-1.3B", ""),
        ("transformer", "Wan2_1-T2V-1_3B_bf16", "wan2.1-t2v-1.3B", ""),
        ("transformer", "Wan2_1-T2V-14B_fp8_e4m3fn", "wan2.1-t2v-14B", ""),
        ("transformer", "wan2.2_ti2v_5B_fp16", "wan2.2-ti2v-5B", ""),
        ("transformer", "wan2.1_i2v_480p_14B_fp16", "wan2.1-i2v-14B-480P", ""),
        ("transformer", "diffusion_pytorch_model", "wan2.2-ti2v-5B", ""),
        ("transformer", "my_yellow_highlights_480p", "wan2.1-t2v-14B", ""),
        ("high_noise", "wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2-t2v-A14B", ""),
        ("low_noise", "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "wan2.2-t2v-A14B", ""),
        ("low_noise", "wan2.2_fun_inpaint_low_noise_14B_bf16", "wan2.2-fun-A14B-InP", ""),
        ("high_noise", "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "wan2.2-t2v-A14B", "low_noise"),
        ("low_noise", "Wan2.2-I2V-A14B-HighNoise-bf16", "wan2.2-i2v-A14B", "high_noise"),
        ("low_noise", "wan22I2VHighNoise_v1", "wan2.2-i2v-A14B", "high_noise"),
        ("high_noise", "low_noise_model/diffusion_pytorch_model-00001-of-00006", "wan2.2-t2v-A14B", "low_noise"),
        ("high_noise", "wan_low_noise/model-00001-of-00006", "wan2.2-t2v-A14B", "low_noise"),
        ("high_noise", "transformer_2/diffusion_pytorch_model", "wan2.2-t2v-A14B", "low_noise"),
        ("high_noise", "high_noise_model/model_low_noise", "wan2.2-t2v-A14B", "low_noise"),
        ("transformer", "wan2.2_t2v_high_noise_14B_fp16", "wan2.1-t2v-14B", "high_noise and wan2.2"),
        ("high_noise", "wan2.1_t2v_14B_fp16", "wan2.2-t2v-A14B", "wan2.1"),
        ("high_noise", "wan22_i2v_high_noise", "wan2.2-t2v-A14B", "i2v"),
        ("high_noise", "wan2.2_fun_inpaint_high_noise_14B_bf16", "wan2.2-i2v-A14B", "fun"),
        ("transformer", "wan2.1_vace_14B_fp16", "wan2.1-t2v-14B", "vace"),
        ("transformer", "wan2.1_flf2v_720p_14B_fp16", "wan2.1-i2v-14B-720P", "flf2v"),
        ("transformer", "wan2.1_i2v_720p_14B_fp8_e4m3fn", "wan2.1-i2v-14B-480P", "720p"),
        ("transformer", "wan2.1_t2v_14B_fp16", "wan2.1-t2v-1.3B", "14b"),
        ("transformer", "wan2_1_t2v_1_3B", "wan2.1-t2v-14B", "1.3b"),
        ("transformer", "wan2.2_ti2v_5B_fp16", "wan2.1-t2v-14B", "ti2v and 5b and wan2.2"),
    ],
)
def test_a_file_name_that_says_something_else_is_reported_and_decides_nothing(part, file, family, said):
    path = Path(f"somewhere/{file}.safetensors")
    expected = f"note: {path.name}: its name says {said}, but it is used as {part} of {family}"
    assert list(contradictions({part: path}, FAMILIES[family])) == ([expected] if said else [])


def test_a_folder_of_diffusers_is_known_by_its_own_name():
    (remark,) = contradictions({"high_noise": Path("model/transformer_2")}, EXPERTS)
    assert remark.startswith("note: transformer_2: its name says low_noise, but it is used as high_noise")


def test_two_swapped_files_are_said_to_be_so():
    swapped = {"high_noise": Path("wan_low_noise.safetensors"), "low_noise": Path("wan_high_noise.safetensors")}
    assert list(contradictions(swapped, EXPERTS))[-1] == "note: the files of the two experts seem to be swapped"

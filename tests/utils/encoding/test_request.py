"""A request has everything decided that the options of the test script leave open."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.media import image
from utils.adapters.beside import Chosen
from utils.adapters.lora_file import LoraFile
from utils.adapters.stated_steps import StatedSteps
from utils.common.errors import UserError
from utils.encoding.request import RequestOptions, Version, complete, describe, fill_in_side
from utils.media.frames import write_video
from wan.configs import FAMILIES, Grid
from wan.text2video import Sampler

T2V, I2V, A14B = (FAMILIES[name] for name in ("wan2.1-t2v-1.3B", "wan2.1-i2v-14B-480P", "wan2.2-t2v-A14B"))
PLAIN, CONTROL = LoraFile({}), LoraFile({}, input_shapes={"patch_embedding": (48, 32, 1, 2, 2)})
STATED = [StatedSteps((1000, 500), 6.0, "fast.safetensors")]


@pytest.fixture(autouse=True)
def prompts(tmp_path, monkeypatch) -> None:
    """The negative prompts, whose place is given to the tests alone."""
    for family in (T2V, I2V, A14B):
        (tmp_path / family.negative_prompt).write_text("ugly", encoding="utf-8")
    monkeypatch.setattr("utils.encoding.text.EMBEDDINGS", tmp_path)


def test_what_is_left_open_is_the_models():
    request = complete(RequestOptions(), PLAIN, T2V)
    assert (request.width, request.height, request.frames) == (*T2V.size, T2V.frames)
    assert (request.text, request.negative, request.control_type) == ("", "ugly", "tile")


def test_a_side_that_is_given_alone_keeps_the_usual_shape():
    usual, grid = (832, 480), Grid(frame=4, side=16)
    sizes = [(None, None), (416, None), (None, 240), (96, 64)]
    found = [fill_in_side(*size, usual, grid) for size in sizes]
    assert found == [(832, 480), (416, 240), (416, 240), (96, 64)]
    assert fill_in_side(96, None, (480, 832), grid) == (96, 160)


def test_a_video_has_the_shape_of_the_picture_that_it_starts_from_and_the_length_of_what_it_follows(tmp_path):
    upright = complete(RequestOptions(image=image(tmp_path / "a.png", None, (60, 90))), PLAIN, I2V)
    assert upright.width < upright.height
    write_video(tmp_path / "a.mp4", torch.zeros(11, 3, 48, 96, dtype=torch.uint8), 16)
    followed = complete(RequestOptions(input_video=tmp_path / "a.mp4"), CONTROL, T2V)
    assert followed.frames == 9 and followed.width > followed.height


@pytest.mark.parametrize(
    ("options", "lora", "message"),
    [
        ({}, CONTROL, "this is a control LoRA: pass the video to follow as --input_video"),
        ({"lora_path": (Path("a"),), "input_video": Path("a.mp4")}, PLAIN, "a is not a control LoRA"),
        ({"image": Path("a.png")}, PLAIN, "this is a text-to-video model, which starts from no picture"),
        ({"width": 100}, PLAIN, "must be multiples of 16"),
        ({"frames": 6}, PLAIN, "--frames 6 must be 4n \\+ 1, like 5"),
    ],
)
def test_what_contradicts_itself_is_refused(options, lora, message):
    with pytest.raises(UserError, match=message):
        complete(RequestOptions(**options), lora, T2V)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a", "embedding": Path("b")}, "--prompt and --embedding exclude each other"),
        ({"negative_prompt": "a", "negative_embedding": Path("b")}, "--negative_prompt and --negative_embedding"),
        ({"fuse_lora": (Path("a"),), "without_fused": True}, "--fuse_lora and --without_fused exclude each other"),
        ({"check_lora": True, "compare": True}, "--check_lora shows the base model too: leave out --compare"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RequestOptions(**options)


def test_a_video_is_sampled_as_its_family_is_or_as_its_loras_state_unless_options_say_otherwise():
    usual = Sampler("unipc", 40, (4.0, 3.0), 12.0, (0.875,), (3,))
    assert RequestOptions(seed=3).sampler(A14B, A14B.size) == usual
    few = replace(usual, solver="lcm", steps=2, guidance=(1.0,), shift=6.0, timesteps=(1000, 500))
    assert RequestOptions(seed=3).sampler(A14B, A14B.size, STATED) == few
    opts = RequestOptions(seed=3, steps=4, guidance=(2.0,), shift=8.0, solver="euler")
    expected = replace(usual, solver="euler", steps=4, guidance=(2.0,), shift=8.0)
    assert opts.sampler(A14B, A14B.size) == opts.sampler(A14B, A14B.size, STATED) == expected
    assert (
        RequestOptions().sampler(I2V, (832, 480)).shift == 3 and RequestOptions().sampler(I2V, (1280, 720)).shift == 5
    )
    with pytest.raises(UserError, match="--guidance has 2 values, but the model 1 expert"):
        RequestOptions(guidance=(1.0, 2.0)).sampler(T2V, T2V.size)


def test_a_description_says_how_each_version_is_sampled():
    request = complete(RequestOptions(width=64, height=32, frames=1, seed=5), PLAIN, T2V)
    usual = Sampler("unipc", 50, (5.0,), 5.0)
    with_lora = Version("with the LoRA", {"transformer": [Chosen(PLAIN, 1.0)]}, usual)
    said = "64x32, 1 frame, 50 steps of unipc, guidance 5, shift 5, seed 5, strength 0.5"
    assert describe(request, [replace(with_lora, loras={}), with_lora], 0.5) == said
    few = replace(with_lora, sampler=Sampler("lcm", 4, (1.0,), 5.0))
    assert describe(request, [Version("without the LoRA", {}, usual), few], 1.0, ", on top of a").splitlines() == [
        "64x32, 1 frame, 4 steps of lcm, guidance 1, shift 5, seed 5, strength 1, on top of a",
        "without the LoRA: 50 steps of unipc, guidance 5, shift 5",
    ]
    assert not with_lora.reads_control
    assert Version("control", {"a": [], "b": [Chosen(CONTROL, 1.0)]}, usual).reads_control

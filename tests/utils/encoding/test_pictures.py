"""A picture is cut as a clip is, so that sampling from a clip's own frame is conditioned as training was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import test_wan_control_lora as script
from tests.encoders import family_encoders
from tests.media import image
from tests.tiny import TINY_SHAPE
from utils.common.errors import UserError
from utils.data.folders import Folder, Rules
from utils.data.loading import load_clip
from utils.data.plan import Limits, Window, middle_window
from utils.data.scan import scan
from utils.encoding.conditioning import Cond, Encoders
from utils.encoding.pictures import check_pictures, load_picture, load_pictures, needed_flags
from utils.media.controls import ControlSignal
from utils.media.frames import read_frames, save_image, write_video
from utils.media.probing import MediaError
from wan.configs import FAMILIES, Family

GIVEN = {name: family for name, family in FAMILIES.items() if family.given}
I2V, FLF2V = FAMILIES["wan2.1-i2v-14B-480P"], FAMILIES["wan2.1-flf2v-14B-720P"]
T2V = FAMILIES["wan2.1-t2v-1.3B"]
TEXT = torch.randn(4, TINY_SHAPE.text_dim, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A noisy clip of 9 frames that has to be cropped and resized."""
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    coarse = torch.rand(9, 3, 11, 17, generator=torch.Generator().manual_seed(0))
    write_video(path, (torch.nn.functional.interpolate(coarse, (100, 156), mode="bilinear") * 255).byte(), 16)
    path.with_suffix(".txt").write_text("a clip")
    return path


def window_of(clip: Path, family: Family, base_res: int = 64) -> Window:
    ((source,), _) = scan(Folder(clip.parent, Rules(base_res=(base_res,))), family.fps)
    source = replace(source, frame_indices=range(9))
    return middle_window(source, base_res, Limits(10_000, 1, family.grid))


def frames_as_files(window: Window, folder: Path, family: Family) -> list[Path]:
    """The frames that the family is given, whole and at their own size, as pictures that lose nothing."""
    paths = []
    for place in family.given or (0,):
        (frame,) = read_frames(window.source.path, [window.indices[place]])
        paths.append(folder / f"{place}.png")
        save_image(paths[-1], Image.fromarray(frame.permute(1, 2, 0).numpy()))
    return paths


def conditions_at_sampling(
    window: Window, encoders: Encoders, pictures: list[Path], control: bool
) -> tuple[Cond, Cond | None]:
    """What the test script makes of these pictures, and of the clip itself where it is followed."""
    followed = window.source.path if control else None
    request = script.Request(
        text="", negative="", width=window.width, height=window.height, frames=window.frames,
        seed=0, pictures=pictures, input_video=followed, control_type="tile",
    )  # fmt: skip
    video = script.read_control(request, followed, encoders.vae.device) if followed else None
    return script.condition(request, encoders, TEXT, video)


def assert_same(found: Cond, expected: Cond) -> None:
    for name, part in vars(expected).items():
        other = getattr(found, name)
        assert (other is None) == (part is None), name
        assert part is None or torch.equal(other, part[None]), name


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", GIVEN)
def test_a_clips_own_frames_condition_sampling_tensor_for_tensor_as_they_did_training(tmp_path, clip, name, control):
    family = GIVEN[name]
    encoders = family_encoders(family, ControlSignal("tile") if control else None)
    window = window_of(clip, family)
    assert (window.width, window.height) != (156, 100) and window.position == (0.5, 0.5)
    trained = encoders.encode(load_clip(window), TEXT).cond
    base, cond = conditions_at_sampling(window, encoders, frames_as_files(window, tmp_path, family), control)
    assert_same(cond, trained)
    given = {"channels": trained.channels, "image": trained.image, "first": trained.first}
    expected = {"first"} if family.given_as == "latents" else {"channels", *(["image"] if family.clip else [])}
    assert {part for part, tensor in given.items() if tensor is not None} == expected | (
        {"channels"} if control else set()
    )
    assert_same(base, family_encoders(family).encode(load_clip(window), TEXT).cond)


def test_a_control_that_starts_from_a_picture_is_at_sampling_what_it_was_in_training(tmp_path, clip):
    encoders = family_encoders(T2V, ControlSignal("tile", keeps_first=True))
    window = window_of(clip, T2V)
    trained = encoders.encode(load_clip(window), TEXT).cond
    base, cond = conditions_at_sampling(window, encoders, frames_as_files(window, tmp_path, T2V), control=True)
    assert_same(cond, trained)
    assert base.channels is None
    plain = family_encoders(T2V, ControlSignal("tile")).encode(load_clip(window), TEXT).cond
    assert not torch.equal(plain.channels[:, 0], trained.channels[:, 0])


# ----------------------------------------------------------------------------------------------------- reading and cut


def ramp(path: Path, width: int, height: int) -> Path:
    """A picture that is brighter to the right in red, and further down in green."""
    pixels = torch.zeros(height, width, 3)
    pixels[..., 0], pixels[..., 1] = torch.linspace(0, 255, width), torch.linspace(0, 255, height)[:, None]
    save_image(path, Image.fromarray(pixels.byte().numpy()))
    return path


def test_a_picture_is_cut_from_its_middle_and_as_large_as_possible(tmp_path):
    picture = load_picture(ramp(tmp_path / "wide.png", 200, 100), 64, 64)
    assert picture.shape == (3, 1, 64, 64) and picture.dtype == torch.float32
    red, green = picture[0, 0, 32], picture[1, 0, :, 32]
    assert red[[0, -1]].tolist() == pytest.approx([-0.5, 0.5], abs=0.03)
    assert green[[0, -1]].tolist() == pytest.approx([-1, 1], abs=0.03)


def test_pictures_go_to_the_places_that_the_family_is_given_in_their_order(tmp_path):
    paths = [ramp(tmp_path / "first.png", 64, 64), image(tmp_path / "last.png", None, (64, 64))]
    pictures = load_pictures(paths, FLF2V, 32, 32)
    assert list(pictures) == [0, -1]
    assert all(
        torch.equal(pictures[place], load_picture(path, 32, 32)) for place, path in zip((0, -1), paths, strict=True)
    )
    assert load_pictures(paths[:1], I2V, 32, 32).keys() == {0}
    with pytest.raises(ValueError, match="zip"):
        load_pictures(paths, I2V, 32, 32)


def test_of_a_video_the_first_frame_counts(tmp_path):
    frames = torch.stack([torch.full((3, 32, 32), value) for value in (200, 40, 40)]).byte()
    write_video(tmp_path / "a.mp4", frames, 16)
    assert load_picture(tmp_path / "a.mp4", 32, 32).mean().item() == pytest.approx(200 / 127.5 - 1, abs=0.05)


@pytest.mark.parametrize(
    ("family", "count", "message"),
    [
        ("wan2.1-t2v-14B", 1, "--image: this model is not given any frame of a video"),
        ("wan2.1-i2v-14B-480P", 0, "--image has 0 pictures, but this model is given the first frame of a video"),
        ("wan2.2-ti2v-5B", 2, "--image has 2 pictures, but this model is given the first frame of a video"),
        ("wan2.1-flf2v-14B-720P", 1, "--image has 1 picture, .* is given the first frame and last frame of a video"),
    ],
)
def test_another_number_of_pictures_than_the_family_is_given_is_refused(tmp_path, family, count, message):
    paths = [image(tmp_path / f"{number}.png", None) for number in range(count)]
    with pytest.raises(UserError, match=message):
        check_pictures(paths, FAMILIES[family], "--image")


def test_a_picture_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    check_pictures([image(tmp_path / "b.png", None)], I2V, "--image")
    with pytest.raises(MediaError, match=r"a\.png"):
        check_pictures([tmp_path / "a.png"], I2V, "--image")


def test_the_flags_that_the_test_script_needs_are_named():
    names = "wan2.1-t2v-1.3B", "wan2.2-ti2v-5B", "wan2.2-i2v-A14B", "wan2.1-flf2v-14B-720P"
    assert [needed_flags(FAMILIES[name], None) for name in names] == [
        "",
        "",
        " --image ...",
        " --image ... --last_image ...",
    ]
    assert needed_flags(FAMILIES[names[2]], ControlSignal("tile")) == " --image ... --input_video ..."
    assert needed_flags(FAMILIES[names[0]], ControlSignal("tile", keeps_first=True)) == " --input_video ... --image ..."

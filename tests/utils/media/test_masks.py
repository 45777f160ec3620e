"""The one rule of masks, by value, for pictures and videos."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.clips import write_clip
from utils.media import masks
from utils.media.description import Coverage, MediaInfo
from utils.media.inspection import Inspector
from utils.media.masks import BRIGHTNESS, COLOURS, LABELS, OPACITY, measure_mask, read_mask
from utils.media.probing import probe

HALF = np.zeros((48, 64), np.uint8)
HALF[:, 32:] = 255  # the right half counts


def coloured(rgb: tuple[int, int, int], opacity: np.ndarray = HALF) -> Image.Image:
    return Image.fromarray(np.dstack([np.broadcast_to(np.array(rgb, np.uint8), (48, 64, 3)), opacity]))


def palette() -> Image.Image:
    made = Image.fromarray((HALF > 0).astype(np.uint8), "P")
    made.putpalette([0, 0, 0, 200, 10, 60])
    return made


PICTURES = {
    "grey": (Image.fromarray(HALF), BRIGHTNESS),
    "black_and_white": (Image.fromarray(HALF > 0), BRIGHTNESS),
    "deep": (Image.fromarray(HALF.astype(np.uint16) * 257), BRIGHTNESS),
    "rgb": (Image.fromarray(np.dstack([HALF] * 3)), BRIGHTNESS),
    "white_on_clear": (coloured((255, 255, 255)), OPACITY),
    "black_cut_out": (coloured((0, 0, 0)), OPACITY),
    "grey_and_opacity": (Image.fromarray(np.dstack([np.full((48, 64), 90, np.uint8), HALF])), OPACITY),
    "white_and_opaque": (Image.fromarray(np.dstack([HALF] * 3 + [np.full((48, 64), 255, np.uint8)])), BRIGHTNESS),
    "labels": (Image.fromarray((HALF > 0).astype(np.uint8)), LABELS),
    "labels_rgb": (Image.fromarray(np.dstack([(HALF > 0).astype(np.uint8) * 7] * 3)), LABELS),
    "labels_deep": (Image.fromarray((HALF > 0).astype(np.uint16) * 15), LABELS),
    "dark_red": (Image.fromarray(np.dstack([HALF // 3, HALF * 0, HALF * 0])), COLOURS),
    "palette": (palette(), COLOURS),
}


def described(path: Path) -> MediaInfo:
    return probe(path, full=True)


@pytest.mark.parametrize("name", PICTURES)
def test_the_right_half_counts_whatever_way_it_is_drawn(tmp_path, name):
    made, rule = PICTURES[name]
    made.save(tmp_path / "a.png")
    info = described(tmp_path / "a.png")
    # Versions up to 0.2 read grey masks in the same way, and no others.
    assert measure_mask(tmp_path / "a.png", info) == Coverage(rule, 0.5, 0, 255, is_new=rule != BRIGHTNESS)
    mask = read_mask(tmp_path / "a.png", (0,), info)
    assert mask.dtype == np.uint8 and np.array_equal(mask, HALF[None])


def test_grey_is_between_and_never_taken_for_a_label(tmp_path):
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (4, 256))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", (0,), described(tmp_path / "a.png"))[0], ramp)
    for highest, rule, most in ((15, LABELS, 255), (16, BRIGHTNESS, 16)):
        Image.fromarray(np.array([[0, 1, highest]], np.uint8)).save(tmp_path / "b.png")
        coverage = measure_mask(tmp_path / "b.png", described(tmp_path / "b.png"))
        assert (coverage.rule, coverage.least, coverage.most) == (rule, 0, most)
    Image.fromarray(np.full((4, 4, 3), (100, 60, 40), np.uint8)).save(tmp_path / "c.png")
    assert measure_mask(tmp_path / "c.png", described(tmp_path / "c.png")) == Coverage(BRIGHTNESS, 100 / 255, 100, 100)


@pytest.mark.parametrize(("value", "share"), [(0, 0.0), (255, 1.0)])
def test_one_value_everywhere_is_measured_as_such(tmp_path, value, share):
    Image.new("L", (8, 8), value).save(tmp_path / "a.png")
    coverage = measure_mask(tmp_path / "a.png", described(tmp_path / "a.png"))
    assert coverage == Coverage(BRIGHTNESS, share, value, value)
    Image.new("RGBA", (8, 8), (value, value, value, 128)).save(tmp_path / "b.png")
    assert measure_mask(tmp_path / "b.png", described(tmp_path / "b.png")).rule == BRIGHTNESS, "opacity does not vary"


def test_numbers_of_16_and_32_bits_are_scaled_by_what_they_reach(tmp_path):
    made = {
        "deep.png": (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        "wide.tif": (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
    }
    for name, (values, expected) in made.items():
        Image.fromarray(values).save(tmp_path / name)
        assert read_mask(tmp_path / name, (0,), described(tmp_path / name))[0, 0].tolist() == expected, name


def test_orientation_turns_a_mask_as_it_turns_a_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(HALF).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "a.png", (0,), described(tmp_path / "a.png"))[0], np.rot90(HALF, -1))


# --------------------------------------------------------------------------------------------------------------- videos


def boxes(count: int, colour: tuple[int, ...], ground: tuple[int, ...]) -> list[np.ndarray]:
    """A box of 16x16 that moves to the right."""
    pictures = []
    for number in range(count):
        picture = np.broadcast_to(np.array(ground, np.uint8), (48, 64, len(ground))).copy()
        picture[16:32, 2 * number : 2 * number + 16] = colour
        pictures.append(picture)
    return pictures


VIDEOS = {
    "white.mp4": ("libx264", "yuv420p", boxes(12, (255, 255, 255), (0, 0, 0)), BRIGHTNESS),
    "opacity.mov": ("qtrle", "argb", boxes(12, (0, 0, 0, 255), (90, 90, 90, 0)), OPACITY),
    "red.mkv": ("ffv1", "yuv444p", boxes(12, (110, 0, 0), (0, 0, 0)), COLOURS),
    "opaque.mov": ("qtrle", "argb", boxes(12, (255, 255, 255, 255), (0, 0, 0, 255)), BRIGHTNESS),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_the_box_of_a_video_counts_in_each_frame(tmp_path, name):
    codec, form, pictures, rule = VIDEOS[name]
    path = write_clip(tmp_path / name, codec, pictures, form)
    info = described(path)
    coverage = measure_mask(path, info)
    assert (coverage.rule, coverage.most) == (rule, 255) and coverage.least <= 3
    assert coverage.share == pytest.approx(16 * 16 / (64 * 48), abs=0.02)
    masks = read_mask(path, (0, 5, 11), info)
    assert masks.shape == (3, 48, 64)
    for mask, number in zip(masks, (0, 5, 11), strict=True):
        assert mask[18:30, 2 * number + 2 : 2 * number + 14].min() > 250, "inside"
        assert mask[:14].max() < 5 and mask[:, 2 * number + 18 :].max() < 5, "outside"


def test_what_counts_for_a_moment_only_is_found(tmp_path):
    pictures = [np.zeros((48, 64, 3), np.uint8) for _ in range(40)]
    pictures[1][:, 32:] = 255
    path = write_clip(tmp_path / "a.mkv", "ffv1", pictures)
    coverage = measure_mask(path, described(path))
    assert coverage.most == 255 and coverage.share == pytest.approx(0.5 / 40)


@pytest.mark.parametrize("step", [1, 7, 40])
def test_a_video_that_seems_black_is_measured_in_parts_that_fit_into_memory(tmp_path, monkeypatch, step):
    pictures = [np.zeros((48, 64, 3), np.uint8) for _ in range(40)]
    pictures[9][:, 32:] = (110, 0, 0)
    path = write_clip(tmp_path / "a.mkv", "ffv1", pictures, "bgr0")
    info, read, most = described(path), masks.read_pixels, []
    monkeypatch.setattr(masks, "PIXELS", step * 64 * 48)
    monkeypatch.setattr(
        masks, "read_pixels", lambda path, *more, **how: most.append(len(more[0])) or read(path, *more, **how)
    )
    assert measure_mask(path, info) == Coverage(COLOURS, pytest.approx(0.5 / 40), 0, 255, is_new=True)
    assert max(most[1:]) == step and sum(most[1:]) == 40
    blank = write_clip(tmp_path / "b.mkv", "ffv1", [picture * 0 for picture in pictures], "bgr0")
    assert measure_mask(blank, described(blank)) == Coverage(BRIGHTNESS, 0.0, 0, 0)


def test_the_rule_that_was_found_at_first_is_kept_for_all_frames(tmp_path):
    pictures = boxes(12, (0, 0, 0, 255), (0, 0, 0, 0))
    pictures[3][..., 3] = 255
    path = write_clip(tmp_path / "a.mov", "qtrle", pictures, "argb")
    info = Inspector().inspect([path], masks=[path])[path]
    assert info.mask.rule == OPACITY and (read_mask(path, (3,), info) == 255).all()
    assert (read_mask(path, (3,), Inspector().inspect([path])[path]) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
@pytest.mark.parametrize("colour", [0, 255])
def test_an_animated_cut_out_is_read_by_its_opacity(tmp_path, suffix, colour):
    pictures = []
    for number in range(6):
        shape = np.zeros((48, 64, 4), np.uint8)
        shape[10:40, 8 + number : 40 + number] = (colour, colour, colour, 255)
        pictures.append(Image.fromarray(shape))
    path = tmp_path / f"a.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=60, loop=0, disposal=2, lossless=True)
    info = described(path)
    coverage = measure_mask(path, info)
    assert coverage.rule == OPACITY and coverage.share == pytest.approx(30 * 32 / (48 * 64), abs=0.01)
    mask = read_mask(path, (3,), replace(info, mask=coverage))[0]
    assert mask[20, 12:42].min() == 255 and mask[20, :10].max() == 0 and mask[:9].max() == 0

"""Pictures and animations are made here: with profiles, orientations, transparency, timing, and with too much of it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from tests.clips import COLOURS, colours_of, number_of, numbered, numbers_of
from utils.media import images
from utils.media.decoding import read_pixels
from utils.media.description import ANIMATION, IMAGE, Look, MediaError, MediaInfo
from utils.media.images import open_image, probe_image, read_images, read_raw

P3_PRIMARIES = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))  # for D50
SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
SRGB_TO_P3 = np.array([(0.82246, 0.17754, 0.0), (0.03319, 0.96681, 0.0), (0.01708, 0.07240, 0.91052)])


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2 with these tags."""
    text = b"made for a test\0"
    tags = tags | {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642) + fixed(1) + fixed(0.8249),
        b"cprt": b"text\0\0\0\0none\0",
    }
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    illuminant = fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head + illuminant + bytes(48) + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def columns(primaries: tuple[tuple[float, ...], ...]) -> dict[bytes, bytes]:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    return {name: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz)) for name, xyz in zip(names, primaries, strict=True)}


def display_p3(gamma: float = 2.2) -> bytes:
    return profile(b"RGB ", columns(P3_PRIMARIES) | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma)))


def srgb_light(codes: np.ndarray) -> np.ndarray:
    share = codes / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def srgb_codes(light: np.ndarray) -> np.ndarray:
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def read(path: Path) -> np.ndarray:
    return read_pixels(path, (0,))[0]


# ------------------------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_wide_colours_of_a_profile_become_those_of_srgb(tmp_path, suffix):
    wide = 255 * np.clip(srgb_light(numbered(5)) @ SRGB_TO_P3.T, 0, 1) ** (1 / 2.2)
    settings = {"webp": {"lossless": True}, "jpg": {"quality": 98, "subsampling": 0}}.get(suffix, {})
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.rint(wide).astype(np.uint8)).save(path, icc_profile=display_p3(), **settings)
    assert np.abs(colours_of(read(path)) - COLOURS).max() <= (8 if suffix == "jpg" else 2)
    assert np.abs(colours_of(wide) - COLOURS).max() > 15, "they were other numbers"
    assert probe_image(path).notes == ("colours converted from made for a test",)


def test_a_grey_picture_of_another_gamma_becomes_srgb(tmp_path):
    values = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile(b"GRAY", {b"kTRC": curve(1.8)}))
    shown = read(tmp_path / "a.png")
    assert np.abs(shown - srgb_codes((values / 255) ** 1.8)[..., None]).max() <= 2
    assert np.ptp(shown, axis=-1).max() == 0 and shown[0, 128, 0] > 130


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_of_srgb_changes_no_bit_and_is_not_mentioned(tmp_path, mode):
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made.save(tmp_path / "with.png", icc_profile=srgb)
    made.save(tmp_path / "without.png")
    assert np.array_equal(read(tmp_path / "with.png"), read(tmp_path / "without.png"))
    assert probe_image(tmp_path / "with.png").notes == ()


def test_a_profile_of_srgb_by_measured_curves_changes_no_bit_either(tmp_path):
    """As cameras and Photoshop write it: version 2, with curves of 1024 values."""
    values = np.rint(65535 * srgb_light(np.linspace(0, 255, 1024))).astype(int)
    table = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *values)
    made = profile(b"RGB ", columns(SRGB_PRIMARIES) | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table))
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=made)
    converted = ImageCms.profileToProfile(
        Image.fromarray(noise), ImageCms.ImageCmsProfile(io.BytesIO(made)), ImageCms.createProfile("sRGB")
    )
    assert not np.array_equal(np.asarray(converted), noise), "converting would round"
    assert np.array_equal(read(tmp_path / "a.png"), noise) and probe_image(tmp_path / "a.png").notes == ()


def test_a_damaged_profile_is_not_used_and_named(tmp_path):
    Image.fromarray(numbered(5)).save(tmp_path / "a.png", icc_profile=display_p3()[:200])
    assert np.array_equal(read(tmp_path / "a.png"), numbered(5))
    assert probe_image(tmp_path / "a.png").notes == ("its colour profile is damaged and not used",)


def test_a_profile_of_another_kind_of_picture_is_not_used(tmp_path):
    Image.fromarray(numbered(5)).save(tmp_path / "a.png", icc_profile=profile(b"GRAY", {b"kTRC": curve(1.8)}))
    assert np.array_equal(read(tmp_path / "a.png"), numbered(5))


def test_ink_becomes_light(tmp_path):
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, 16:32, 1:3] = 255
    inks[:, 32:, 3] = 255
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=98, subsampling=0)
    shown = read(tmp_path / "a.jpg")
    for x, colour in ((8, (255, 255, 255)), (24, (255, 0, 0)), (40, (0, 0, 0))):
        assert np.abs(shown[8, x].astype(int) - colour).max() <= 4


def test_a_profile_also_counts_below_transparent_areas(tmp_path):
    rgba = np.dstack([np.full((8, 8, 3), (100, 200, 60), np.uint8), np.full((8, 8), 255, np.uint8)])
    rgba[:, 4:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=display_p3())
    Image.fromarray(rgba[..., :3]).save(tmp_path / "opaque.png", icc_profile=display_p3())
    shown = read(tmp_path / "a.png")
    assert np.array_equal(shown[:, :4], read(tmp_path / "opaque.png")[:, :4]) and (shown[:, 4:] == 255).all()
    assert shown[0, 0].tolist() != [100, 200, 60]


@pytest.mark.parametrize(
    ("codes", "look"),
    [((9, 16), Look(transfer="pq", primaries="bt2020")), ((12, 18), Look(transfer="hlg", primaries="p3"))],
)
def test_an_hdr_png_or_avif_says_so_and_is_tone_mapped(tmp_path, codes, look):
    chunk = PngImagePlugin.PngInfo()
    chunk.add(b"cICP", bytes([*codes, 0, 1]))
    grey = Image.new("RGB", (8, 8), (148, 148, 148))
    grey.save(tmp_path / "a.png", pnginfo=chunk)
    grey.save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    at = data.index(b"colrnclx") + 8
    data[at : at + 4] = struct.pack(">HH", *codes)
    (tmp_path / "a.avif").write_bytes(data)
    for name in ("a.png", "a.avif"):
        assert probe_image(tmp_path / name).look == look
    white = {"pq": 238, "hlg": 181}[look.transfer]  # 203 cd/m2, and a code below the white of HLG
    assert np.abs(read(tmp_path / "a.png").astype(int) - white).max() <= 2


# ------------------------------------------------------------------------------------------------ orientation and size


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_all_eight_orientations_are_made_upright(tmp_path, orientation):
    stored, exif = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.webp", "a.tif"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif, **({"lossless": True} if "webp" in name else {}))
        expected = UPRIGHT[orientation](stored)
        info = probe_image(tmp_path / name)
        assert (info.height, info.width) == expected.shape[:2] and np.array_equal(read(tmp_path / name), expected)
        assert np.array_equal(read_raw(tmp_path / name)[0], expected) and info.reading == {}


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 13500, 13500)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError) as caught:
        probe_image(tmp_path / "a.png")
    assert caught.value.reason == "it has 13500x13500 pixels, more than the 178 million that are read: reduce it"


def test_a_picture_between_the_limits_of_pillow_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 6 * 9)
    Image.new("RGB", (6, 9)).save(tmp_path / "fits.png")
    Image.new("RGB", (6, 10)).save(tmp_path / "large.png")
    assert probe_image(tmp_path / "fits.png").frames == 1 and Image.MAX_IMAGE_PIXELS is None
    with pytest.raises(MediaError, match="6x10 pixels"):
        probe_image(tmp_path / "large.png")


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_png_may_hold_a_whole_workflow_as_text(tmp_path, is_compressed):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 2**20, zip=is_compressed)
    Image.fromarray(numbered(5)).save(tmp_path / "a.png", pnginfo=text)
    assert np.array_equal(read(tmp_path / "a.png"), numbered(5))


def test_text_without_end_is_refused_by_name(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "a" * (2**26 + 1), zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(MediaError, match="Pillow: .*MAX_TEXT"):
        probe_image(tmp_path / "a.png")


def test_values_of_16_bits_are_scaled_and_never_wrap(tmp_path):
    Image.fromarray(np.array([[0, 257, 257 * 90, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 90, 255]
    Image.fromarray(np.array([[-5, 257 * 90, 65535, 70000]], np.int32)).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 90, 255, 255]


# ------------------------------------------------------------------------------------------------- several pictures


TIMES = [50, 200, 100, 400, 30, 60]
SAVED = {
    "a.gif": {},
    "a.webp": {"lossless": True},
    "a.png": {},
    "a.avif": {"quality": 95},
}


def animation(path: Path, count: int = 6, **settings: object) -> Path:
    first, *rest = (Image.fromarray(numbered(number)) for number in range(count))
    settings = SAVED[f"a{path.suffix}"] | {"duration": TIMES[:count]} | settings
    first.save(path, save_all=True, append_images=rest, **settings)
    return path


@pytest.mark.parametrize("name", SAVED)
def test_an_animation_is_a_clip_with_its_own_timing(tmp_path, name):
    info = probe_image(animation(tmp_path / name))
    assert (info.kind, info.frames, info.width, info.height) == (ANIMATION, 6, 64, 48)
    assert info.notes == ("an animation",) and info.is_whole and not info.is_image
    assert info.timeline.times == (0, 50, 250, 350, 750, 780)
    assert info.fps == pytest.approx(6 / 0.84)
    whole = read_pixels(tmp_path / name, range(6), info)
    assert numbers_of(whole) == list(range(6))
    for wanted in ([3], [5], [1, 4], [0]):
        assert np.array_equal(read_pixels(tmp_path / name, wanted, info), whole[wanted])
    with pytest.raises(MediaError, match="frame 6 was requested, but the last frame is 5"):
        read_pixels(tmp_path / name, [6], info)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("count", [2, 4])
def test_of_a_few_pictures_the_first_one_is_used(tmp_path, name, count):
    info = probe_image(animation(tmp_path / name, count))
    assert (info.kind, info.frames, info.fps) == (IMAGE, 1, None)
    assert info.notes == (f"the first of its {count} pictures",)
    assert number_of(read(tmp_path / name)) == 0


def test_progress_is_told_for_each_picture(tmp_path):
    path, places = animation(tmp_path / "a.webp"), []
    probe_image(path, places.append)
    assert len(places) == 6 and places == sorted(places) and path.stat().st_size / 2 < places[-1] <= path.stat().st_size


def test_pictures_without_a_duration_are_shown_as_long_as_browsers_do(tmp_path):
    info = probe_image(animation(tmp_path / "a.gif", duration=[0, 10, 20, 0, 0, 0]))
    assert info.timeline.times == (0, 100, 200, 220, 320, 420)


def test_the_picture_of_an_animated_png_for_other_programs_is_not_part_of_it(tmp_path):
    animation(tmp_path / "a.png", default_image=True, duration=TIMES[1:])
    info = probe_image(tmp_path / "a.png")
    assert info.frames == 5 and numbers_of(read_pixels(tmp_path / "a.png", range(5), info)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("disposal", [1, 2])
@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_pictures_of_an_animation_are_put_together_on_white(tmp_path, name, disposal):
    made = []
    for number in range(6):
        rgba = np.zeros((48, 64, 4), np.uint8)
        rgba[8:40, 10 * number : 10 * number + 8] = (10, 30 * number, 200, 255)
        made.append(Image.fromarray(rgba))
    # For a PNG these numbers are one less, and one more says how a picture is put on the one before.
    how = {"disposal": disposal} if name == "a.gif" else {"disposal": disposal - 1, "blend": 1}
    made[0].save(tmp_path / name, save_all=True, append_images=made[1:], duration=100, **how)
    info = probe_image(tmp_path / name)
    shown = read_pixels(tmp_path / name, (3, 5), info)
    assert (shown[:, :8] == 255).all() and (shown[:, :, 60:] == 255).all(), "transparent areas are white"
    assert np.abs(shown[0, 20, 34].astype(int) - (10, 90, 200)).max() <= 2
    earlier = shown[0, 20, 14].tolist()
    assert earlier == [255, 255, 255] if disposal == 2 else np.abs(np.array(earlier) - (10, 30, 200)).max() <= 2


def test_of_a_file_of_pages_the_first_one_is_used(tmp_path):
    first, *rest = (Image.fromarray(numbered(number)) for number in range(7))
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    first.save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=rest, quality=95)
    info = probe_image(tmp_path / "a.tif")
    assert (info.kind, info.frames, info.notes) == (IMAGE, 1, ("the first of its 7 pictures",))
    assert probe_image(tmp_path / "a.mpo") == MediaInfo(64, 48, 1, None, IMAGE, is_whole=True)
    assert number_of(read(tmp_path / "a.tif")) == number_of(read(tmp_path / "a.mpo")) == 0


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.avif"])
def test_an_animation_that_was_cut_short_is_refused(tmp_path, name):
    data = animation(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match="not a readable image"):
        probe_image(tmp_path / name)


def test_a_gif_cut_anywhere_is_a_media_error_or_fewer_pictures(tmp_path):
    data, path = animation(tmp_path / "a.gif").read_bytes(), tmp_path / "cut.gif"
    refused = 0
    for length in range(1, len(data), 7):
        path.write_bytes(data[:length])
        try:
            assert probe_image(path).frames in (1, 5, 6)
        except MediaError:
            refused += 1
    assert refused > 50


# ---------------------------------------------------------------------------------------------------- which are read


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "MPO", "GIF", "TIFF", "AVIF"])
def test_known_images_are_read_under_any_suffix(tmp_path, kind):
    more = {"save_all": True, "append_images": [Image.new("RGB", (32, 16), "blue")]} if kind == "MPO" else {}
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (32, 16), "red").save(tmp_path / name, kind, **more)
        assert probe_image(tmp_path / name) == MediaInfo(32, 16, 1, None, IMAGE, is_whole=True)
        red, green, blue = read(tmp_path / name)[8, 8].tolist()
        assert red > 250 and green < 6 and blue < 5


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "JPEG2000", "EPS", "PCX", "SGI", "PDF"])
def test_other_images_are_refused(tmp_path, kind):
    Image.new("RGB", (32, 16), "red").save(tmp_path / "a.png", kind)
    with pytest.raises(MediaError, match="neither JPEG, PNG, WebP, BMP, GIF, TIFF nor AVIF"):
        probe_image(tmp_path / "a.png")
    with pytest.raises(MediaError, match="neither JPEG"), open_image(tmp_path / "a.png"):
        pass


def test_truncated_and_mislabelled_images_are_refused(tmp_path):
    made = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif", "a.avif"):
        made.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
        with pytest.raises(MediaError, match="not a readable image"):
            probe_image(tmp_path / name)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(MediaError, match="not a readable image"):
        probe_image(tmp_path / "b.png")


def test_stored_values_and_opacity_are_those_of_the_file(tmp_path):
    labels = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    values, opacity = read_raw(tmp_path / "grey.png")
    assert np.array_equal(values, labels) and opacity is None
    Image.fromarray(np.array([[0, 40000]], np.uint16)).save(tmp_path / "deep.png")
    assert read_raw(tmp_path / "deep.png")[0].tolist() == [[0, 40000]]
    Image.fromarray(np.array([[(9, 8, 7, 0), (9, 8, 7, 130)]], np.uint8)).save(tmp_path / "clear.png")
    values, opacity = read_raw(tmp_path / "clear.png")
    assert values.tolist() == [[[9, 8, 7]] * 2] and opacity.tolist() == [[0, 130]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 10, 60, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    assert read_raw(tmp_path / "palette.png")[0].tolist() == [[[200, 10, 60], [0, 255, 0]]]
    assert np.array_equal(read_images(tmp_path / "palette.png", (0,), Look())[0], read_raw(tmp_path / "palette.png")[0])

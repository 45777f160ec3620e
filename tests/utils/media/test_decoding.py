"""Every file is made here, small and odd on purpose."""

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clips import check_every_way_of_reading, joined, number_of, numbers_of, write_clip
from tests.media import CODECS, OTHER_CLIPS, decode_all, encode, moving, remux
from utils.media import decoding
from utils.media.decoding import read_pixels
from utils.media.description import MediaError, MediaInfo, Timeline
from utils.media.frames import read_frames, write_video
from utils.media.inspection import Inspector
from utils.media.probing import probe
from utils.media.video import Video


def turn_header(path: Path) -> None:
    """Write a display matrix of 90 degrees clockwise into the mp4's track header."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    for index, value in enumerate([0, 1 << 16, 0, 0xFFFF0000, 0, 0, 48 << 16, 0, 1 << 30]):
        data[start + 4 * index : start + 4 * index + 4] = value.to_bytes(4, "big")
    path.write_bytes(data)


def test_damage_behind_the_first_frames_is_a_media_error_and_never_hangs(tmp_path):
    encode(tmp_path / "a.mp4", "libx264")
    remux(tmp_path / "a.mp4", tmp_path / "bad.mp4", movflags="faststart")
    data = bytearray((tmp_path / "bad.mp4").read_bytes())
    data[len(data) * 6 // 10 :] = bytes(len(data) - len(data) * 6 // 10)
    (tmp_path / "bad.mp4").write_bytes(data)
    assert probe(tmp_path / "bad.mp4").frames == 30
    with pytest.raises(MediaError):
        read_frames(tmp_path / "bad.mp4", range(20, 30))


def test_rotation_metadata_turns_size_and_pixels_upright(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 16)
    flat = read_frames(tmp_path / "a.mp4", range(13))
    turn_header(tmp_path / "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (48, 64)
    assert torch.equal(read_frames(tmp_path / "a.mp4", range(13)), torch.rot90(flat, -1, (2, 3)))


@pytest.mark.parametrize("without_decord", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_any_frames_of_any_codec_equal_those_of_a_full_decode(tmp_path, monkeypatch, name, without_decord):
    if without_decord:
        monkeypatch.setattr(decoding, "_decord", lambda: None)
    codec, options = CODECS[name]
    path = encode(tmp_path / name, codec, **options)
    whole, info = decode_all(path), probe(path, full=True)
    assert info.frames == len(whole) == 30
    rng = random.Random(name)
    for wanted in [[29], [0], list(range(30))] + [sorted(rng.sample(range(30), 4)) for _ in range(5)]:
        pixels = read_frames(path, wanted, info).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, whole[wanted]), wanted


@pytest.mark.parametrize("name", ["h264.mkv", "hevc.mp4", "vp9.webm"])
def test_a_late_frame_is_found_from_the_keyframe_before_it(tmp_path, name):
    codec, options = CODECS[name]
    path = encode(tmp_path / name, codec, **options)
    info = probe(path)
    timeline = info.timeline
    wanted = timeline.times[15]
    keyframe = max(time for time in timeline.keyframes if time <= wanted)
    assert keyframe > timeline.times[6]
    (found,) = decoding._decode(path, [wanted], info, keyframe=keyframe)
    assert np.array_equal(found, decode_all(path)[15])


@pytest.mark.parametrize(("suffix", "most"), [("mkv", 12), ("mp4", 12), ("ts", 60)])
def test_reading_a_late_frame_does_not_decode_the_file_from_its_start(tmp_path, monkeypatch, suffix, most):
    info = probe(write_clip(path := tmp_path / f"a.{suffix}", frames=120, gop=6))
    decoded, decode = [], Video.decode
    monkeypatch.setattr(Video, "decode", lambda self, packet: decoded.append(1) or decode(self, packet))
    assert number_of(decoding._read_with_pyav(path, [117], info)[0]) == 117 and len(decoded) < most


@pytest.mark.parametrize(
    ("suffix", "codec"), [("flv", "libx264"), ("m2v", "mpeg2video"), ("ts", "libx264"), ("mpg", "mpeg2video")]
)
def test_where_no_time_can_be_found_decoding_starts_at_the_start(tmp_path, suffix, codec):
    container = {"m2v": "mpeg2video", "mpg": "mpeg"}.get(suffix)
    path = write_clip(tmp_path / f"a.{suffix}", codec, 24, rate=25, b=2_000_000, container=container)
    info = probe(path, full=True)
    check_every_way_of_reading(path, info, read_pixels(path, range(24), info))
    assert numbers_of(read_pixels(path, [20, 23], info)) == [20, 23]


@pytest.mark.parametrize("path", [None, *OTHER_CLIPS], ids=lambda path: path.stem if path else "made here")
def test_decord_and_pyav_give_equal_pixels(path, tmp_path):
    pytest.importorskip("decord")
    path = path or encode(tmp_path / "a.mp4", "libx264", bf="3")
    info = probe(path, full=True)
    for wanted in (list(range(0, 9)), list(range(info.frames - 9, info.frames, 2))):
        fast = decoding._read_with_decord(path, wanted, info)
        assert fast is not None and np.array_equal(fast, decoding._read_with_pyav(path, wanted, info))


def test_decord_is_left_out_unless_every_frame_was_decoded_and_counted(tmp_path):
    pytest.importorskip("decord")
    path = encode(tmp_path / "a.mp4", "libx264")
    whole = probe(path, full=True)
    assert decoding._read_with_decord(path, [3], whole) is not None
    for other in (probe(path), replace(whole, frames=29), replace(whole, timeline=Timeline())):
        assert decoding._read_with_decord(path, [3], other) is None


def test_frames_beyond_the_end_and_unordered_indices_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", moving(5), 16)
    with pytest.raises(MediaError, match="frame 5 was requested"):
        read_frames(tmp_path / "a.mp4", (4, 5))
    for indices in ((), (1, 0), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="ascending"):
            read_frames(tmp_path / "a.mp4", indices)


def test_a_file_that_changed_since_it_was_probed_is_noticed(tmp_path):
    write_video(tmp_path / "a.mp4", moving(13), 16)
    info = probe(tmp_path / "a.mp4")
    write_video(tmp_path / "a.mp4", moving(5), 16)
    for wanted in ((12,), (0,)):
        with pytest.raises(
            MediaError, match="it has changed since it was checked, and no longer holds 13 frames of 64x48"
        ):
            read_frames(tmp_path / "a.mp4", wanted, info)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(MediaError, match="there is no such file"):
        read_frames(tmp_path / "a.mp4", (0,), info)


def test_a_file_that_was_written_again_with_the_same_content_is_read(tmp_path):
    info = probe(write_video(tmp_path / "a.mp4", moving(13), 16) or tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert read_frames(tmp_path / "a.mp4", (12,), info).shape == (1, 3, 48, 64)
    assert read_frames(tmp_path / "a.mp4", (12,), replace(info, stamp=())).shape == (1, 3, 48, 64)


def test_an_error_of_any_type_names_its_file(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving(5), 16)
    for error, words in (
        (RuntimeError("odd"), "it cannot be decoded: RuntimeError: odd"),
        (MemoryError(), "main memory"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(decoding, "_read_with_pyav", fail)
        with pytest.raises(MediaError, match=words) as caught:
            read_frames(tmp_path / "a.mp4", (0,))
        assert caught.value.path == tmp_path / "a.mp4"


def test_grey_palette_alpha_and_16_bit_images_become_rgb(tmp_path):
    grey = Image.fromarray(np.full((4, 6), 90, np.uint8))
    deep = Image.fromarray(np.full((4, 6), 90 * 257, np.uint16))
    clear = Image.new("RGBA", (6, 4), (10, 20, 30, 0))
    cases = {
        "grey": (grey, (90, 90, 90)),
        "deep": (deep, (90, 90, 90)),
        "palette": (Image.new("RGB", (6, 4), (200, 10, 60)).quantize(4), (200, 10, 60)),
        "alpha": (Image.new("RGBA", (6, 4), (10, 20, 30, 255)), (10, 20, 30)),
        "clear": (clear, (255, 255, 255)),
    }
    for name, (image, colour) in cases.items():
        image.save(tmp_path / f"{name}.PNG")
        info = probe(tmp_path / f"{name}.PNG")
        assert (info.width, info.height, info.frames, info.fps) == (6, 4, 1, None)
        pixels = read_frames(tmp_path / f"{name}.PNG", (0,))
        assert pixels.shape == (1, 3, 4, 6) and pixels.dtype == torch.uint8
        assert tuple(pixels[0, :, 2, 3].tolist()) == colour, name


def test_exif_orientation_turns_size_and_pixels_upright(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "a.jpg")
    assert (info.width, info.height) == (16, 32)
    pixels = read_frames(tmp_path / "a.jpg", (0,)).float()
    assert pixels.shape == (1, 3, 32, 16) and pixels[..., 12:].mean() > 240 and pixels[..., :4].mean() < 15


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile real.mp4\n", "#EXTM3U\n#EXTINF:0.5,\nreal.mp4\n"])
def test_decord_is_never_asked_about_a_file_that_pyav_has_refused(tmp_path, monkeypatch, text):
    write_video(tmp_path / "real.mp4", moving(), 16)
    info = probe(tmp_path / "real.mp4")
    (tmp_path / "a.mp4").write_text(text)
    monkeypatch.setattr(decoding, "_decord", lambda: pytest.fail("decord was asked"))
    with pytest.raises(MediaError, match="none of MP4"):
        read_frames(tmp_path / "a.mp4", (0,), info)


def checked(path: Path) -> MediaInfo:
    return Inspector().inspect([path])[path]


def test_a_file_with_another_stamp_is_read_if_its_content_is_the_same(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    info, before = checked(path), read_pixels(path, (3, 9))
    os.link(path, tmp_path / "another_name.mp4")
    os.utime(path, (1, 1))
    assert np.array_equal(read_pixels(path, (3, 9), info), before)


def test_a_file_that_was_replaced_by_one_like_it_is_not_read(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    info = checked(path)
    write_clip(path, crf="40")
    assert (probe(path).frames, probe(path).look) == (info.frames, info.look)
    with pytest.raises(MediaError, match="it has changed since it was checked"):
        read_pixels(path, (3,), info)


def test_intra_refresh_is_not_left_to_decord_which_starts_at_pictures_that_need_others(tmp_path):
    refreshed = write_clip(tmp_path / "a.mp4", **{"x264-params": "intra-refresh=1:keyint=8:bframes=0"})
    info = checked(refreshed)
    assert not info.timeline.suits_decord and info.renumbered
    whole = read_pixels(refreshed, range(24), info)
    for number in (9, 14, 20):
        assert np.array_equal(read_pixels(refreshed, (number,), info)[0], whole[number])
    plain = checked(write_clip(tmp_path / "b.mp4"))
    assert plain.timeline.suits_decord and not plain.renumbered


def test_a_size_that_changes_later_is_scaled_also_where_only_the_first_frames_were_decoded(tmp_path):
    parts = [write_clip(tmp_path / "b.webm", "libvpx"), write_clip(tmp_path / "c.webm", "libvpx", size=(96, 72))]
    path = joined(parts, tmp_path / "a.webm", 1500)
    info = probe(path, full=True)
    unseen = replace(info, look=replace(info.look, scaled=None))  # as where the change comes behind what was decoded
    assert info.look.scaled == (64, 48)
    assert np.array_equal(read_pixels(path, (0, 47), unseen), read_pixels(path, (0, 47), info))

"""Every file is made here, small and odd on purpose."""

import os

import pytest
from PIL import EpsImagePlugin

from tests.clips import (
    check_every_way_of_reading,
    damaged,
    edited,
    joined,
    numbered,
    numbers_of,
    packed,
    packets_of,
    write_clip,
)
from tests.media import CODECS, encode, image, moving, remux, video
from utils.media.decoding import read_pixels
from utils.media.description import IMAGE, MediaError, MediaInfo
from utils.media.frames import read_frames, write_video
from utils.media.images import open_image
from utils.media.inspection import Inspector
from utils.media.probing import is_image, is_video, probe
from utils.media.video import open_video

POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
KNOWN_IMAGES = "neither JPEG, PNG, WebP, BMP, GIF, TIFF nor AVIF"
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


def test_bad_videos_are_refused_in_one_line_that_names_the_path_once(tmp_path):
    write_video(tmp_path / "good.mp4", moving(), 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-300])
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name, word in {"cut": "cut short", "text": "none of MP4", "empty": "empty", "missing": "no such"}.items():
        with pytest.raises(MediaError, match=word) as caught:
            probe(tmp_path / f"{name}.mp4")
        assert caught.value.path == tmp_path / f"{name}.mp4"
        assert str(caught.value).count(name) == 1 + (name in word) and "\n" not in str(caught.value)


def test_a_header_that_promises_more_frames_than_the_file_holds_is_refused(tmp_path):
    encode(tmp_path / "a.mp4", "libx264")
    remux(tmp_path / "a.mp4", tmp_path / "front.mp4", movflags="faststart")
    assert probe(tmp_path / "front.mp4").frames == 30
    data = (tmp_path / "front.mp4").read_bytes()
    for kept in (len(data) * 6 // 10, len(data) - 5):
        (tmp_path / "cut.mp4").write_bytes(data[:kept])
        with pytest.raises(MediaError, match=r"cut short: only [12]\d of its 30 frames"):
            probe(tmp_path / "cut.mp4")


def test_an_avi_that_was_cut_or_has_a_hole_is_refused_and_one_with_repeated_frames_is_not(tmp_path):
    whole = write_clip(tmp_path / "a.avi", "rawvideo", 24, "bgr24")
    data = whole.read_bytes()
    for name, changed in (
        ("cut", data[: len(data) * 2 // 3]),
        ("hole", data[:90_000] + bytes(30_000) + data[120_000:]),
    ):
        (tmp_path / f"{name}.avi").write_bytes(changed)
        with pytest.raises(MediaError, match=r"cut short: only (15|20|21) of its 24 frames"):
            probe(tmp_path / f"{name}.avi")
    times = [0, 1, 2, 6, 7, 20]
    info = probe(write_clip(tmp_path / "b.avi", "mjpeg", 6, "yuvj420p", times=times, base=30, rate=30), full=True)
    assert info.frames == 6 and info.timeline.seconds() == [time / 30 for time in times]


@pytest.mark.parametrize("name", ["A.MP4", "ein schöner film ü.mp4", "片 段.Mov"])
def test_names_may_have_upper_case_suffixes_spaces_and_unicode(tmp_path, name):
    write_video(tmp_path / name, moving(5), 16)
    assert is_video(tmp_path / name) and not is_image(tmp_path / name)
    assert probe(tmp_path / name).frames == 5
    assert read_frames(tmp_path / name, (0, 4)).shape == (2, 3, 48, 64)


@pytest.mark.parametrize("name", CODECS)
def test_a_full_decode_finds_what_packets_say_and_decord_is_trusted_with_plain_h264_only(tmp_path, name):
    codec, options = CODECS[name]
    path = encode(tmp_path / name, codec, **options)
    quick, full = probe(path), probe(path, full=True)
    assert full.timeline.suits_decord is (name == "h264.mkv")
    assert (quick.is_whole, full.is_whole) == (False, True) and quick.reading == full.reading == {}
    assert (quick.frames, quick.fps, quick.timeline) == (full.frames, full.fps, full.timeline)
    assert quick.stamp == full.stamp and quick.notes == full.notes == ()


def test_colours_that_cannot_be_converted_are_noticed_before_anything_is_read(tmp_path):
    def edit(context):
        context.colorspace = 8  # YCgCo

    with pytest.raises(MediaError) as caught:
        probe(write_clip(tmp_path / "a.mp4", frames=3, edit=edit))
    assert caught.value.reason == "its colours cannot be converted to RGB: convert it to BT.709"


def test_decord_is_not_trusted_with_other_colours_and_containers(tmp_path):
    assert not probe(encode(tmp_path / "10bit.mp4", "libx264", "yuv420p10le")).timeline.suits_decord
    assert not probe(write_clip(tmp_path / "a.avi", "libx264", 8, bf=0), full=True).timeline.suits_decord
    assert not probe(write_clip(tmp_path / "a.ts", "libx264", 8), full=True).timeline.suits_decord


# ----------------------------------------------------------------------------------------------- frames and their times

OPEN = {"bf": 3, "x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0"}
HEVC = {"x265-params": "log-level=none:keyint=12:min-keyint=12:scenecut=0"}
CUTS = {
    "open.mkv": ("libx264", OPEN, 1),
    "hevc.mkv": ("libx265", HEVC, 3),
    "hevc.ts": ("libx265", HEVC, 3),
    "hevc.mp4": ("libx265", HEVC, 3),
    "mpeg2.mkv": ("mpeg2video", {"bf": 2, "b": 2_000_000, "rate": 25}, 2),
    "mpeg2.ts": ("mpeg2video", {"bf": 2, "b": 2_000_000, "rate": 25}, 2),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_file_cut_at_an_open_group_starts_with_the_frame_that_can_be_decoded(tmp_path, name):
    codec, options, missing = CUTS[name]
    whole = write_clip(tmp_path / "whole.mkv", codec, 36, **options)
    keys = [number for number, packet in enumerate(packets_of(whole)) if packet.is_keyframe]
    start = keys[1] if "hevc" in name else keys[2]
    muxer = {"use_editlist": "0"} if name.endswith("mp4") else {}
    path = joined([whole], tmp_path / name, 0, start, **muxer)
    info = probe(path, full=True)
    assert info.frames == 24 and info.renumbered and info.timeline.times[0] in info.timeline.keyframes
    ends = "frame" if missing == 1 else "frames"
    assert info.notes == (f"without {missing} {ends} at its start that cannot be decoded",)
    assert numbers_of(read_pixels(path, range(24), info)) == list(range(12, 36))
    quick = probe(path)
    assert (quick.frames, quick.timeline, quick.notes) == (info.frames, info.timeline, info.notes)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_file_cut_within_a_group_starts_with_its_first_keyframe(tmp_path, suffix):
    whole = write_clip(tmp_path / "whole.mp4", frames=36, gop=12, bf=0)
    path = joined([whole], tmp_path / f"cut.{suffix}", 0, 5)
    info = probe(path, full=True)
    numbers = numbers_of(read_pixels(path, range(info.frames), info))
    assert numbers == list(range(numbers[0], 36)) and numbers[0] in (11, 12) and info.renumbered
    assert info.notes == (f"without {numbers[0] - 5} frames at its start that cannot be decoded",)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "flv", "ts"])
def test_frames_of_changing_distance_have_their_own_times(tmp_path, suffix):
    times = [0, 1, 2, 10, 11, 40, 41, 42, 100, 101]
    info = probe(write_clip(tmp_path / f"a.{suffix}", frames=10, times=times, base=30, rate=30), full=True)
    assert info.frame_times() == pytest.approx([time / 30 for time in times], abs=0.001)
    assert info.fps == pytest.approx(9 * 30 / 101, rel=0.01), "by the times, where the header says another rate"


@pytest.mark.parametrize("first", [-5, 0, 1000])
def test_times_count_from_the_first_frame_that_is_shown(tmp_path, first):
    times = list(range(first, first + 12))
    info = probe(write_clip(tmp_path / "a.mkv", frames=12, times=times, base=16))
    assert info.frame_times() == pytest.approx([index / 16 for index in range(12)], abs=0.002)
    shown = probe(write_clip(tmp_path / "a.mp4", frames=12, times=times, base=16), full=True)
    assert numbers_of(read_pixels(tmp_path / "a.mp4", range(shown.frames), shown))[0] == max(0, -first)


def test_times_that_wrap_around_or_jump_back_are_no_reason_to_lose_frames(tmp_path):
    late = {"output_ts_offset": str((2**33 - 45000) / 90000)}
    for name, codec in (("a.ts", "libx264"), ("b.ts", "mpeg2video")):
        info = probe(write_clip(tmp_path / name, codec, 24, rate=25, b=2_000_000, muxer=late), full=True)
        assert info.frames == 24 and info.frame_times() == pytest.approx([index / 25 for index in range(24)])
    parts = [
        write_clip(
            tmp_path / f"{first}.mpg",
            "mpeg2video",
            [numbered(first + i) for i in range(8)],
            container="mpeg",
            rate=25,
            b=2_000_000,
        )
        for first in (0, 8)
    ]
    (tmp_path / "twice.mpg").write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe(tmp_path / "twice.mpg", full=True)
    assert info.timeline.times == () and info.frame_times() == pytest.approx([index / 25 for index in range(16)])
    assert numbers_of(read_pixels(tmp_path / "twice.mpg", range(16), info)) == list(range(16))


EDITS = {
    "without the first": ([(21, 3)], range(3, 24)),
    "the middle": ([(9, 4)], range(4, 13)),
    "after a pause": ([(8, -1), (24, 0)], range(24)),
    "without the middle": ([(8, 0), (8, 12)], [*range(8), *range(12, 20)]),
    "twice the same": ([(8, 0), (8, 4)], [*range(8), *range(4, 12)]),
    "the end first": ([(6, 12), (6, 0)], [*range(12, 18), *range(6)]),
}


@pytest.mark.parametrize(
    ("codec", "name"),
    # FFmpeg takes a jump within HEVC for damage.
    [*(("libx264", name) for name in EDITS), *(("libx265", name) for name in list(EDITS)[:3])],
)
def test_frames_are_those_that_an_edit_list_shows(tmp_path, codec, name):
    options = {"bf": 2} if codec == "libx264" else {"x265-params": "log-level=none:keyint=6:min-keyint=6"}
    edits, numbers = EDITS[name]
    path = edited(write_clip(tmp_path / "a.mp4", codec, 24, **options), tmp_path / "b.mp4", edits)
    info = probe(path, full=True)
    whole = read_pixels(path, range(info.frames), info)
    assert numbers_of(whole) == list(numbers) and info.notes == ()
    assert info.frame_times() == pytest.approx([index / 16 for index in range(len(numbers))], abs=0.001)
    check_every_way_of_reading(path, info, whole)


def test_two_pictures_in_one_packet_are_two_frames(tmp_path):
    source = write_clip(tmp_path / "a.avi", "mpeg4", 24, bf=1, gop=12, b=2_000_000)
    path = packed(source, tmp_path / "packed.avi")
    assert len(packets_of(path)) == 24 and min(packet.size for packet in packets_of(path)) == 7, "empty pictures"
    info = probe(path, full=True)
    whole = read_pixels(path, range(info.frames), info)
    assert numbers_of(whole) == list(range(24)) and info.notes == ()
    check_every_way_of_reading(path, info, whole)


def test_keyframes_that_no_decoder_confirms_are_not_sought(tmp_path):
    path = write_clip(tmp_path / "a.mov", "rpza", 24, "rgb555le")  # FFmpeg writes no list of keyframes for it
    info = probe(path)
    assert all(packet.is_keyframe for packet in packets_of(path)) and info.timeline.keyframes == ()
    assert numbers_of(read_pixels(path, [9, 11, 23], info)) == [9, 11, 23]
    intra = probe(write_clip(tmp_path / "b.mov", "prores_ks", 6, "yuv422p10le"), full=True)
    assert len(intra.timeline.keyframes) == 6


def test_progress_is_told_in_bytes_of_the_file(tmp_path):
    path, places = write_clip(tmp_path / "a.mkv", frames=24), []
    probe(path, full=True, progress=places.append)
    assert len(places) > 20 and path.stat().st_size * 0.8 < max(places) <= path.stat().st_size


def test_what_ffmpeg_reports_is_damage_unless_no_picture_changes(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=24)

    def reporting(text, at=9):
        calls = iter(range(100))
        return lambda: text if next(calls) == at else ""

    for harmless in (
        "[h264 @ 0x1] mmco: unref short failure\n",
        "[mov @ 0x2] \n",
        "",
        "[h264 @ 0x1] SEI type 5 size 9\n",
    ):
        assert probe(path, full=True, listen=reporting(harmless)).frames == 24
    with pytest.raises(MediaError) as caught:
        probe(
            path,
            full=True,
            listen=reporting("[h264 @ 0x55] mmco: unref\n[h264 @ 0x55] cabac \x1b[0mdecode failed\nmore"),
        )
    place, _, text = caught.value.reason.partition(": ")
    assert text == "cabac [0mdecode failed" and place.startswith("damaged after 0.") and place.endswith(" s")
    assert probe(path, full=True, listen=reporting("[h264 @ 0x1] concealing errors\n", at=0)).frames == 24, "of opening"


def test_pictures_that_a_decoder_calls_incomplete_are_damage_also_where_it_reports_nothing(tmp_path):
    whole = write_clip(tmp_path / "a.ts", "mpeg2video", 48, rate=25, b=2_000_000)
    with pytest.raises(MediaError, match=r"damaged after [01]\.\d\d s: a picture is incomplete"):
        probe(damaged(whole, tmp_path / "b.ts"), full=True)


# ---------------------------------------------------------------- the content of a file chooses no program and no file


@posix_only
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif"])
def test_an_image_that_holds_postscript_is_refused_and_no_program_is_started(tmp_path, monkeypatch, name):
    ghostscript, trace = tmp_path / "bin" / "gs", tmp_path / "started"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {trace}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # forget the result of an earlier search
    path = tmp_path / name
    path.write_text(POSTSCRIPT)
    error = Inspector().inspect([path])[path]
    assert not trace.exists() and error.reason.endswith(KNOWN_IMAGES)
    for read in (lambda: probe(path), lambda: read_frames(path, (0,), MediaInfo(10, 10, 1, None))):
        with pytest.raises(MediaError, match=KNOWN_IMAGES):
            read()
    assert not trace.exists()


@posix_only
@pytest.mark.parametrize("name", ["a%d.png", "a*.jpg", "data:a1.png", "-.png"])
def test_the_name_of_an_image_is_no_pattern_either(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        image(tmp_path / f"a{number}.png")
    image(tmp_path / "small.png", size=(32, 16)).rename(name)
    path = tmp_path / name
    assert probe(path) == MediaInfo(32, 16, 1, None, IMAGE, is_whole=True)
    assert read_frames(path, (0,)).shape == (1, 3, 16, 32)


@posix_only
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path, suffix):
    pipe, device, folder, lost = (tmp_path / f"{name}{suffix}" for name in ("pipe", "device", "folder", "lost"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    lost.symlink_to(tmp_path / "nowhere")
    for path in (pipe, device, folder):
        for read in (probe, lambda path: read_frames(path, (0,), MediaInfo(64, 48, 9, 16.0, stamp=(1, 2, 3, 4)))):
            with pytest.raises(MediaError, match="not a regular file, but a folder, a pipe or a device"):
                read(path)
        for opened in (open_image, open_video):
            with pytest.raises(MediaError, match="not a regular file"), opened(path):
                pass
    with pytest.raises(MediaError, match="there is no such file"):
        probe(lost)


@posix_only
def test_a_link_to_a_file_is_read_and_a_name_that_no_file_can_have_is_refused(tmp_path):
    (tmp_path / "link.mp4").symlink_to(video(tmp_path / "real.mp4"))
    assert probe(tmp_path / "link.mp4").frames == 9
    with pytest.raises(MediaError, match="there is no such file"):
        probe(tmp_path / "a\0b.mp4")
    with pytest.raises(MediaError, match="the file cannot be read: Not a directory"):
        probe(tmp_path / "real.mp4" / "b.mp4")

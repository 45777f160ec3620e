"""Every file is made here, small and odd on purpose."""

import os
import pickle
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from tests.media import CODECS, encode, image, moving, remux, video
from utils.common.errors import UserError
from utils.media import probing
from utils.media.frames import read_frames, write_video
from utils.media.inspection import inspect_all
from utils.media.probing import MediaError, MediaInfo, frame_times, open_image, open_video, probe, read_timeline

ROOT = Path(__file__).resolve().parents[3]
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
# Texts that FFmpeg or the FFmpeg of decord recognise, and that make it open another file or a socket.
SCRIPTS = {
    "concat.mp4": "ffconcat version 1.0\nfile real.mp4\n",
    "playlist.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nreal.ts\n#EXT-X-ENDLIST\n",
    "playlist.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nreal.ts\n#EXT-X-ENDLIST\n",
    "session.mp4": "v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


def test_bad_videos_are_refused_in_one_line_that_names_the_path_once(tmp_path):
    write_video(tmp_path / "good.mp4", moving(), 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-300])
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name, word in {"cut": "cut short", "text": "neither MP4", "empty": "empty", "missing": "no such"}.items():
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


@pytest.mark.parametrize("name", ["A.MP4", "ein schöner film ü.mp4", "片 段.Mov"])
def test_names_may_have_upper_case_suffixes_spaces_and_unicode(tmp_path, name):
    write_video(tmp_path / name, moving(5), 16)
    assert probe(tmp_path / name).frames == 5
    assert read_frames(tmp_path / name, (0, 4)).shape == (2, 3, 48, 64)


def test_decord_is_trusted_with_plain_h264_only(tmp_path):
    for name, (codec, options) in CODECS.items():
        assert read_timeline(encode(tmp_path / name, codec, **options)).suits_decord is (name == "h264.mkv"), name
    assert not read_timeline(encode(tmp_path / "10bit.mp4", "libx264", "yuv420p10le")).suits_decord


def test_truncated_and_mislabelled_images_are_refused(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
    (tmp_path / "b.png").write_text("no image")
    for name in ("a.jpg", "a.png", "b.png"):
        with pytest.raises(MediaError, match="not a readable image"):
            probe(tmp_path / name)


def test_a_media_error_is_a_user_error_that_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError(Path("a b.mp4"), "the file is empty")))
    assert isinstance(error, UserError) and str(error) == "a b.mp4: the file is empty"
    assert (error.path, error.reason) == (Path("a b.mp4"), "the file is empty")


# ---------------------------------------------------------------- the content of a file chooses no program and no file


@posix_only
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_an_image_that_holds_postscript_is_refused_and_no_program_is_started(tmp_path, monkeypatch, name):
    ghostscript, trace = tmp_path / "bin" / "gs", tmp_path / "started"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {trace}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # forget the result of an earlier search
    path = tmp_path / name
    path.write_text(POSTSCRIPT)
    (error,) = inspect_all([path])
    assert not trace.exists() and error.reason.endswith("neither JPEG, PNG, WebP nor BMP")
    for read in (lambda: probe(path), lambda: read_frames(path, (0,), MediaInfo(10, 10, 1, None))):
        with pytest.raises(MediaError, match="neither JPEG, PNG, WebP nor BMP"):
            read()
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "MPO"])
def test_plain_images_and_the_photographs_of_phones_are_read_under_any_suffix(tmp_path, kind):
    more = {"save_all": True, "append_images": [Image.new("RGB", (32, 16), "blue")]} if kind == "MPO" else {}
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (32, 16), "red").save(tmp_path / name, kind, **more)
        assert probe(tmp_path / name) == MediaInfo(32, 16, 1, None)
        red, green, blue = read_frames(tmp_path / name, (0,))[0, :, 8, 8].tolist()
        assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "ICO", "PPM"])
def test_other_images_are_refused(tmp_path, kind):
    Image.new("RGB", (32, 16), "red").save(tmp_path / "a.png", kind)
    with pytest.raises(MediaError, match="neither JPEG, PNG, WebP nor BMP"):
        probe(tmp_path / "a.png")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_or_a_playlist_instead_of_a_video_is_refused(tmp_path, name):
    remux(video(tmp_path / "real.mp4"), tmp_path / "real.ts")
    path = tmp_path / name
    path.write_text(SCRIPTS[name])
    refused = pytest.raises(MediaError, match="neither MP4, MOV, MKV, WebM nor AVI")
    for read in (probe, read_timeline, frame_times, lambda path: read_frames(path, (0,), MediaInfo(64, 48, 9, 16.0))):
        with refused as caught:
            read(path)
        assert caught.value.path == path
    for options in (None, {"ignore_editlist": "1"}):
        with refused, open_video(path, options):
            pass


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_the_usual_containers_are_read_under_any_suffix(tmp_path, container):
    plain = encode(tmp_path / "plain.avi", "mpeg4")
    for name in ("a.mp4", "b.mov", "c.mkv", "d.avi", "e.webm"):
        assert probe(remux(plain, tmp_path / name, container)).frames == 30


@pytest.mark.parametrize("container", ["mpegts", "flv", "image"])
def test_other_containers_and_images_are_refused_as_videos(tmp_path, container):
    real = video(tmp_path / "real.mp4")
    if container == "image":
        image(tmp_path / "a.png").rename(tmp_path / "a.mp4")
    else:
        remux(real, tmp_path / "a.mp4", container)
    with pytest.raises(MediaError, match="neither MP4, MOV, MKV, WebM nor AVI"):
        probe(tmp_path / "a.mp4")


@posix_only
@pytest.mark.parametrize(
    "name", ["a%d.mp4", "a%03d.mkv", "a*.mp4", "concat:a1.mp4", "file:a1.mp4", "data:a1.mp4", "http:a1.mp4", "-a.mp4"]
)
def test_a_name_is_neither_a_pattern_nor_an_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1, 2):
        video(Path(f"a{number}.mp4"), frames=9, darkest=150)
    video(Path("dark.mp4"), frames=9, darkest=0).rename(name)
    for path in (Path(name), tmp_path / name):
        assert probe(path).frames == 9 and read_frames(path, (0, 1))[..., 0].max() < 60


@posix_only
@pytest.mark.parametrize("name", ["a%d.png", "a*.jpg", "data:a1.png", "-.png"])
def test_the_name_of_an_image_is_no_pattern_either(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for number in (0, 1):
        image(Path(f"a{number}.png"))
    image(Path("small.png"), size=(32, 16)).rename(name)
    assert probe(Path(name)) == MediaInfo(32, 16, 1, None) and read_frames(Path(name), (0,)).shape == (1, 3, 16, 32)


@posix_only
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path, suffix):
    pipe, device, folder, lost = (tmp_path / f"{name}{suffix}" for name in ("pipe", "device", "folder", "lost"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    lost.symlink_to(tmp_path / "nowhere")
    for path in (pipe, device, folder):
        for read in (probe, read_timeline, lambda path: read_frames(path, (0,), MediaInfo(64, 48, 9, 16.0))):
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


def test_the_installed_ffmpeg_honours_both_lists(tmp_path):
    real = str(video(tmp_path / "real.mp4"))
    lists = probing._FFMPEG_OPTIONS
    av.open(real, options=lists).close()
    part = f"subfile,,start,0,end,0,,:{real}"  # a protocol that is part of every build
    av.open(part).close()
    with pytest.raises(av.error.ArgumentError):
        av.open(part, options={"protocol_whitelist": lists["protocol_whitelist"]})
    stream = str(remux(Path(real), tmp_path / "real.ts"))
    av.open(stream).close()
    with pytest.raises(av.error.ArgumentError):
        av.open(stream, options={"format_whitelist": lists["format_whitelist"]})


def test_media_are_opened_for_reading_in_one_place():
    opening = re.compile(r"\b(Image\.open|av\.open|VideoReader|imread|open_(?:image|video))\(")
    shipped = [*ROOT.glob("*.py"), *(path for room in ("wan", "utils", "nano") for path in (ROOT / room).rglob("*.py"))]
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in shipped
        for name in opening.findall(path.read_text(encoding="utf-8"))
        if path.parent != ROOT / "utils" / "media" or name not in ("open_image", "open_video")
    }
    assert found == {
        ("utils/media/probing.py", "Image.open"),
        ("utils/media/probing.py", "av.open"),
        ("utils/media/frames.py", "av.open"),  # writes
        ("utils/media/decoding.py", "VideoReader"),  # after PyAV has accepted the file
    }

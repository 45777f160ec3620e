"""The content of a file chooses no program and no other file, and its stream and decoder are the right ones."""

import os
import re
from pathlib import Path

import av
import numpy as np
import pytest

from tests.clips import number_of, numbered, packets_of, together, write_clip
from tests.media import encode, image, remux, video
from utils.media import video as opening
from utils.media.decoding import read_pixels
from utils.media.description import MediaError, MediaInfo
from utils.media.frames import read_frames
from utils.media.probing import probe
from utils.media.video import CONTAINERS, FFMPEG_OPTIONS, open_video

ROOT = Path(__file__).resolve().parents[3]
REFUSED = "none of MP4, MOV, MKV, WebM, AVI, MPEG, TS, WMV, FLV, OGG, MXF and DV"
# Texts that FFmpeg or the FFmpeg of decord recognise, and that make it open another file or a socket.
SCRIPTS = {
    "concat.mp4": "ffconcat version 1.0\nfile real.mp4\n",
    "playlist.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nreal.ts\n#EXT-X-ENDLIST\n",
    "playlist.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nreal.ts\n#EXT-X-ENDLIST\n",
    "playlist.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nreal.ts\n#EXT-X-ENDLIST\n",
    "session.mp4": "v=0\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "manifest.mp4": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>real.mp4</BaseURL></MPD>\n',
    "list.wmv": "[Reference]\nRef1=real.wmv\n",
    "list.asf": '<asx version="3.0"><entry><ref href="real.wmv"/></entry></asx>\n',
}
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")


# ------------------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_or_a_playlist_instead_of_a_video_is_refused(tmp_path, name):
    remux(video(tmp_path / "real.mp4"), tmp_path / "real.ts")
    path = tmp_path / name
    path.write_text(SCRIPTS[name])
    described = MediaInfo(64, 48, 9, 16.0)
    for read in (probe, lambda path: probe(path, full=True), lambda path: read_frames(path, (0,), described)):
        with pytest.raises(MediaError, match=REFUSED) as caught:
            read(path)
        assert caught.value.path == path
    for options in (None, {"ignore_editlist": "1"}, {"format_whitelist": "concat,hls,sdp"}):
        with pytest.raises(MediaError, match=REFUSED), open_video(path, options=options):
            pass


def test_no_list_of_a_caller_widens_the_lists_of_what_is_opened(tmp_path):
    image(tmp_path / "a.png").rename(tmp_path / "a.mp4")
    wider = {"format_whitelist": "png_pipe,concat,hls", "protocol_whitelist": "file,http,tcp,concat"}
    with pytest.raises(MediaError, match=REFUSED), open_video(tmp_path / "a.mp4", options=wider):
        pass


def test_the_lists_are_these():
    assert FFMPEG_OPTIONS == {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    assert set(CONTAINERS.split(",")) == set("mov matroska avi mpegts mpeg mpegvideo asf flv ogg mxf dv".split())


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


def test_the_installed_ffmpeg_honours_both_lists(tmp_path):
    real = str(video(tmp_path / "real.mp4"))
    av.open(real, options=FFMPEG_OPTIONS).close()
    part = f"subfile,,start,0,end,0,,:{real}"  # a protocol that is part of every build
    av.open(part).close()
    with pytest.raises(av.error.ArgumentError):
        av.open(part, options={"protocol_whitelist": FFMPEG_OPTIONS["protocol_whitelist"]})
    picture = str(image(tmp_path / "a.png"))
    av.open(picture).close()
    with pytest.raises(av.error.ArgumentError):
        av.open(picture, options={"format_whitelist": FFMPEG_OPTIONS["format_whitelist"]})


def test_media_are_opened_for_reading_in_one_place():
    calls = re.compile(r"\b(Image\.open|av\.open|VideoReader|imread|open_(?:image|video))\(")
    shipped = [*ROOT.glob("*.py"), *(path for room in ("wan", "utils", "nano") for path in (ROOT / room).rglob("*.py"))]
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in shipped
        for name in calls.findall(path.read_text(encoding="utf-8"))
        if path.parent != ROOT / "utils" / "media" or name not in ("open_image", "open_video")
    }
    assert found == {
        ("utils/media/images.py", "Image.open"),
        ("utils/media/video.py", "av.open"),
        ("utils/media/frames.py", "av.open"),  # writes
        ("utils/media/decoding.py", "VideoReader"),  # after PyAV has accepted the file
    }


# -------------------------------------------------------------------------------------------------------- containers

WRITTEN = {
    "mp4": "libx264",
    "mov": "libx264",
    "3gp": "libx264",
    "matroska": "libx264",
    "webm": "libvpx",
    "avi": "mpeg4",
    "mpegts": "libx264",
    "mpeg": "mpeg2video",
    "vob": "mpeg2video",
    "mpeg2video": "mpeg2video",
    "asf": "wmv2",
    "flv": "flv",
    "ogg": "libvpx",
    "mxf": "mpeg2video",
}


@pytest.mark.parametrize("container", WRITTEN)
def test_the_usual_containers_are_read_under_any_suffix(tmp_path, container):
    made = write_clip(tmp_path / "made", WRITTEN[container], 8, container=container, rate=25, b=2_000_000)
    for name in ("a.mp4", "b.mov", "c.mkv", "d.avi", "e.webm", "f.ts"):
        path = made.rename(tmp_path / name)
        assert probe(path).frames == 8 and number_of(read_pixels(path, [5])[0]) == 5
        made = path


def test_digital_video_of_tapes_is_read(tmp_path):
    path = write_clip(tmp_path / "a.dv", "dvvideo", 2, "yuv420p", (720, 576), rate=25, container="dv")
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (768, 576, 2, 25.0)
    assert info.notes == ("pixels made square", "deinterlaced") and number_of(read_pixels(path, [1])[0]) == 1


@pytest.mark.parametrize(
    ("container", "codec", "form"),
    [
        ("nut", "libx264", "yuv420p"),
        ("h264", "libx264", "yuv420p"),
        ("ivf", "libvpx", "yuv420p"),
        ("yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
        ("gif", "gif", "rgb8"),
        ("apng", "apng", "rgb24"),
        ("image2pipe", "mjpeg", "yuvj420p"),
    ],
)
def test_other_containers_and_images_are_refused_as_videos(tmp_path, container, codec, form):
    write_clip(tmp_path / "a.mp4", codec, 6, form, container=container)
    with pytest.raises(MediaError, match=REFUSED):
        probe(tmp_path / "a.mp4")


# ----------------------------------------------------------------------------------------------- streams and decoders


def plain(path: Path, first: int = 0, **more: object) -> Path:
    return write_clip(path, "libx264", [numbered(first + number) for number in range(6)], **more)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_cover_is_not_taken_for_the_video(tmp_path, name, is_first):
    cover = write_clip(tmp_path / "cover.mov", "mjpeg", [np.full((200, 200, 3), 90, np.uint8)], "yuvj420p")
    sources = [plain(tmp_path / "plain.mp4"), cover]
    path = together(tmp_path / name, sources[::-1] if is_first else sources, covers=[cover])
    info = probe(path, full=True)
    assert (info.width, info.height, info.frames, info.notes) == (64, 48, 6, ())
    assert [number_of(picture) for picture in read_pixels(path, range(6), info)] == list(range(6))


def test_a_cover_alone_and_sound_alone_are_no_video(tmp_path):
    cover = write_clip(tmp_path / "cover.mov", "mjpeg", [np.full((200, 200, 3), 90, np.uint8)], "yuvj420p")
    together(tmp_path / "cover.mp4", [cover], covers=[cover])
    with av.open(str(tmp_path / "sound.mp4"), "w") as target:
        stream = target.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        target.mux([*stream.encode(frame), *stream.encode()])
    for name in ("cover.mp4", "sound.mp4"):
        with pytest.raises(MediaError, match="it contains no video"):
            probe(tmp_path / name)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_all_ways_of_reading_take_the_same_of_two_streams(tmp_path, name):
    larger = write_clip(tmp_path / "large.mp4", frames=[numbered(40 + number, 128, 96) for number in range(6)])
    smaller = plain(tmp_path / "small.mp4")
    for sources in ([smaller, larger], [larger, smaller]):
        path = together(tmp_path / name, sources)
        info = probe(path, full=True)
        numbers = [number_of(picture) for picture in read_pixels(path, range(6), info)]
        assert numbers == [number + (40 if info.width == 128 else 0) for number in range(6)]
        assert read_pixels(path, [3], info).shape == (1, info.height, info.width, 3)
        assert not info.timeline.suits_decord, "decord may choose another one"


def test_packets_of_other_streams_are_not_read(tmp_path):
    path = together(tmp_path / "a.mkv", [plain(tmp_path / "a.mp4"), plain(tmp_path / "b.mp4", 10)])
    with open_video(path) as opened:
        assert len(opened.container.streams.video) == 2
        assert [packet.stream.index for packet in opened.packets()] == [opened.stream.index] * 6


@pytest.mark.parametrize(("codec", "decoder"), [("libvpx", "libvpx"), ("libvpx-vp9", "libvpx-vp9")])
def test_transparent_webm_gets_a_decoder_that_knows_transparency(tmp_path, codec, decoder):
    rgba = [np.dstack([numbered(number), np.full((48, 64), 128, np.uint8)]) for number in range(3)]
    write_clip(tmp_path / "clear.webm", codec, rgba, "yuva420p", **{"auto-alt-ref": 0})
    write_clip(tmp_path / "plain.webm", codec, 3)
    with open_video(tmp_path / "clear.webm") as opened:
        assert opened.decoder.name == decoder
    with open_video(tmp_path / "plain.webm") as opened:
        assert opened.decoder.name == codec.replace("libvpx-", "").replace("libvpx", "vp8")


def test_colours_of_the_container_are_kept_though_a_decoder_forgets_them(tmp_path):
    def edit(context):
        context.color_primaries, context.color_trc, context.colorspace = 9, 18, 9

    path = write_clip(tmp_path / "a.mov", "prores_ks", 2, "yuv422p10le", edit=edit)
    with open_video(path) as opened:
        frame = opened.decode(next(opened.packets()))[0]
        assert (frame.color_primaries, frame.color_trc) == (2, 2)
        assert (opened.primaries, opened.transfer) == (9, 18)


def test_what_ffmpeg_raises_inside_is_a_media_error_of_the_file(tmp_path):
    path = plain(tmp_path / "a.mp4")
    with (
        pytest.raises(MediaError, match=r"damaged \(Invalid data") as caught,
        open_video(path) as opened,
    ):
        opened.decoder.decode(packets_of(encode(tmp_path / "b.avi", "mpeg4"))[1])
    assert caught.value.path == path


def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(MediaError) as caught:
        probe(plain(tmp_path / "a.mp4"))
    assert caught.value.reason == "its pictures have 64x48 pixels, more than FFmpeg decodes: scale it down"

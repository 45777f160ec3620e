"""Every codec and container that PyAV writes: frames have their numbers, damage is found, healthy files are silent."""

from pathlib import Path

import numpy as np
import pytest

from tests.clips import COLOURS, check_every_way_of_reading, colours_of, damaged, numbered, numbers_of, write_clip
from utils.media.decoding import read_pixels
from utils.media.description import MediaError, MediaInfo
from utils.media.inspection import Inspector
from utils.media.probing import probe

FAST = {"deadline": "realtime", "cpu-used": 8}
HEVC = {"x265-params": "log-level=none:keyint=6:min-keyint=6"}
RATE = {"b": 2_000_000}
MPEG = {"bf": 2, "rate": 25, **RATE}

# Name -> codec, pixel format and options of the writer.
PLAIN = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": 3}),
    "h264.mkv": ("libx264", "yuv420p", {"bf": 3}),
    "h264.ts": ("libx264", "yuv420p", {"bf": 2}),
    "h264.flv": ("libx264", "yuv420p", {"bf": 2}),
    "h264.avi": ("libx264", "yuv420p", {"bf": 0}),
    "h264_reordered.avi": ("libx264", "yuv420p", {"bf": 3}),
    "open_groups.mp4": ("libx264", "yuv420p", {"bf": 3, "x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0"}),
    "intra_refresh.mp4": ("libx264", "yuv420p", {"x264-params": "intra-refresh=1:keyint=6"}),
    "fragmented.mp4": ("libx264", "yuv420p", {"bf": 2, "muxer": {"movflags": "frag_keyframe+empty_moov"}}),
    "without_cues.mkv": ("libx264", "yuv420p", {"muxer": {"live": "1"}}),
    "hevc.mp4": ("libx265", "yuv420p", HEVC),
    "hevc.ts": ("libx265", "yuv420p", HEVC),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"bf": 2, **RATE}),
    "packed.avi": ("mpeg4", "yuv420p", {"bf": 2, **RATE}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "hidden.webm": ("libvpx", "yuv420p", {"auto-alt-ref": 1, "lag-in-frames": 16, "b": 300_000, "cpu-used": 5}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", FAST),
    "live.webm": ("libvpx-vp9", "yuv420p", {**FAST, "muxer": {"live": "1"}}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": 12, "svtav1-params": "lp=1"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", MPEG),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"container": "vob", **MPEG}),
    "mpeg2.m2v": ("mpeg2video", "yuv420p", {"container": "mpeg2video", **MPEG}),
    "wmv2.wmv": ("wmv2", "yuv420p", RATE),
    "flv1.flv": ("flv", "yuv420p", RATE),
    "vp8.ogv": ("libvpx", "yuv420p", FAST),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "ffv1.mkv": ("ffv1", "yuv420p", {}),
    "raw.avi": ("rawvideo", "bgr24", {}),
    "png.mov": ("png", "rgb24", {}),
    "changes_only.mov": ("rpza", "rgb555le", {}),
}
MORE = {
    "h264.mov": ("libx264", "yuv420p", {}),
    "h264.m2ts": ("libx264", "yuv420p", {"bf": 2}),
    "every_frame.mp4": ("libx264", "yuv420p", {"muxer": {"movflags": "frag_every_frame+empty_moov+default_base_moof"}}),
    "hevc.mkv": ("libx265", "yuv420p", HEVC),
    "vp9.mp4": ("libvpx-vp9", "yuv420p", FAST),
    "av1.webm": ("libsvtav1", "yuv420p", {"preset": 12, "svtav1-params": "lp=1"}),
    "mpeg1.mpg": ("mpeg1video", "yuv420p", {"container": "mpeg", **MPEG}),
    "mpeg2.mxf": ("mpeg2video", "yuv420p", MPEG),
    "mpeg2.mkv": ("mpeg2video", "yuv420p", MPEG),
    "wmv1.wmv": ("wmv1", "yuv420p", RATE),
    "screen.flv": ("flashsv", "bgr24", {}),
    "mjpeg.mov": ("mjpeg", "yuvj422p", {}),
    "ffv1.avi": ("ffv1", "yuv420p", {}),
    "huffyuv.avi": ("huffyuv", "yuv422p", {}),
    "utvideo.avi": ("utvideo", "yuv420p", {}),
    "magicyuv.avi": ("magicyuv", "gbrp", {}),
    "raw.mov": ("rawvideo", "uyvy422", {}),
    "raw.mkv": ("rawvideo", "yuv420p", {}),
    "animation.mov": ("qtrle", "rgb24", {}),
    "cinepak.avi": ("cinepak", "rgb24", {}),
    "zmbv.avi": ("zmbv", "bgr0", {}),
    "cineform.mov": ("cfhd", "yuv422p10le", {"size": (128, 96)}),
    "jpeg2000.mov": ("jpeg2000", "rgb24", {}),
    "v210.mov": ("v210", "yuv422p10le", {}),
    "snow.avi": ("snow", "yuv420p", RATE),
}
FORMATS = {
    "ffv1": "yuv422p yuv444p yuv440p yuv420p10le yuv422p10le yuv444p12le rgb48le bgr0 gbrp16le yuva444p bgra",
    "libx264": "yuv422p yuv444p yuvj420p yuvj444p nv12 yuv420p10le yuv422p10le yuv444p10le",
    "libvpx-vp9": "yuv422p yuv440p yuv444p gbrp",
    "prores_ks": "yuv422p10le yuv444p10le yuva444p10le",
    "rawvideo": "yuv420p uyvy422",
}
SUFFIXES = {"ffv1": "mkv", "libx264": "mp4", "libvpx-vp9": "webm", "prores_ks": "mov", "rawvideo": "mkv"}


def inspected(path: Path) -> MediaInfo:
    """What a child finds in a healthy file; it must have nothing to say."""
    info = Inspector().inspect([path])[path]
    assert isinstance(info, MediaInfo), info
    return info


def check_numbers(path: Path, info: MediaInfo, count: int) -> None:
    whole = read_pixels(path, range(info.frames), info)
    assert numbers_of(whole) == list(range(count)) and info.notes == ()
    assert len(np.unique(whole.reshape(count, -1), axis=0)) == count, "no two frames are alike"
    check_every_way_of_reading(path, info, whole)
    quick = probe(path)
    assert (quick.frames, quick.look, quick.notes, quick.fps) == (info.frames, info.look, (), info.fps)
    assert np.array_equal(read_pixels(path, [count // 2], quick)[0], whole[count // 2])


@pytest.mark.parametrize("name", [*PLAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_frames_have_their_numbers_however_they_are_read(tmp_path, name):
    codec, form, options = (PLAIN | MORE)[name]
    path = write_clip(tmp_path / name, codec, 24, form, **options)
    check_numbers(path, probe(path, full=True), 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "form"), [(codec, form) for codec, forms in FORMATS.items() for form in forms.split()]
)
def test_colours_of_every_pixel_format_are_right(tmp_path, codec, form):
    path = write_clip(tmp_path / f"a.{SUFFIXES[codec]}", codec, 8, form)
    info = inspected(path)
    check_numbers(path, info, 8)
    assert np.abs(colours_of(read_pixels(path, [3], info)[0]) - COLOURS).max() < 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mp4", "libx264", "yuv444p"),
        ("a.ts", "mpeg2video", "yuv420p"),
    ],
)
def test_odd_and_tiny_sizes_are_read(tmp_path, name, codec, form):
    path = write_clip(tmp_path / name, codec, 6, form, (65, 49), rate=25)
    info = inspected(path)
    assert (info.width, info.height) == (65, 49)
    check_numbers(path, info, 6)
    tiny = write_clip(tmp_path / f"tiny_{name}", codec, [np.full((1, 1, 3), 200, np.uint8)] * 3, form, rate=25)
    if codec != "mpeg2video":  # FFmpeg's writer makes no valid picture of it
        assert read_pixels(tiny, range(3), inspected(tiny)).shape == (3, 1, 1, 3)


# -------------------------------------------------------------------------------------------------------------- damage

# FFmpeg cannot tell that pictures without any structure are wrong, and says nothing of lost packets of two containers.
UNNOTICED = frozenset({"raw.mov", "v210.mov", "wmv1.wmv", "wmv2.wmv", "h264.flv"})


def noisy(count: int = 24) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    pictures = (numbered(number, 128, 96) + rng.integers(-15, 15, (96, 128, 3)) for number in range(count))
    return [picture.clip(0, 255).astype(np.uint8) for picture in pictures]


def check_damage(folder: Path, clips: dict[str, tuple]) -> None:
    healthy, holes = [], []
    for name, (codec, form, options) in clips.items():
        options = {key: value for key, value in options.items() if key != "size"}
        healthy.append(write_clip(folder / name, codec, noisy(), form, **options))
        if name not in UNNOTICED:
            holes += [damaged(healthy[-1], folder / f"{seed}_{name}", seed) for seed in (None, 1, 2)]
    found = Inspector().inspect(healthy + holes)
    for path in healthy:
        assert isinstance(found[path], MediaInfo), f"{path.name}: {found[path]}"
        assert found[path].frames == 24 and found[path].notes == (), path.name
    for path in holes:
        assert isinstance(found[path], MediaError), f"{path.name} is damaged: {found[path]}"
        reason = found[path].reason
        assert reason.startswith(("damaged", "cut short: only ", "not a readable video: damaged")), reason


def test_a_hole_in_a_file_of_any_codec_is_found_and_healthy_files_are_not_accused(tmp_path):
    check_damage(tmp_path, PLAIN)


@pytest.mark.slow
def test_a_hole_in_a_file_of_a_rare_codec_is_found(tmp_path):
    check_damage(tmp_path, MORE)

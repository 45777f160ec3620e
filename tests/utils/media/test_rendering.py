"""What players show: turned, stretched, on white, without combs, in one size, by value."""

import math
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from av.codec.context import Flags

from tests.clips import COLOURS, as_frame, colours_of, joined, number_of, numbered, numbers_of, turned, write_clip
from tests.light import encoded
from utils.media.decoding import read_pixels
from utils.media.description import FLAGGED, Look, MediaInfo
from utils.media.probing import probe
from utils.media.rendering import ORIENTATIONS, upright


def shown(path) -> tuple[MediaInfo, np.ndarray]:
    info = probe(path, full=True)
    return info, read_pixels(path, range(info.frames), info)


# --------------------------------------------------------------------------------------------------------- orientation

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_pixels_are_turned_and_mirrored_as_exif_names_it(orientation):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    assert np.array_equal(upright(pixels, orientation), TURNS[orientation](pixels))


@pytest.mark.parametrize("orientation", TURNS)
def test_a_display_matrix_turns_size_and_pixels(tmp_path, orientation):
    _, stored = shown(write_clip(tmp_path / "a.mp4", frames=3))
    info, pixels = shown(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", *ORIENTATIONS[orientation]))
    assert info.look == Look(orientation) and info.notes == ()
    assert (info.width, info.height) == ((48, 64) if orientation > 4 else (64, 48))
    assert np.array_equal(pixels, np.stack([TURNS[orientation](picture) for picture in stored]))


@pytest.mark.parametrize(
    ("degrees", "orientation", "tilt"),
    [(0.4, 1, None), (3, 1, 3), (10, 1, 10), (44, 1, 44), (46, 6, 44), (80, 6, 10), (183, 3, 3), (-87, 8, 3)],
)
def test_a_tilt_is_not_applied_and_named(tmp_path, degrees, orientation, tilt):
    write_clip(tmp_path / "a.mp4", frames=2)
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    info = probe(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", cosine, sine, -sine, cosine))
    assert info.look.orientation == orientation
    assert info.notes == ((f"its tilt of {tilt} degrees is not applied",) if tilt else ())


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (2, 0, 0, 2), (-0.5, 0, 0, -0.5)])
def test_a_matrix_that_only_scales_or_says_nothing_turns_nothing_more(tmp_path, matrix):
    write_clip(tmp_path / "a.mp4", frames=2)
    info = probe(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", *matrix))
    assert (info.width, info.height, info.notes) == (64, 48, ())
    assert info.look.orientation == (3 if matrix[0] < 0 else 1)


# ---------------------------------------------------------------------------------------------------------------- size


def stretched(path, ratio, **more):
    def edit(codec):
        codec.sample_aspect_ratio = ratio

    return write_clip(path, frames=3, edit=edit, **more)


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("4/3", (85, 48)), ("8/9", (64, 54)), ("1001/1000", None), ("1/100", None), ("20/1", None), ("2/1", (128, 48))],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_become_square_by_enlarging(tmp_path, name, ratio, size):
    info, pixels = shown(stretched(tmp_path / name, Fraction(ratio)))
    assert (info.width, info.height) == (size or (64, 48)) and info.look.scaled == size
    assert info.notes == (("pixels made square",) if size else ()) and numbers_of(pixels) == [0, 1, 2]
    assert pixels.shape[1:3] == (info.height, info.width)
    assert np.abs(colours_of(pixels[1]) - COLOURS).max() < 12


def test_turning_comes_after_stretching(tmp_path):
    _, wide = shown(stretched(tmp_path / "a.mp4", Fraction(4, 3)))
    info, pixels = shown(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", *ORIENTATIONS[6]))
    assert (info.width, info.height) == (48, 85) and np.array_equal(pixels, np.rot90(wide, -1, (1, 2)))


@pytest.mark.parametrize(
    ("suffix", "codec", "step"),
    [("webm", "libvpx", 500), ("webm", "libvpx-vp9", 500), ("ts", "libx264", 45000)],
)
def test_frames_of_other_sizes_are_scaled_to_the_first(tmp_path, suffix, codec, step):
    small = write_clip(tmp_path / f"a.{suffix}", codec, 8)
    large = write_clip(tmp_path / f"b.{suffix}", codec, [numbered(8 + number, 96, 72) for number in range(8)])
    info, pixels = shown(joined([small, large], tmp_path / f"both.{suffix}", step))
    assert (info.width, info.height, info.frames) == (64, 48, 16) and numbers_of(pixels) == list(range(16))
    assert info.notes == ("frames of several sizes, scaled to that of the first",) and info.look.scaled == (64, 48)
    for index in (7, 8, 15):
        assert np.array_equal(read_pixels(tmp_path / f"both.{suffix}", [index], info)[0], pixels[index])
        assert np.abs(colours_of(pixels[index]) - COLOURS).max() < 12


# -------------------------------------------------------------------------------------------------------------- colours

HDR = {
    "hdr10.mp4": ("libx265", "yuv420p10le", "pq", 1, {"x265-params": "log-level=none:lossless=1"}),
    "phone.mov": ("libx265", "yuv420p10le", "hlg", 1, {"x265-params": "log-level=none:lossless=1"}),
    "full_range.mkv": ("ffv1", "yuv444p12le", "hlg", 2, {}),
    "bits8.mp4": ("libx264", "yuv420p", "pq", 1, {"crf": 1}),
    "rgb.mkv": ("ffv1", "gbrp12le", "pq", 2, {}),
    "wide_sdr.mkv": ("ffv1", "yuv420p10le", "", 1, {}),
    "unstated_matrix.mkv": ("ffv1", "yuv444p12le", "pq", 1, {}),
    "container_only.mov": ("prores_ks", "yuv422p10le", "hlg", 1, {}),
    "opaque.mkv": ("ffv1", "yuva444p10le", "pq", 1, {}),
}


@pytest.mark.parametrize("name", HDR)
def test_colours_of_hdr_and_wide_clips_come_back_by_value(tmp_path, name):
    codec, form, curve, span, more = HDR[name]
    look = Look(transfer=curve, primaries="bt2020")
    matrix = 0 if form.startswith("g") else 9

    def edit(context):
        context.color_primaries, context.color_trc = 9, {"pq": 16, "hlg": 18, "": 14}[curve]
        context.colorspace, context.color_range = 2 if name.startswith("unstated") else matrix, span

    pictures = [encoded((numbered(number, 128, 96) / 255) ** 2.4, look) for number in range(3)]
    path = write_clip(tmp_path / name, codec, pictures, form, matrix=matrix, span=span, edit=edit, **more)
    info, pixels = shown(path)
    assert info.look == replace(look, transparent=form.startswith("yuva")) and not info.timeline.suits_decord
    assert info.notes == ("HDR, tone-mapped" if curve else "wide colours converted",)
    assert numbers_of(pixels) == [0, 1, 2]
    assert np.abs(colours_of(pixels[1]) - COLOURS).max() < (13 if form == "yuv420p" else 9)


def test_what_hdr_needs_comes_before_stretching_and_turning(tmp_path):
    def edit(context):
        context.color_primaries, context.color_trc, context.colorspace = 9, 16, 9
        context.sample_aspect_ratio = Fraction(4, 3)

    look = Look(transfer="pq", primaries="bt2020")
    pictures = [encoded((numbered(number, 128, 96) / 255) ** 2.4, look) for number in range(3)]
    more = {"x265-params": "log-level=none:lossless=1"}
    write_clip(tmp_path / "a.mp4", "libx265", pictures, "yuv420p10le", matrix=9, edit=edit, **more)
    info, pixels = shown(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", *ORIENTATIONS[6]))
    assert (info.width, info.height) == (96, 171) and info.look == Look(6, (171, 96), "pq", "bt2020")
    assert np.abs(colours_of(np.rot90(pixels[1], 1)) - COLOURS).max() < 9


# -------------------------------------------------------------------------------------------------------- transparency


def cut_out(number: int) -> np.ndarray:
    """An opaque red box on green that is not seen, above blue that is half seen: uint8 (48, 64, 4)."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[..., :3] = (0, 255, 0)
    pixels[12:36, 8 + number : 40 + number] = (250, 60, 60, 255)
    pixels[36:] = (10, 20, 240, 128)
    return pixels


TRANSPARENT = {
    "prores.mov": ("prores_ks", "yuva444p10le", {"profile": 4}),
    "animation.mov": ("qtrle", "argb", {}),
    "png.mov": ("png", "rgba", {}),
    "ffv1.mkv": ("ffv1", "bgra", {}),
    "deep.mkv": ("ffv1", "gbrap12le", {}),
    "utvideo.avi": ("utvideo", "gbrap", {}),
    "raw.avi": ("rawvideo", "bgra", {}),
    "vp9.webm": ("libvpx-vp9", "yuva420p", {"b": 2_000_000, "deadline": "realtime"}),
    "vp8.webm": ("libvpx", "yuva420p", {"b": 2_000_000, "auto-alt-ref": 0}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_areas_are_white_and_half_of_a_colour_is_half_white(tmp_path, name):
    codec, form, more = TRANSPARENT[name]
    path = write_clip(tmp_path / name, codec, [cut_out(number) for number in range(8)], form, **more)
    info, pixels = shown(path)
    assert info.look == Look(transparent=True) and info.notes == ("transparent areas on white",)
    for rows, columns, colour in (
        (slice(2, 8), slice(50, 62), (255, 255, 255)),
        (slice(16, 32), slice(16, 36), (250, 60, 60)),
        (slice(40, 46), slice(8, 56), (132, 137, 247)),
    ):
        assert np.abs(pixels[3, rows, columns].astype(int) - colour).max() <= 4
    stored = read_pixels(path, [3], info, alpha=True)[0].astype(int)
    assert stored.shape == (48, 64, 4)
    for place, values in (((20, 20), (250, 60, 60, 255)), ((42, 20), (10, 20, 240, 128)), ((4, 56), (0, 255, 0, 0))):
        assert np.abs(stored[place] - values).max() <= 4, "colours are not multiplied by opacity"


def test_a_clip_that_could_be_transparent_but_is_not_gets_no_note(tmp_path):
    opaque = [np.dstack([numbered(number), np.full((48, 64), 255, np.uint8)]) for number in range(4)]
    info, pixels = shown(write_clip(tmp_path / "a.mov", "qtrle", opaque, "argb"))
    assert info.notes == () and np.array_equal(pixels, np.stack(opaque)[..., :3])


# ---------------------------------------------------------------------------------------------------------- interlacing


def fields(frames: int = 12) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames of two fields each, the upper one first, and the pictures of the upper fields."""
    stripes = np.where(np.arange(64) // 8 % 2, 220, 30).astype(np.uint8)
    moments = [
        np.broadcast_to(np.roll(stripes, 3 * moment)[None, :, None], (48, 64, 3)) for moment in range(2 * frames)
    ]
    woven = [first.copy() for first in moments[::2]]
    for frame, second in zip(woven, moments[1::2], strict=True):
        frame[1::2] = second[1::2]
    return woven, moments[::2]


def combing(pictures: np.ndarray) -> float:
    """How much lines differ from those above and below them."""
    values = np.asarray(pictures).astype(float)
    return float(np.abs(values[:, 1:-1] - (values[:, :-2] + values[:, 2:]) / 2).mean())


def mark_as_fields(codec) -> None:
    codec.flags |= Flags.interlaced_dct | Flags.interlaced_me


INTERLACED = {
    "mpeg2.mkv": ("mpeg2video", "yuv420p", {"edit": mark_as_fields, "b": 4_000_000, "rate": 25}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"edit": mark_as_fields, "b": 4_000_000, "rate": 25, "bf": 2}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {"edit": mark_as_fields, "b": 3_000_000}),
    "h264.mp4": ("libx264", "yuv420p", {"x264-params": "tff=1", "crf": 8}),
    "raw.mkv": ("rawvideo", "yuv420p", {"field_order": "tt"}),
    "raw.mov": ("rawvideo", "uyvy422", {"field_order": "tt"}),
    "v210.mov": ("v210", "yuv422p10le", {"field_order": "tt"}),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_combed_frames_are_completed_and_keep_their_number_and_times(tmp_path, name):
    codec, form, more = INTERLACED[name]
    woven, _ = fields()
    path = write_clip(tmp_path / name, codec, woven, form, **more)
    info, pixels = shown(path)
    assert info.notes == ("deinterlaced",) and info.look.interlaced and not info.timeline.suits_decord
    with av.open(str(path)) as container:
        times = sorted(frame.pts for frame in container.decode(video=0))
    assert info.frames == 12 == len(pixels) and list(info.timeline.times) == times
    assert combing(woven) > 60 and combing(pixels[1:]) < 2
    for wanted in ([0], [5], [6], [7], [11], [2, 9], range(5, 8)):
        assert np.array_equal(read_pixels(path, wanted, info), pixels[list(wanted)]), wanted


def test_a_codec_that_marks_its_frames_itself_is_asked(tmp_path):
    woven, upper = fields()
    graph = av.filter.Graph()
    base = Fraction(1, 16)
    source = graph.add_buffer(width=64, height=48, format=av.VideoFormat("yuv420p"), time_base=base)
    graph.link_nodes(source, graph.add("setfield", "tff"), graph.add("buffersink")).configure()
    with av.open(str(tmp_path / "a.mkv"), "w") as target:
        stream = target.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, picture in enumerate(woven):
            frame = as_frame(picture, "yuv420p")
            frame.pts, frame.time_base = number, base
            graph.push(frame)
            target.mux(stream.encode(graph.pull()))
        target.mux(stream.encode())
    info, pixels = shown(tmp_path / "a.mkv")
    assert info.look.interlaced == FLAGGED and np.abs(pixels.astype(int) - np.stack(upper)).mean() < 2


def test_frames_that_are_not_combed_are_left_alone(tmp_path):
    path = write_clip(tmp_path / "a.mkv", "mpeg2video", 12, rate=25, b=4_000_000)
    info, pixels = shown(path)
    with av.open(str(path)) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert info.notes == () and info.look == Look() and np.array_equal(pixels, plain)


def test_combed_frames_are_completed_before_they_are_stretched_and_turned(tmp_path):
    """HDR is in test_colour.py; here a picture is stretched, deinterlaced and turned."""

    def edit(codec):
        mark_as_fields(codec)
        codec.sample_aspect_ratio = Fraction(16, 11)

    write_clip(tmp_path / "a.mp4", "mpeg4", 6, b=3_000_000, edit=edit)
    info, pixels = shown(turned(tmp_path / "a.mp4", tmp_path / "b.mp4", *ORIENTATIONS[6]))
    assert set(info.notes) == {"pixels made square", "deinterlaced"} and (info.width, info.height) == (48, 93)
    assert [number_of(np.rot90(picture, 1)) for picture in pixels] == list(range(6))

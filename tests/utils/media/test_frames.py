"""Every file is made here, small and odd on purpose; a few tests read the real clips where they are at hand."""

import pickle
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from utils.common.errors import UserError
from utils.media import decoding, probing
from utils.media.frames import contact_sheet, crop_and_resize, read_frames, save_image, write_video
from utils.media.probing import MediaError, probe

REAL = Path(__file__).resolve().parents[3] / "shared" / "real_clips"
REAL_CLIPS = sorted(REAL.rglob("*.mp4"))
needs_real_clips = pytest.mark.skipif(not REAL_CLIPS, reason="the real clips are not beside this checkout")


def moving(frames: int = 13, height: int = 48, width: int = 64) -> torch.Tensor:
    """A picture whose brightness tells the frame and whose gradient tells left from right and top from bottom."""
    x = torch.linspace(0, 100, width).expand(frames, height, width)
    y = torch.linspace(0, 60, height)[None, :, None].expand(frames, height, width)
    t = torch.linspace(0, 150, frames)[:, None, None].expand(frames, height, width)
    return torch.stack([x + t, y + t, t + 20], dim=1).byte()


def encode(path: Path, codec: str, pixels: str = "yuv420p", **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, pixels
        stream.codec_context.gop_size = 6
        noise = torch.randint(0, 40, (1, 3, 96, 128), generator=torch.Generator().manual_seed(0)).byte()
        for frame in (moving(30, 96, 128) + noise).permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def turn_header(path: Path) -> None:
    """Write a display matrix of 90 degrees clockwise into the mp4's track header."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    for index, value in enumerate([0, 1 << 16, 0, 0xFFFF0000, 0, 0, 48 << 16, 0, 1 << 30]):
        data[start + 4 * index : start + 4 * index + 4] = value.to_bytes(4, "big")
    path.write_bytes(data)


def faststart(source: Path, target: Path) -> None:
    with av.open(str(source)) as inside, av.open(str(target), "w", options={"movflags": "faststart"}) as outside:
        stream = inside.streams.video[0]
        copied = outside.add_stream_from_template(stream)
        for packet in inside.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                outside.mux(packet)


def test_a_written_video_reads_back_with_its_size_frames_and_colours(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 16)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps, info.rotation) == (64, 48, 13, 16.0, 0)
    back = read_frames(tmp_path / "a.mp4", range(13))
    assert back.shape == (13, 3, 48, 64) and back.dtype == torch.uint8
    assert (back.int() - moving().int()).abs().float().mean() < 2.5


def test_a_written_video_says_how_its_colours_are_meant(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 24000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, int(codec.colorspace)) == ("h264", "yuv420p", 1)
        assert container.streams.video[0].average_rate.numerator == 24000


def test_odd_sides_are_written_with_the_last_row_and_column_repeated(tmp_path):
    write_video(tmp_path / "a.mp4", moving(5, 47, 63), 16)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (64, 48)


def test_a_failed_write_leaves_no_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        write_video(path, torch.zeros(3, 4, 48, 64, dtype=torch.uint8), 16)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["A.MP4", "ein schöner film ü.mp4", "片 段.Mov"])
def test_names_may_have_upper_case_suffixes_spaces_and_unicode(tmp_path, name):
    write_video(tmp_path / name, moving(5), 16)
    assert probe(tmp_path / name).frames == 5
    assert read_frames(tmp_path / name, (0, 4)).shape == (2, 3, 48, 64)


def test_bad_videos_are_refused_in_one_line_that_names_the_path_once(tmp_path):
    write_video(tmp_path / "good.mp4", moving(), 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:-300])
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name, word in {"cut": "cut short", "text": "another kind", "empty": "empty", "missing": "no such"}.items():
        with pytest.raises(MediaError, match=word) as caught:
            probe(tmp_path / f"{name}.mp4")
        assert caught.value.path == tmp_path / f"{name}.mp4"
        assert str(caught.value).count(name) == 1 + (name in word) and "\n" not in str(caught.value)


def test_a_header_that_promises_more_frames_than_the_file_holds_is_refused(tmp_path):
    encode(tmp_path / "a.mp4", "libx264")
    faststart(tmp_path / "a.mp4", tmp_path / "front.mp4")
    assert probe(tmp_path / "front.mp4").frames == 30
    data = (tmp_path / "front.mp4").read_bytes()
    for kept in (len(data) * 6 // 10, len(data) - 5):
        (tmp_path / "cut.mp4").write_bytes(data[:kept])
        with pytest.raises(MediaError, match=r"cut short: only [12]\d of its 30 frames"):
            probe(tmp_path / "cut.mp4")


def test_damage_behind_the_first_frames_is_a_media_error_and_never_hangs(tmp_path):
    encode(tmp_path / "a.mp4", "libx264")
    faststart(tmp_path / "a.mp4", tmp_path / "bad.mp4")
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


CODECS = {
    "h264.mkv": ("libx264", {"bf": "3"}),
    "open_groups.mp4": ("libx264", {"bf": "3", "x264-params": "open-gop=1:keyint=6"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "vp8.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime"}),
}


@pytest.mark.parametrize("without_decord", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_any_frames_of_any_codec_equal_those_of_a_full_decode(tmp_path, monkeypatch, name, without_decord):
    if without_decord:
        monkeypatch.setattr(decoding, "_decord", lambda: None)
    codec, options = CODECS[name]
    path = encode(tmp_path / name, codec, **options)
    whole, info = decode_all(path), probe(path)
    assert info.frames == len(whole) == 30
    rng = random.Random(name)
    for wanted in [[29], [0], list(range(30))] + [sorted(rng.sample(range(30), 4)) for _ in range(5)]:
        pixels = read_frames(path, wanted, info).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(pixels, whole[wanted]), wanted


def test_decord_is_trusted_with_plain_h264_only(tmp_path):
    for name, (codec, options) in CODECS.items():
        assert probing.read_timeline(encode(tmp_path / name, codec, **options)).suits_decord is (name == "h264.mkv"), (
            name
        )
    assert not probing.read_timeline(encode(tmp_path / "10bit.mp4", "libx264", "yuv420p10le")).suits_decord


@pytest.mark.parametrize("name", ["h264.mkv", "hevc.mp4", "vp9.webm"])
def test_a_late_frame_is_found_from_the_keyframe_before_it(tmp_path, name):
    codec, options = CODECS[name]
    path = encode(tmp_path / name, codec, **options)
    timeline = probing.read_timeline(path)
    wanted = timeline.times[15]
    entry = max(time for time in timeline.keyframes if time <= wanted)
    assert entry > timeline.times[6]
    (found,) = decoding._decode(path, [wanted], entry)
    assert np.array_equal(found, decode_all(path)[15])


@needs_real_clips
@pytest.mark.parametrize("path", REAL_CLIPS, ids=lambda path: path.stem)
def test_decord_and_pyav_give_equal_pixels_on_real_clips(path):
    pytest.importorskip("decord")
    info = probe(path)
    for wanted in (list(range(0, 9)), list(range(info.frames - 9, info.frames, 2))):
        fast = decoding._read_with_decord(path, wanted, info)
        assert fast is not None and np.array_equal(fast, decoding._read_with_pyav(path, wanted))


def test_frames_beyond_the_end_and_unordered_indices_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", moving(5), 16)
    with pytest.raises(MediaError, match="frame 5 was asked for"):
        read_frames(tmp_path / "a.mp4", (4, 5))
    for indices in ((), (1, 0), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="ascending"):
            read_frames(tmp_path / "a.mp4", indices)


def test_a_file_that_shrank_since_it_was_probed_is_noticed(tmp_path):
    write_video(tmp_path / "a.mp4", moving(13), 16)
    info = probe(tmp_path / "a.mp4")
    write_video(tmp_path / "a.mp4", moving(5), 16)
    with pytest.raises(MediaError, match="only frames 0 to 4"):
        read_frames(tmp_path / "a.mp4", (12,), info)


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


def test_truncated_and_mislabelled_images_are_refused(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-900])
    (tmp_path / "b.png").write_text("no image")
    for name in ("a.jpg", "a.png", "b.png"):
        with pytest.raises(MediaError, match="not a readable image"):
            probe(tmp_path / name)


def test_a_crop_goes_where_position_says_and_keeps_the_aspect_ratio():
    ramp = torch.arange(200).byte().expand(1, 3, 100, 200)
    for x, first in ((0.0, 0), (0.5, 50), (1.0, 100)):
        assert torch.equal(crop_and_resize(ramp, 100, 100, (x, 0.5)), ramp[..., first : first + 100])
    tall = ramp.transpose(2, 3)
    assert torch.equal(crop_and_resize(tall, 100, 100, (0.5, 1.0)), tall[..., 100:, :])


def test_resizing_keeps_circles_round_in_any_target():
    y, x = torch.meshgrid(torch.arange(360) - 180, torch.arange(640) - 320, indexing="ij")
    disc = ((x**2 + y**2 < 80**2) * 255).byte().expand(1, 3, 360, 640)
    for width, height in ((832, 480), (480, 832), (624, 624), (176, 144)):
        lit = crop_and_resize(disc, width, height)[0, 0] > 127
        assert lit.shape == (height, width)
        assert abs(int(lit.any(0).sum()) - int(lit.any(1).sum())) <= 2


def test_downscaling_averages_instead_of_aliasing():
    noise = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).byte()
    small = crop_and_resize(noise, 64, 64).float()
    assert small.std() < 0.35 * noise.float().std() and 125 < small.mean() < 130


def test_another_resolution_of_a_picture_is_cut_at_the_same_fractions():
    big = torch.linspace(0, 255, 640).byte().expand(1, 3, 360, 640)
    half = big[..., ::2, ::2]
    of_big = crop_and_resize(big, 96, 96, (0.8, 0.1)).float()
    of_half = crop_and_resize(half, 96, 96, (0.8, 0.1), like=(640, 360)).float()
    assert (of_big - of_half).abs().max() <= 2
    stretched = big.repeat_interleave(2, dim=2)
    assert (of_big - crop_and_resize(stretched, 96, 96, (0.8, 0.1), like=(640, 360)).float()).abs().max() <= 2


def test_a_contact_sheet_has_a_labelled_strip_per_video():
    rows = [("step 10: a cat\n" * 99, moving(13)), ("a lone image", moving(1, 64, 48)), ("wide", moving(5, 20, 90))]
    sheet = contact_sheet(rows)
    assert sheet.mode == "RGB" and 1900 < sheet.width < 2100 and 500 < sheet.height < 900
    label = np.asarray(sheet)[:24]
    assert (label < 100).any(), "the label is drawn"
    assert contact_sheet([("one", moving(1))]).width < 300


def test_an_image_is_saved_whole_and_alone(tmp_path):
    save_image(tmp_path / "sheet.png", Image.new("RGB", (5, 4), "red"))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert read_frames(tmp_path / "sheet.png", (0,))[0, :, 0, 0].tolist() == [255, 0, 0]


def test_a_media_error_is_a_user_error_that_survives_pickling():
    error = pickle.loads(pickle.dumps(MediaError(Path("a b.mp4"), "the file is empty")))
    assert isinstance(error, UserError) and str(error) == "a b.mp4: the file is empty"
    assert (error.path, error.reason) == (Path("a b.mp4"), "the file is empty")

"""Videos and images are written here, small and odd on purpose."""

import os
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from tests.media import moving
from utils.media.description import Look
from utils.media.frames import crop_and_resize, read_frames, save_image, write_video
from utils.media.probing import probe


def test_a_written_video_reads_back_with_its_size_frames_and_colours(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 16)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps, info.look) == (64, 48, 13, 16.0, Look())
    back = read_frames(tmp_path / "a.mp4", range(13))
    assert back.shape == (13, 3, 48, 64) and back.dtype == torch.uint8
    assert (back.int() - moving().int()).abs().float().mean() < 2.5


def test_a_written_video_declares_its_colour_space(tmp_path):
    write_video(tmp_path / "a.mp4", moving(), 24000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, int(codec.colorspace)) == ("h264", "yuv420p", 1)
        assert container.streams.video[0].average_rate.numerator == 24000


def test_odd_sides_are_written_with_the_last_row_and_column_repeated(tmp_path):
    write_video(tmp_path / "a.mp4", moving(5, 47, 63), 16)
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height) == (64, 48)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_video_can_be_written_under_a_relative_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(Path("take:2.mp4"), moving(5), 16)
    assert probe(tmp_path / "take:2.mp4").frames == 5


def test_a_failed_write_leaves_no_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError):
        write_video(path, torch.zeros(3, 4, 48, 64, dtype=torch.uint8), 16)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


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


def test_a_saved_image_leaves_no_other_file(tmp_path):
    save_image(tmp_path / "sheet.png", Image.new("RGB", (5, 4), "red"))
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert read_frames(tmp_path / "sheet.png", (0,))[0, :, 0, 0].tolist() == [255, 0, 0]

"""Every file is made here, small and odd on purpose."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media import CODECS, encode, moving, remux
from utils.common.errors import UserError
from utils.media.frames import read_frames, write_video
from utils.media.probing import MediaError, probe, read_timeline


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

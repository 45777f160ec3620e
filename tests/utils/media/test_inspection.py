import sys
import time

import pytest

from tests.media import image, video
from utils.media import inspection
from utils.media.inspection import inspect_all
from utils.media.probing import MediaError, probe


def test_results_equal_those_of_this_process_and_keep_the_order(tmp_path):
    good = [video(tmp_path / f"{index}.mp4", frames=5 + index) for index in range(10)]
    good.insert(3, image(tmp_path / "still.png"))
    assert list(inspect_all(good)) == [probe(path) for path in good]


def test_errors_come_back_with_their_path_and_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.png").touch()
    whole = video(tmp_path / "whole.mp4", frames=60).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    paths = [tmp_path / name for name in ("text.mp4", "empty.png", "cut.mp4", "absent.mp4", "whole.mp4")]
    *errors, fine = inspect_all(paths)
    assert all(isinstance(error, MediaError) for error in errors) and fine.frames == 60
    assert [error.path for error in errors] == paths[:4]
    assert "not a readable video" in errors[0].reason and errors[1].reason == "the file is empty"
    assert errors[3].reason == "there is no such file"


def child(monkeypatch, code: str) -> None:
    monkeypatch.setattr(inspection, "COMMAND", (sys.executable, "-c", code))


def test_a_decoder_that_hangs_costs_its_timeout_and_the_next_file_is_inspected(tmp_path, monkeypatch):
    child(
        monkeypatch,
        "import sys, time\nfor line in sys.stdin:\n    'hang.mp4' in line and time.sleep(60)\n"
        '    print(\'{"width": 1, "height": 1, "frames": 5, "fps": 16.0, "rotation": 0}\', flush=True)',
    )
    begun = time.monotonic()
    first, second, third = inspect_all([tmp_path / "a.mp4", tmp_path / "hang.mp4", tmp_path / "c.mp4"], timeout=2)
    assert time.monotonic() - begun < 10
    assert first.frames == third.frames == 5 and second.path == tmp_path / "hang.mp4"
    assert second.reason.startswith("reading it took longer than 2 seconds")


@pytest.mark.parametrize("code", ["import os; input(); os.abort()", "raise SystemExit"])
def test_a_crash_of_a_decoder_is_an_error_of_its_file(tmp_path, monkeypatch, code):
    child(monkeypatch, code)
    (error,) = inspect_all([tmp_path / "a.mp4"], timeout=5)
    assert error.reason.startswith("reading it crashed")


def test_no_process_is_left_running(tmp_path):
    import psutil

    before = set(psutil.Process().children())
    stream = inspect_all([video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4")])
    next(stream)
    stream.close()
    assert set(psutil.Process().children()) <= before

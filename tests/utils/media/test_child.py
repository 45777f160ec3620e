"""The program of a child, started as a run does it, and its parts."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.clips import damaged, write_clip
from tests.media import image, video
from utils.media import child
from utils.media.child import READY, inspect
from utils.media.description import MediaError, MediaInfo, from_json
from utils.media.masks import measure_mask
from utils.media.probing import probe
from utils.media.processes import PROGRAM, ROOT


def question(path, **changes) -> dict:
    return {"path": str(path), "full": True, "mask": False, "threads": 1, "cache": None} | changes


def said_after_ready(done: "subprocess.CompletedProcess[str]") -> list[str]:
    ready, *said = done.stdout.splitlines(keepends=True)
    assert ready == READY
    return said


def answers_to(questions: list[dict]) -> list[dict]:
    text = "".join(json.dumps(asked) + "\n" for asked in questions)
    done = subprocess.run(PROGRAM, input=text, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60, check=True)
    assert done.stderr == "", "what FFmpeg reports is not shown to the user"
    said = [json.loads(line) for line in said_after_ready(done)]
    return [line for line in said if "position" not in line]


def test_each_question_has_its_answer(tmp_path):
    clip, still = video(tmp_path / "ä b.mp4"), image(tmp_path / "still.png")
    write_clip(tmp_path / "good.avi", "mjpeg", 24, "yuvj420p", (128, 96))
    bad = damaged(tmp_path / "good.avi", tmp_path / "bad.avi", seed=1)
    first, second, third, fourth, fifth = answers_to(
        [
            question(clip),
            question(bad),
            question(tmp_path / "none.mp4"),
            question(still, mask=True),
            question(tmp_path / "good.avi", threads=2),
        ]
    )
    assert from_json(first["info"]) == probe(clip, full=True) and first["is_new"] and len(first["digest"]) == 64
    assert second["info"] is None and second["reason"].startswith("damaged after 0.")
    assert third["reason"] == "there is no such file" and third["digest"] is None
    assert from_json(fourth["info"]).mask == measure_mask(still, probe(still))
    assert from_json(fifth["info"]).frames == 24, "what was reported about another file does not count"


def test_what_is_known_of_the_content_is_not_found_anew(tmp_path):
    clip, cache = video(tmp_path / "a.mp4"), str(tmp_path / "media")
    copy = tmp_path / "b.mp4"
    copy.write_bytes(clip.read_bytes())
    first, second = answers_to([question(clip, cache=cache), question(copy, cache=cache)])
    assert first["is_new"] and not second["is_new"] and first["digest"] == second["digest"]
    assert tuple(second["stamp"]) == probe(copy).stamp == from_json(second["info"]).stamp


def test_the_end_of_a_file_that_is_not_decoded_is_read(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=36, muxer={"movflags": "faststart"})
    assert inspect(path, False, False, 1, lambda: "", lambda position: None) == probe(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1500] + bytes(1500))
    with pytest.raises(MediaError):
        inspect(path, False, False, 1, lambda: "", lambda position: None)


def test_progress_is_said_now_and_then(monkeypatch):
    answers = io.StringIO()
    progress = child._progress(answers)
    progress(5)
    assert answers.getvalue() == ""
    now = time.monotonic() + 1
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress(7)
    progress(8)
    assert answers.getvalue() == '{"position": 7}\n'


def test_what_decoders_print_is_not_taken_for_an_answer(tmp_path):
    code = (
        "import os, sys\n"
        "from utils.media import child\n"
        "inspect = child.inspect\n"
        "def noisy(*args):\n"
        "    os.write(1, b'noise'); print('noise'); os.write(2, b'[x @ 0x1] noise')\n"
        "    return inspect(*args)\n"
        "child.inspect = noisy\n"
        "child.main()\n"
    )
    asked = json.dumps(question(image(tmp_path / "a.png"))) + "\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=asked, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60, check=True)
    (answer,) = map(json.loads, said_after_ready(done))
    assert isinstance(from_json(answer["info"]), MediaInfo) and done.stderr == ""


def test_reports_are_read_to_their_end_and_not_counted_against_the_next_file(tmp_path):
    with child._open_reports() as reports:
        listen = child._listen_to_ffmpeg(reports.fileno())
        written = "".join(f"[h264 @ 0x1] error {number}\n" for number in range(20_000))
        os.write(reports.fileno(), written.encode())
        assert listen() == written and listen() == ""


def test_a_file_that_changes_while_it_is_read_is_neither_described_nor_remembered(tmp_path, monkeypatch):
    clip, other = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4", frames=13)

    def replaced(*inspected):
        found = inspect(*inspected)
        other.replace(clip)
        return found

    monkeypatch.setattr(child, "inspect", replaced)
    answer = child._answer(question(clip, cache=str(tmp_path / "media")), lambda: "", io.StringIO())
    assert answer["reason"] == "it changed while it was read: start again" and answer["digest"] is None
    assert not (tmp_path / "media").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_child_ends_with_its_parent(tmp_path):
    code = f"import subprocess, sys, os; p = subprocess.Popen({list(PROGRAM)!r}, cwd={str(ROOT)!r}, "
    code += "stdin=subprocess.PIPE, stdout=subprocess.PIPE); print(p.pid, flush=True); os._exit(0)"
    pid = int(subprocess.run((sys.executable, "-c", code), capture_output=True, check=True).stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([psutil.Process(pid)], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_no_temporary_folder_is_needed_where_memory_does(tmp_path):
    if sys.platform != "linux":
        pytest.skip("a file in memory needs Linux")
    write_clip(tmp_path / "good.avi", "mjpeg", 24, "yuvj420p", (128, 96))
    bad = damaged(tmp_path / "good.avi", tmp_path / "bad.avi", seed=1)
    nowhere = os.environ | {"TMPDIR": "/dev/null"}
    asked = json.dumps(question(bad)) + "\n"
    done = subprocess.run(
        PROGRAM, input=asked, cwd=ROOT, capture_output=True, encoding="utf-8", env=nowhere, check=True
    )
    (answer,) = map(json.loads, said_after_ready(done))
    assert answer["reason"].startswith("damaged after 0.")

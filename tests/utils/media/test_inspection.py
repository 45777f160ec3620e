"""Children that find everything, and children that hang, crash and lie."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

from tests.clips import write_clip
from tests.media import image, video
from utils.common.errors import UserError
from utils.media import inspection
from utils.media.description import MediaError, MediaInfo, to_json
from utils.media.inspection import Child, Inspector, Patience
from utils.media.masks import measure_mask
from utils.media.probing import probe
from utils.media.processes import Process, run_program

SHORT = Patience(cpu=0.5, idle=1.0)
ANSWER = {
    "stamp": [1, 2, 3, 4],
    "digest": "0" * 64,
    "is_new": True,
    "info": to_json(MediaInfo(1, 1, 5, 16.0)),
    "reason": None,
}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Children are looked at often, so that short limits are enough."""
    monkeypatch.setattr(inspection, "LOOK_EVERY", 0.05)


def child(monkeypatch, code: str) -> None:
    """Children that run this code for each question, where `answer()` answers it and `say(n)` says how far they are."""
    program = f"""
import json, os, sys, time
def say(position): print(json.dumps({{"position": position}}), flush=True)
def compute(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
def answer(): print({json.dumps(json.dumps(ANSWER))}, flush=True)
for line in sys.stdin:
    name = os.path.basename(json.loads(line)["path"])
    exec({code!r})
"""
    monkeypatch.setattr(inspection, "start", partial(run_program, (sys.executable, "-c", program)))


@pytest.fixture
def no_child(monkeypatch):
    def forbid():
        monkeypatch.setattr(Child, "_start", lambda self: pytest.fail("a child was started"))

    return forbid


@pytest.fixture
def stub(tmp_path):
    """A file that no child really opens."""

    def make(name: str) -> Path:
        (tmp_path / name).write_bytes(b"content")
        return tmp_path / name

    return make


def inspect_one(path: Path, patience: Patience = SHORT) -> MediaInfo | MediaError:
    return Inspector(patience=patience).inspect([path])[path]


# --------------------------------------------------------------------------------------------------- what is found


def test_results_equal_those_of_this_process_and_keep_the_order(tmp_path):
    good = [video(tmp_path / f"{index}.mp4", frames=5 + index) for index in range(10)]
    good.insert(3, image(tmp_path / "still.png"))
    good.append(write_clip(tmp_path / "tape.ts", "mpeg2video", 12, rate=25))
    inspector = Inspector()
    found = inspector.inspect(good)
    assert list(found.items()) == [(path, probe(path, full=True)) for path in good]
    assert all(info.stamp == probe(path).stamp for path, info in found.items())
    assert inspector.decoded == 11 and inspector.seconds > 0


def test_errors_come_back_with_their_path_and_reason(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.png").touch()
    whole = video(tmp_path / "whole.mp4", frames=60).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    paths = [tmp_path / name for name in ("text.mp4", "empty.png", "cut.mp4", "absent.mp4", "whole.mp4")]
    *errors, fine = Inspector().inspect(paths).values()
    assert all(isinstance(error, MediaError) for error in errors) and fine.frames == 60
    assert [error.path for error in errors] == paths[:4]
    assert "not a readable video" in errors[0].reason and errors[1].reason == "the file is empty"
    assert "not a readable video" in errors[2].reason and errors[3].reason == "there is no such file"


def test_relative_names_are_found_from_the_folder_of_this_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "-b.mp4", "c:d.mp4") if os.name != "nt" else ("a.mp4",):
        video(tmp_path / "made.mp4").rename(name)
        found = Inspector().inspect([Path(name)])
        assert list(found) == [Path(name)] and found[Path(name)].frames == 9


def test_masks_are_measured_where_they_are_read_as_such(tmp_path):
    mask, clip = image(tmp_path / "mask.png"), video(tmp_path / "clip.mp4")
    found = Inspector().inspect([mask, clip], masks=[mask])
    assert found[mask].mask == measure_mask(mask, probe(mask)) and found[clip].mask is None


def test_without_a_full_decode_the_end_of_a_file_is_read_at_least(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=36, muxer={"movflags": "faststart"})
    data = path.read_bytes()
    for name, start in (("end", len(data) - 1500), ("middle", len(data) // 2)):
        (tmp_path / f"{name}.mp4").write_bytes(data[:start] + bytes(1500) + data[start + 1500 :])
    end, middle = Inspector(full=False).inspect([tmp_path / "end.mp4", tmp_path / "middle.mp4"]).values()
    assert isinstance(end, MediaError) and middle.frames == 36 and not middle.is_whole
    assert "damaged after" in inspect_one(tmp_path / "middle.mp4").reason


# ------------------------------------------------------------------------------------------------------ what is kept


def test_what_is_known_by_content_needs_no_child(tmp_path, no_child):
    good, bad = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4")
    bad.write_bytes(bad.read_bytes()[:-300])
    first = Inspector(tmp_path / "cache")
    found = first.inspect([good, bad])
    no_child()
    second = Inspector(tmp_path / "cache")
    again = second.inspect([good, bad])
    assert again[good] == found[good] == probe(good, full=True) and again[good].stamp == found[good].stamp
    assert str(again[bad]) == str(found[bad]) and (first.decoded, second.decoded, second.seconds) == (1, 0, 0)


def test_a_copy_is_hashed_and_not_decoded_again(tmp_path):
    path = video(tmp_path / "a.mp4")
    Inspector(tmp_path / "cache").inspect([path])
    shutil.copy(path, tmp_path / "copy.mp4")
    later = Inspector(tmp_path / "cache")
    found = later.inspect([tmp_path / "copy.mp4"])[tmp_path / "copy.mp4"]
    assert later.decoded == 0 and found == probe(path, full=True) and found.stamp == probe(tmp_path / "copy.mp4").stamp


def test_other_content_of_the_same_size_and_time_is_noticed(tmp_path):
    path = write_clip(tmp_path / "a.avi", "rawvideo", 6, "bgr24")
    other = write_clip(tmp_path / "b.avi", "rawvideo", 6, "bgr24", rate=25)
    assert path.stat().st_size == other.stat().st_size
    assert Inspector(tmp_path / "cache").inspect([path])[path].fps == 16
    before = path.stat()
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert Inspector(tmp_path / "cache").inspect([path])[path].fps == 25


def test_a_full_description_serves_a_fast_run_but_not_the_reverse(tmp_path, no_child):
    whole, fast = video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4", frames=10)
    Inspector(tmp_path / "cache").inspect([whole])
    assert not Inspector(tmp_path / "cache", full=False).inspect([fast])[fast].is_whole
    later = Inspector(tmp_path / "cache")
    assert later.inspect([fast])[fast].is_whole and later.decoded == 1
    no_child()
    assert Inspector(tmp_path / "cache", full=False).inspect([whole])[whole].is_whole


def test_a_file_is_described_as_a_picture_and_as_a_mask_apart(tmp_path):
    path = image(tmp_path / "a.png")
    assert Inspector(tmp_path / "cache").inspect([path])[path].mask is None
    assert Inspector(tmp_path / "cache").inspect([path], masks=[path])[path].mask is not None
    assert Inspector(tmp_path / "cache").inspect([path])[path].mask is None


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, place):
    (tmp_path / "file").write_text("x")
    path = video(tmp_path / "a.mp4")
    for _ in range(2):
        assert Inspector(tmp_path / place).inspect([path])[path].frames == 9


def test_a_file_that_a_child_did_not_survive_is_asked_about_again(tmp_path, monkeypatch, stub):
    path = stub("a.mp4")
    child(monkeypatch, "os.abort()")
    assert isinstance(Inspector(tmp_path / "cache").inspect([path])[path], MediaError)
    child(monkeypatch, "answer()")
    assert Inspector(tmp_path / "cache").inspect([path])[path].frames == 5


# ------------------------------------------------------------------------------------------------------- patience


def test_a_child_that_computes_without_a_frame_is_given_up_and_the_next_file_is_inspected(monkeypatch, stub):
    child(monkeypatch, "while name == 'b.mp4': pass\nanswer()")
    first, hangs, last = (stub(f"{name}.mp4") for name in "abc")
    begun = time.process_time(), time.monotonic()
    found = Inspector(patience=SHORT).inspect([first, hangs, last])
    assert found[first].frames == found[last].frames == 5
    assert (
        found[hangs].reason == "reading it was given up: a decoder worked for 0.5 s of processor time and made no frame"
    )
    assert time.monotonic() - begun[1] < 20 and time.process_time() - begun[0] < 5


def test_a_child_that_waits_without_using_time_is_given_up_later(monkeypatch, stub):
    child(monkeypatch, "time.sleep(60)")
    begun = time.monotonic()
    assert inspect_one(stub("a.mp4")).reason == "reading it was given up: nothing came from its disk for 1 s"
    assert 1 <= time.monotonic() - begun < 10


def test_a_child_that_says_how_far_it_is_is_waited_for_however_slow_it_is(monkeypatch, stub):
    child(monkeypatch, "for position in range(3): time.sleep(0.5); say(position)\nanswer()")
    begun = time.monotonic()
    assert inspect_one(stub("a.mp4")).frames == 5 and time.monotonic() - begun >= 1.5
    child(monkeypatch, "for position in range(3): compute(0.3); say(position)\nanswer()")
    assert inspect_one(stub("b.mp4")).frames == 5, "0.9 s of processor time, in parts"


def test_a_child_that_reads_bytes_without_a_frame_is_waited_for(monkeypatch, stub):
    if not hasattr(psutil.Process, "io_counters"):
        pytest.skip("this system does not count what a process reads")
    child(monkeypatch, "for _ in range(7): time.sleep(0.2); open(sys.executable, 'rb').read(9)\nanswer()")
    assert inspect_one(stub("a.mp4"), Patience(cpu=9, idle=1)).frames == 5


def test_a_child_that_works_a_little_now_and_then_is_not_taken_for_one_that_waits(monkeypatch, stub):
    child(monkeypatch, "for _ in range(5): time.sleep(0.3); compute(0.03)\nanswer()")
    assert inspect_one(stub("a.mp4"), Patience(cpu=9, idle=1)).frames == 5


# --------------------------------------------------------------------------------------------------------- crashes


ENDS = {
    "os.abort()": "crashed (SIGABRT):",
    "sys.exit()": "crashed:",
    "os._exit(7)": "crashed (exit code 7):",
    "raise SystemExit(3)": "crashed (exit code 3):",
    "os.close(1); time.sleep(60)": "crashed:",  # it has not ended by itself
}


@pytest.mark.skipif(sys.platform != "linux", reason="exit codes are those of Linux")
@pytest.mark.parametrize("code", ENDS)
def test_a_crash_of_a_decoder_is_an_error_of_its_file(monkeypatch, stub, code):
    child(monkeypatch, f"if name == 'b.mp4':\n    {code}\nanswer()")
    first, bad, last = (stub(f"{name}.mp4") for name in "abc")
    found = Inspector(patience=SHORT).inspect([first, bad, last])
    assert found[bad].reason.startswith(f"reading it {ENDS[code]}")
    assert found[first].frames == found[last].frames == 5


GARBAGE = ["not json", "[]", "5", "null", "{}", '{"position": "x"}', '{"reason": null}', '{"reason": null, "info": {}}']


ENDLESS = json.dumps(ANSWER).replace('"0"', '"1/0"')  # the unit of its times


@pytest.mark.parametrize(
    "said", [*GARBAGE, json.dumps(ANSWER | {"info": 5}), json.dumps(ANSWER | {"stamp": None}), ENDLESS]
)
def test_an_answer_that_is_none_is_an_error_of_its_file(monkeypatch, stub, said):
    child(monkeypatch, f"print({said!r}, flush=True) if name == 'b.mp4' else answer()")
    first, bad = stub("a.mp4"), stub("b.mp4")
    found = Inspector(patience=SHORT).inspect([first, bad])
    assert isinstance(found[bad], MediaError) and found[first].frames == 5


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "too little"), ChildProcessError("too little")])
def test_where_no_process_can_be_started_no_file_is_blamed(monkeypatch, stub, error):
    monkeypatch.setattr(inspection, "start", Mock(side_effect=error))
    with pytest.raises(UserError, match="cannot start a process that inspects media files: too little\n"):
        inspect_one(stub("a.mp4"))


@pytest.mark.parametrize("whose", ["ThreadPoolExecutor", "_forward"])
def test_where_there_can_be_no_more_threads_that_is_said_and_no_process_is_left(monkeypatch, stub, whose):
    before, path = set(psutil.Process().children()), stub("a.mp4")
    child(monkeypatch, "answer()")
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if whose in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UserError, match="inspects media files: can't start new thread\n"):
        inspect_one(path)
    assert set(psutil.Process().children()) <= before


def test_a_process_that_was_started_too_late_is_ended(monkeypatch):
    before = set(psutil.Process().children())
    late = Child(SHORT)
    started = partial(run_program, (sys.executable, "-c", "import time; time.sleep(60)"))

    def end_meanwhile() -> Process:
        late.end_for_good()
        return started()

    monkeypatch.setattr(inspection, "start", end_meanwhile)
    with pytest.raises(UserError, match="interrupted"):
        late.ask({"path": "a.mp4"}, lambda position: None)
    assert set(psutil.Process().children()) <= before


def test_no_process_is_left_running(tmp_path, monkeypatch):
    before = set(psutil.Process().children())
    clips = [video(tmp_path / "a.mp4"), video(tmp_path / "b.mp4")]
    Inspector().inspect(clips)
    assert set(psutil.Process().children()) <= before
    monkeypatch.setattr(Child, "_wait", lambda self, process, move: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Inspector().inspect(clips)
    assert set(psutil.Process().children()) <= before


def test_a_file_that_vanishes_while_it_waits_is_an_error_of_its_own(monkeypatch, stub):
    path = stub("a.mp4")
    known = Inspector._known
    monkeypatch.setattr(Inspector, "_known", lambda self, path, mask: known(self, path, mask) or path.unlink())
    assert isinstance(Inspector().inspect([path])[path], MediaError)


def test_descriptions_travel_whole(monkeypatch, stub):
    info = replace(MediaInfo(64, 48, 5, 16.0), notes=("deinterlaced",), is_whole=True)
    monkeypatch.setitem(ANSWER, "info", to_json(info))
    child(monkeypatch, "answer()")
    assert inspect_one(stub("a.mp4")) == info


def test_an_interruption_waits_for_no_child(tmp_path, monkeypatch):
    child(monkeypatch, "time.sleep(60)")
    paths = [image(tmp_path / f"{number}.png") for number in range(4)]
    monkeypatch.setattr(inspection, "BYTES_PER_CHILD", 1)
    before = set(psutil.Process().children())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of pytest-xdist ignore it
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            Inspector(patience=Patience(idle=20)).inspect(paths)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begun < 5 and set(psutil.Process().children()) <= before


@pytest.mark.slow
def test_a_healthy_file_passes_whatever_else_the_machine_does(tmp_path):
    large = {"cpu-used": "8", "deadline": "realtime", "b": "4M"}
    noise = np.random.default_rng(0).integers(0, 256, (120, 720, 1280, 3), np.uint8)
    path = write_clip(tmp_path / "large.webm", "libvpx", frames=noise, **large)
    loop = "import time\nuntil = time.monotonic() + 100\nwhile time.monotonic() < until: pass"  # ends whatever happens
    busy = [subprocess.Popen((sys.executable, "-c", loop)) for _ in range(8)]
    try:
        begun = time.monotonic()
        found = Inspector(patience=Patience(cpu=0.5, idle=1.0)).inspect([path])[path]
        assert isinstance(found, MediaInfo) and found.frames == 120
        assert time.monotonic() - begun > 2  # longer than both limits: neither is about time that passes
    finally:
        for process in busy:
            process.kill()
            process.wait()

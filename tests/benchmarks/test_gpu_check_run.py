"""How the groups of the GPU check are run: limits, failures, and going on after an interruption."""

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.checks import numbers, vae
from benchmarks.measure import FAILED, Clock, Row, Sizes, p90, skipped
from benchmarks.results import Results

CPU = torch.device("cpu")
RUN = ("abc1234", "a GPU", "full")
PAIR = {"precision": ("numbers", "check"), "vae": ("vae", "check")}
VAE = {"vae": ("vae", "check")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu.jsonl"


def fake(monkeypatch: pytest.MonkeyPatch, module: object, check: Callable) -> None:
    monkeypatch.setattr(module, "check", check)


def run(groups: dict, path: Path, seconds: float = 60) -> Results:
    results = Results(path, RUN)
    gpu_check.run_groups(groups, Sizes(), CPU, Clock(seconds), results)
    return results


def fine(*_: object) -> Iterator[Row]:
    yield Row("fine", 2.0)


def test_an_exception_in_a_group_becomes_a_row_and_the_other_groups_run(monkeypatch, capsys, path):
    def broken(sizes, device, clock):
        yield Row("before", 1.0)
        raise ValueError("no such thing\nand more")

    fake(monkeypatch, numbers, broken)
    fake(monkeypatch, vae, fine)
    results = run(PAIR, path)
    failed = Row("precision", verdict=f"{FAILED}: ValueError: no such thing")
    assert results.rows == {"precision": [Row("before", 1.0), failed], "vae": [Row("fine", 2.0)]}
    assert results.complete == set(PAIR)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "verdict"), [("peft.x", "skipped: peft.x is not installed"), ("wan.x", FAILED)])
def test_a_group_is_skipped_for_a_missing_package_but_fails_for_one_of_our_own(monkeypatch, path, name, verdict):
    def lacking(sizes, device, clock):
        raise ModuleNotFoundError("gone", name=name)

    fake(monkeypatch, vae, lacking)
    [row] = run(VAE, path).rows["vae"]
    assert row.verdict.startswith(verdict)


def test_a_group_that_runs_out_of_memory_is_skipped(monkeypatch, path):
    def greedy(sizes, device, clock):
        raise torch.OutOfMemoryError("too much")

    fake(monkeypatch, vae, greedy)
    assert run(VAE, path).rows["vae"] == [skipped("vae", "out of memory")]


def slow(sizes, device, clock):
    yield Row("before", 1.0)
    time.sleep(20)


def test_a_group_that_takes_more_than_its_share_of_the_time_ends_with_a_row(monkeypatch, path):
    fake(monkeypatch, vae, slow)
    start = time.monotonic()
    results = run(VAE, path, seconds=0.4)
    assert time.monotonic() - start < 5
    assert results.rows["vae"] == [Row("before", 1.0), skipped("vae", "the time limit of 0 s has passed")]
    assert results.complete == {"vae"}


class Left(Clock):
    """A clock of 100 seconds that shows given values, one after the other."""

    def __init__(self, *shown: float) -> None:
        super().__init__(100)
        self.shown = iter(shown)

    def left(self) -> float:
        return next(self.shown)


def test_a_group_that_had_less_than_its_share_runs_again_next_time(monkeypatch, path):
    def late(sizes, device, clock):
        yield Row("half", 1.0)
        raise gpu_check.OutOfTime

    fake(monkeypatch, numbers, late)
    fake(monkeypatch, vae, late)
    results = Results(path, RUN)
    gpu_check.run_groups(PAIR, Sizes(), CPU, Left(100, 60), results)
    assert results.complete == {"precision"}
    assert results.rows["vae"][-1] == skipped("vae", "the time limit of 60 s has passed")


def test_what_there_is_no_time_for_is_not_begun(monkeypatch, path, capsys):
    fake(monkeypatch, numbers, fine)
    fake(monkeypatch, vae, fine)
    results = Results(path, RUN)
    gpu_check.run_groups(PAIR, Sizes(), CPU, Left(100, 10), results)
    assert results.rows.keys() == {"precision"}
    assert "run it again for the rest" in capsys.readouterr().err


def test_after_an_error_that_the_gpu_does_not_recover_from_the_rest_waits_for_the_next_run(monkeypatch, path):
    def broken(sizes, device, clock):
        raise RuntimeError("CUDA error: an illegal memory access")
        yield

    fake(monkeypatch, numbers, broken)
    fake(monkeypatch, vae, fine)
    results = run(PAIR, path)
    assert results.complete == {"precision"} and results.rows["precision"][0].failed
    assert "vae" not in results.rows


def test_an_interrupted_part_goes_on_with_its_next_group(monkeypatch, path):
    taken = []

    def counted(sizes, device, clock):
        taken.append("precision")
        yield Row("first", 1.0)

    def interrupted(sizes, device, clock):
        taken.append("vae")
        yield Row("before", 1.0)
        if taken.count("vae") == 1:
            raise KeyboardInterrupt
        yield Row("after", 2.0)

    fake(monkeypatch, numbers, counted)
    fake(monkeypatch, vae, interrupted)
    monkeypatch.setattr(gpu_check, "PARTS", {"numbers": PAIR})
    with pytest.raises(KeyboardInterrupt):
        run(gpu_check.chosen("numbers", (), Results(path, RUN)), path)
    again = gpu_check.chosen("numbers", (), Results(path, RUN))
    results = run(again, path)
    assert taken == ["precision", "vae", "vae"]
    assert results.rows == {"precision": [Row("first", 1.0)], "vae": [Row("before", 1.0), Row("after", 2.0)]}
    assert not gpu_check.chosen("numbers", (), Results(path, RUN))


def test_a_group_that_twice_ended_the_process_is_given_up(monkeypatch, path):
    fake(monkeypatch, vae, fine)
    for _ in range(2):
        Results(path, RUN).begin("vae")
    results = run(VAE, path)
    [row] = results.rows["vae"]
    assert row.verdict == "failed: it ended the process 2 times"
    assert results.complete == {"vae"}


def test_named_groups_are_measured_again(path):
    results = Results(path, RUN)
    results.begin("vae")
    results.end("vae")
    assert "vae" not in gpu_check.chosen("step", (), results)
    assert list(gpu_check.chosen("step", ("vae", "link"), results)) == ["vae"]


def test_every_group_exists_and_no_two_have_one_name():
    places = [(name, place) for groups in gpu_check.PARTS.values() for name, place in groups.items()]
    for _, (module, function) in places:
        assert callable(getattr(importlib.import_module(f"benchmarks.checks.{module}"), function))
    assert len({name for name, _ in places}) == len(places)


def test_the_record_is_a_table_with_date_machine_commit_and_command(monkeypatch):
    monkeypatch.setattr(gpu_check, "commit", lambda folder: "abc1234")
    text = gpu_check.format_record([("vae", Row("a | b", 0.123456789, "s", "limit >= 1", FAILED))], "H200", "python x")
    heading, command, *table = [line for line in text.splitlines() if line]
    assert re.fullmatch(r"### \d{4}-\d\d-\d\d, H200, commit abc1234", heading)
    assert command == "`python x`"
    assert table[2] == "| vae | a / b | 0.123457 | s | limit >= 1 | failed |"
    assert len({line.count("|") for line in table}) == 1


def test_the_commit_is_unknown_outside_a_checkout(tmp_path):
    assert gpu_check.commit(tmp_path) == "unknown"
    assert gpu_check.commit(tmp_path / "missing") == "unknown"


def test_local_changes_are_another_commit(tmp_path):
    def git(*args: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = gpu_check.commit(tmp_path)
    seen = {clean}
    for text in ("two", "three"):
        (tmp_path / "file").write_text(text)
        seen.add(gpu_check.commit(tmp_path))
    for text in ("one", "two"):
        (tmp_path / "new").write_text(text)
        seen.add(gpu_check.commit(tmp_path))
    assert len(seen) == 5 and all(name.startswith(clean) for name in seen)
    assert "local changes" not in clean


def test_p90_is_near_the_slowest_of_ten():
    assert p90([float(n) for n in range(1, 12)]) == 10


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_check, "commit", lambda folder: RUN[0])


def test_a_part_is_measured_and_everything_of_this_commit_is_printed(on_gpu, monkeypatch, capsys, path):
    verdict = "missed"
    monkeypatch.setattr(gpu_check, "PARTS", {"step": VAE, "numbers": {"precision": ("numbers", "check")}})
    fake(monkeypatch, vae, lambda *_: iter([Row("x", verdict=verdict)]))
    run({"precision": ("numbers", "none")}, path)
    command = ["gpu_check.py", "--part", "step", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):  # the failed row of another part
        gpu_check.main()
    out = capsys.readouterr().out
    assert f"`python benchmarks/gpu_check.py --part step --results {path}`" in out
    assert "| vae | x |" in out and "| precision | precision |" in out


def test_all_parts_with_something_left_run_in_processes_of_their_own(on_gpu, monkeypatch, path):
    started = []
    monkeypatch.setattr(gpu_check, "PARTS", {"step": VAE, "numbers": {"precision": ("numbers", "check")}})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--quick", "--results", str(path)])
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda command, **_: started.append(command))
    done = Results(path, (*RUN[:2], "quick"))
    done.begin("vae")
    done.end("vae")
    gpu_check.main()
    assert [command[2:] for command in started] == [["--quick", "--results", str(path), "--part", "numbers"]]


def test_without_a_gpu_the_script_says_so_and_exits_0(tmp_path):
    script = Path(gpu_check.__file__)
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "no CUDA GPU here: nothing was measured\n"

"""Known problems of a machine: each is reported where it exists, and only there."""

import platform
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from tests.tiny import write_model
from utils.common.errors import UserError
from utils.setup import doctor
from wan.checkpoints import CheckpointError, open_model


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "kept")


def warnings(monkeypatch, gpu: bool = True, cudnn: int = 91900, decord: bool = True, **versions: str) -> str:
    """The warnings for a machine with a GPU and the newest versions except those given."""
    newest = {"torch": "2.12.0+cu130", "transformers": "5.10.0"}
    monkeypatch.setattr(doctor, "_version", (newest | versions).get)
    monkeypatch.setattr(doctor, "has_decord", lambda: decord)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    return "\n".join(doctor._warnings())


def test_a_machine_with_the_newest_versions_has_no_known_problem(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert warnings(monkeypatch) == ""


def test_the_findings_are_a_table_and_the_problems(kept, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_warnings", lambda: iter(["the sky is falling"]))
    doctor.print_findings(lambda: open_model(kept))
    said = capsys.readouterr().out
    assert said.startswith("what ") and said.endswith("\n\n- the sky is falling\n")
    assert f"{kept}: wan2.1-t2v-1.3B, with all its parts" in said
    monkeypatch.setattr(doctor, "_warnings", lambda: iter(()))
    doctor.print_findings(lambda: open_model(kept))
    assert capsys.readouterr().out.endswith("\n\nno known problems\n")


@pytest.mark.parametrize("error", [UserError, CheckpointError])
def test_a_model_that_cannot_be_used_is_an_error_after_everything_is_printed(monkeypatch, capsys, error):
    for problems, end in ((["the sky is falling"], "\n- the sky is falling\n"), ([], "see the error below\n")):
        monkeypatch.setattr(doctor, "_warnings", lambda problems=problems: iter(problems))
        with pytest.raises(error, match="a web page\ndownload it again"):
            doctor.print_findings(Mock(side_effect=error("a.safetensors is a web page\ndownload it again")))
        said = capsys.readouterr().out
        assert "cannot be used: see the error below" in said and said.endswith(end)


@pytest.mark.parametrize(
    ("machine", "problem"),
    [
        ({"torch": "2.9.0+cu128"}, "torch 2.9 without cuDNN 9.15"),
        ({"torch": "2.9.1+cu128", "cudnn": 91200}, "torch 2.9 without cuDNN 9.15"),
        ({"cudnn": 91002}, "cuDNN 9.8 to 9.10"),
        ({"transformers": "5.1.0"}, "transformers 5.0 and 5.1"),
        ({"decord": False}, "PyAV decodes everything"),
        ({"gpu": False}, "without a GPU"),
    ],
)
def test_a_known_problem_is_reported(monkeypatch, machine, problem):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert problem in warnings(monkeypatch, **machine)


@pytest.mark.parametrize("machine", [{"torch": "2.9.1+cu130", "cudnn": 91500}, {"transformers": "4.57.0"}])
def test_what_only_resembles_a_known_problem_is_not_reported(monkeypatch, machine):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert warnings(monkeypatch, **machine) == ""

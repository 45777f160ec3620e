"""Known problems of a machine: each is reported where it exists, and only there."""

import platform

import pytest
import torch

from utils.setup import doctor


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


def test_the_findings_are_a_table_and_the_problems(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_warnings", lambda: iter(["the sky is falling"]))
    doctor.print_findings()
    said = capsys.readouterr().out
    assert said.startswith("what ") and said.endswith("\n\n- the sky is falling\n")
    monkeypatch.setattr(doctor, "_warnings", lambda: iter(()))
    doctor.print_findings()
    assert capsys.readouterr().out.endswith("\n\nno known problems\n")


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

"""What was decided for a run stays, unless it continues elsewhere: then a change is refused or allowed."""

import pytest

from utils.common.decisions import Decisions
from utils.common.errors import UserError

SAVED = {"device": "GPU A", "compile": "on"}


def never() -> str:
    raise AssertionError("it is decided already")


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_new_run_decides_and_keeps_what_it_decided(capsys):
    decisions = Decisions("GPU A")
    assert decisions.table() == {"device": "GPU A"}
    assert (
        decisions.take("compile", lambda: "on") == "on" and decisions.take("quantised_matmul", lambda: "off") == "off"
    )
    assert decisions.table() == SAVED | {"quantised_matmul": "off"}
    assert said(capsys) == ""


def test_a_run_that_is_resumed_on_its_device_does_as_before_and_says_so(capsys):
    decisions = Decisions("GPU A", SAVED)
    assert decisions.take("compile", never) == "on"
    assert said(capsys) == "--compile on, as in the saved run"
    assert decisions.table() == SAVED


def test_what_was_not_decided_before_is_decided_now(capsys):
    for saved in (SAVED, {"device": "GPU A"}, {}):
        decisions = Decisions("GPU A", saved)
        assert decisions.take("quantised_matmul", lambda: "on") == "on"
        assert decisions.table() == {"device": "GPU A", "quantised_matmul": "on"}
    assert said(capsys) == ""


def test_on_another_device_the_same_is_decided_again_without_a_word(capsys):
    decisions = Decisions("GPU B", SAVED)
    assert decisions.take("compile", lambda: "on") == "on"
    assert decisions.table() == {"device": "GPU B", "compile": "on"} and said(capsys) == ""


def test_on_another_device_another_decision_is_refused_with_both_and_the_way_out():
    allow = "pass --allow_changes to resume anyway, or keep it with --compile on"
    message = f"compile was on on GPU A, and is off on GPU B\n{allow}"
    decisions = Decisions("GPU B", SAVED)
    with pytest.raises(UserError) as caught:
        decisions.take("compile", lambda: "off")
    assert str(caught.value) == message and decisions.table() == {"device": "GPU B"}


def test_on_another_device_another_decision_may_be_allowed(capsys):
    decisions = Decisions("GPU B", SAVED, changes_allowed=True)
    assert decisions.take("compile", lambda: "off") == "off"
    assert decisions.table() == {"device": "GPU B", "compile": "off"} and said(capsys) == ""


def test_decisions_of_a_state_without_its_device_are_not_taken_for_those_of_this_one():
    saved = {"compile": "on"}
    assert Decisions("GPU A", saved).take("compile", lambda: "on") == "on"
    with pytest.raises(UserError, match="compile was on on None"):
        Decisions("GPU A", saved).take("compile", lambda: "off")


def test_decisions_of_one_run_are_not_those_of_another():
    first, second = Decisions("GPU A"), Decisions("GPU A")
    first.take("compile", lambda: "on")
    assert second.table() == {"device": "GPU A"}


def test_what_is_decided_is_decided_once():
    decisions = Decisions("GPU A")
    assert decisions.take("compile", lambda: "off") == "off" and decisions.take("compile", never) == "off"
    decisions.record("compile", "on")
    assert decisions.take("compile", never) == "on" and decisions.table()["compile"] == "on"


def test_what_was_kept_is_known_on_the_same_device_alone():
    assert Decisions("GPU A", SAVED).kept("compile") == "on" and Decisions("GPU A", SAVED).kept("room") is None
    assert Decisions("GPU B", SAVED).kept("compile") is None and Decisions("GPU B").kept("compile") is None


def test_what_is_no_option_is_said_in_words(capsys):
    saved = {"device": "GPU A", "room": "7"}
    assert Decisions("GPU A", saved).take("room", never, words="what blocks keep") == "7"
    assert said(capsys) == "what blocks keep is as in the saved run"
    with pytest.raises(UserError) as caught:
        Decisions("GPU B", saved).take("room", lambda: "8", words="what blocks keep")
    message = "what blocks keep is not the same on GPU A and on GPU B\npass --allow_changes to resume anyway"
    assert str(caught.value) == message


@pytest.mark.parametrize("value", ["", "int7"])
def test_what_was_saved_and_is_not_valid_is_refused(value):
    decisions = Decisions("GPU A", {"device": "GPU A", "weight_dtype": value})
    for ask in (decisions.kept, lambda *args: decisions.take(args[0], never, args[1])):
        with pytest.raises(
            UserError, match=f"the saved run's weight_dtype is {value!r}: its state is damaged, or of a"
        ):
            ask("weight_dtype", {"int8"}.__contains__)

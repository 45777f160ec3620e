"""The command line and the config file name the same options and refuse what they do not know."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.common.errors import RunError, UserError
from utils.common.options import option, parse_options, run_script, to_json


@dataclass(frozen=True)
class Group:
    """The group's title"""

    rank: int = option(16, "rank of 100% of the matrices", minimum=1)
    base_res: tuple[int, ...] = option((624,), "resolutions")
    folder: Path | None = option(None, "a folder")
    kind: str = option("tile", "what kind", choices=("tile", "none"))


@dataclass(frozen=True)
class Options(Group):
    """A program."""

    config: Path | None = option(None, "TOML file")
    name: str = option("", "a name")
    rate: float = option(1e-5, "rate", minimum=0)
    fast: bool = option(False, "be fast")
    checkpointing: str = option("none", "which", choices=("none", "full"), const="full")
    speed: float = option(1.0, "how fast", requires="fast")


def toml(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "options.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_without_arguments_every_option_has_its_default():
    assert parse_options(Options, []) == Options()


def test_flags_are_converted_to_the_annotated_types():
    flags = "--rank 4 --base_res 624 960 --folder a/b --kind none --rate 1 --fast --checkpointing".split()
    expected = Options(rank=4, base_res=(624, 960), folder=Path("a/b"), kind="none", rate=1.0, fast=True)
    assert parse_options(Options, flags) == Options(**vars(expected) | {"checkpointing": "full"})


def test_a_config_file_reads_the_same_names_and_flags_win(tmp_path):
    flags = toml(tmp_path, 'rank = 8\nrate = 1\nbase_res = [64, 96]\nfolder = "x"\nfast = true\ncheckpointing = true\n')
    assert parse_options(Options, flags) == Options(
        rank=8, rate=1.0, base_res=(64, 96), folder=Path("x"), fast=True, checkpointing="full", config=Path(flags[1])
    )
    assert parse_options(Options, [*flags, "--rank", "2", "--no-fast"]).rank == 2
    assert not parse_options(Options, [*flags, "--no-fast"]).fast


def test_a_number_in_the_config_file_may_stand_for_text(tmp_path):
    assert parse_options(Options, toml(tmp_path, "folder = 'x'\nkind = 'none'\nname = 7")).name == "7"


def test_an_option_is_taken_where_what_it_needs_is_given_too():
    assert parse_options(Options, ["--speed", "2", "--fast"]).speed == 2


def test_a_single_value_in_the_config_file_may_stand_for_a_list_of_one(tmp_path):
    assert parse_options(Options, toml(tmp_path, "base_res = 960")).base_res == (960,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnk = 3", "did you mean 'rank'"),
        ("config = 'other.toml'", "unknown option 'config'"),
        ("rank = 2.5", "rank must be of type int, not 2.5"),
        ("rank = true", "rank must be of type int"),
        ("fast = 1", "fast must be of type bool"),
        ("[table]\nrank = 1", "unknown option 'table'"),
        ("rank = ", "not a valid TOML file"),
        ("kind = 'depth'", "must be one of tile, none"),
        ("base_res = []", "base_res needs at least one value"),
        ("speed = 2", "--speed means nothing without --fast"),
    ],
)
def test_a_mistaken_config_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        parse_options(Options, toml(tmp_path, text))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rnk 3", "unknown option '--rnk'; did you mean '--rank'"),
        ("--xyzzyplugh", "see --help"),
        ("--rank 0", "rank must be at least 1"),
        ("--rank three", "rank must be of type int, not 'three'"),
        ("--rate nan", "rate must be at least 0"),
        ("--rank", "expected one argument"),
        ("--kind depth", "kind must be one of tile, none"),
        ("--checkpointing half", "checkpointing must be one of none, full"),
        ("--config missing.toml", "cannot read the config file missing.toml"),
        ("--ran 3", "unknown option '--ran'"),
    ],
)
def test_a_mistaken_flag_is_refused_by_name(flags, message):
    with pytest.raises(UserError, match=message):
        parse_options(Options, flags.split())


def test_options_as_json_hold_every_value():
    assert json.loads(to_json(Options(folder=Path("a"))))["folder"] == "a"
    assert json.loads(to_json(Options()))["rank"] == 16


def test_help_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_options(Options, ["--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert "The group's title" in text
    assert "rank of 100% of the matrices (default: 16)" in text
    assert "{tile,none}" in text


def test_exit_codes_say_what_kind_of_end_it_was(capsys, monkeypatch):
    def bad() -> None:
        raise UserError("the file x is broken")

    def failed() -> None:
        raise RunError("the loss is not finite")

    def foreign() -> None:
        raise ZeroDivisionError("y")

    def stopped() -> None:
        raise KeyboardInterrupt

    assert run_script(lambda: None) == 0
    assert run_script(bad) == 2
    assert capsys.readouterr().err == "error: the file x is broken\n"
    assert run_script(failed) == 1
    assert run_script(foreign, bad_input=(ZeroDivisionError,)) == 2
    assert run_script(stopped) == 130
    assert run_script(foreign) == 1
    unforeseen = capsys.readouterr().err
    assert "ZeroDivisionError: y" in unforeseen and "--debug" in unforeseen and "Traceback" not in unforeseen
    monkeypatch.setattr(sys, "argv", ["script", "--debug"])
    assert run_script(bad) == 2 and run_script(foreign) == 1
    assert capsys.readouterr().err.count("Traceback") == 2


def test_reading_options_imports_no_heavy_library():
    code = "import sys, utils.common.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The command line and the config file name the same options and refuse unknown ones."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from utils.common.errors import RunError, UserError
from utils.common.options import (
    Replaced,
    convert_table,
    expand_home,
    option,
    parse_options,
    run_script,
    to_json,
    to_table,
    training_differences,
    training_table,
)


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


def both(values: list[object]) -> dict[str, object]:
    """What the made-up option --lora_size 4x8 would mean: rank 4 and alpha 8."""
    rank, _, alpha = str(values[0]).partition("x")
    return {"rank": int(rank), "alpha": float(alpha)}


@dataclass(frozen=True)
class Renamed:
    """A program whose options have other names too."""

    replaced: ClassVar[Replaced] = {"lora_size": both, "momentum": "AdamW has none; see --rate"}

    config: Path | None = option(None, "TOML file", affects_training=False)
    rank: int = option(16, "rank", aliases=("lora_rank", "lora_r"))
    alpha: float | None = option(None, "alpha")
    rate: float = option(1e-5, "rate", aliases=("lr",))
    base_res: tuple[int, ...] = option((624,), "resolutions", aliases=("resolution",))
    folder: Path | None = option(None, "a folder", affects_training=False)
    flip: bool = option(False, "flip", aliases=("hflip",))


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


def test_an_option_is_accepted_with_the_one_that_it_requires():
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
        ("speed = 2", "--speed requires --fast"),
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
        ("--folder=", "folder is empty: it must be a path"),
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


def test_an_argument_without_an_option_is_refused():
    with pytest.raises(UserError, match="unexpected argument 'clips'"):
        parse_options(Options, ["clips"])


def test_a_mistaken_declaration_is_refused():
    with pytest.raises(TypeError, match="minimun"):
        option(1, "a number", minimun=0)


def test_aliases_are_accepted_on_the_command_line_and_in_the_config_file(tmp_path):
    expected = Renamed(rank=4, rate=0.5, base_res=(64, 96), flip=True)
    assert parse_options(Renamed, "--lora_r 4 --lr 0.5 --resolution 64 96 --hflip".split()) == expected
    text = "lora_rank = 4\nlr = 0.5\nresolution = [64, 96]\nhflip = true"
    opts = parse_options(Renamed, toml(tmp_path, text))
    assert (opts.rank, opts.rate, opts.base_res, opts.flip) == (4, 0.5, (64, 96), True)
    assert convert_table(Renamed, {"lora_r": 4}, "a table") == {"rank": 4}


def test_an_alias_on_the_command_line_wins_over_the_option_in_the_config_file(tmp_path):
    assert parse_options(Renamed, [*toml(tmp_path, "rank = 4"), "--lora_r", "8"]).rank == 8
    assert parse_options(Renamed, [*toml(tmp_path, "lora_r = 4"), "--rank", "8"]).rank == 8


@pytest.mark.parametrize(
    ("flags", "text", "message"),
    [
        ("--rank 4 --lora_r 8", "", "--rank and --lora_r have different values"),
        ("--lora_r 8 --lora_rank 4", "", "--lora_r and --lora_rank have different values"),
        ("", "rate = 1\nlr = 2", "--rate and --lr have different values"),
        ("--rank 4 --lora_size 8x8", "", "--rank and --lora_size have different values"),
        ("--no-flip --hflip", "", "--flip and --hflip have different values"),
    ],
)
def test_two_names_of_an_option_with_different_values_are_refused(tmp_path, flags, text, message):
    with pytest.raises(UserError, match=message):
        parse_options(Renamed, [*toml(tmp_path, text), *flags.split()])


def test_two_names_of_an_option_with_the_same_value_are_accepted():
    assert parse_options(Renamed, "--rate 1 --lr 1.0 --rank 4 --lora_size 4x8".split()) == Renamed(
        rate=1.0, rank=4, alpha=8.0
    )


def test_a_wrong_value_is_reported_under_the_name_it_was_given_by():
    with pytest.raises(UserError, match="--lr must be of type float, not 'fast'"):
        parse_options(Renamed, ["--lr", "fast"])


def test_a_replaced_name_is_translated_on_the_command_line_and_in_the_config_file(tmp_path):
    assert parse_options(Renamed, ["--lora_size", "4x8"]) == Renamed(rank=4, alpha=8.0)
    assert parse_options(Renamed, toml(tmp_path, "lora_size = '4x8'")).alpha == 8.0


@pytest.mark.parametrize("flags", ["--momentum", "--momentum 0.9"])
def test_a_removed_name_is_answered_with_what_to_use(tmp_path, flags):
    for argv in (flags.split(), toml(tmp_path, "momentum = 0.9")):
        with pytest.raises(UserError, match="--momentum does not exist here: AdamW has none; see --rate"):
            parse_options(Renamed, argv)


def test_a_misspelt_alias_is_answered_with_the_option():
    with pytest.raises(UserError, match="did you mean '--base_res'"):
        parse_options(Renamed, ["--resolutoin", "64"])


def test_help_explains_options_and_lists_other_names_in_one_line(capsys):
    with pytest.raises(SystemExit):
        parse_options(Renamed, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    also = (
        "--lora_rank for --rank, --lora_r for --rank, --lr for --rate, --resolution for --base_res, --hflip for --flip"
    )
    assert text.endswith(f"Also accepted: {also}, --lora_size.")
    assert text.count("--lr") == 1 and "--momentum" not in text


def test_help_has_no_line_for_other_names_where_there_are_none(capsys):
    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"])
    assert "Also accepted" not in capsys.readouterr().out


def test_every_script_accepts_debug():
    assert parse_options(Renamed, ["--debug"]) == Renamed()


def test_the_training_table_holds_the_options_that_affect_training_as_json_values():
    opts = Renamed(folder=Path("a"), base_res=(64, 96))
    expected = {"rank": 16, "alpha": None, "rate": 1e-5, "base_res": [64, 96], "flip": False}
    assert training_table(opts) == expected
    assert json.loads(json.dumps(training_table(opts))) == expected


def test_equal_options_have_no_differences():
    opts = Renamed(rank=4, alpha=8.0, base_res=(64,))
    assert training_differences(to_table(opts), opts) == training_differences(training_table(opts), opts) == []


@pytest.mark.parametrize(
    ("saved", "now", "differences"),
    [
        ({"rank": 4}, Renamed(), ["--rank was 4, is 16"]),
        ({"base_res": [64, 96]}, Renamed(), ["--base_res was [64, 96], is [624]"]),
        ({"folder": "a", "config": "b"}, Renamed(folder=Path("c")), []),  # declared as harmless
        ({}, Renamed(), []),  # an option that did not exist had the effect of its default
        ({}, Renamed(rank=4, base_res=(64,)), ["--rank was 16, is 4", "--base_res was [624], is [64]"]),
        ({"alpha": None}, Renamed(alpha=2.0), ["--alpha was None, is 2.0"]),
        ({"rate": 1}, Renamed(rate=1.0), []),
        ({"lr": 0.5}, Renamed(rate=0.5), []),  # the option was renamed since
        ({"lr": 0.5}, Renamed(), ["--rate was 0.5, is 1e-05"]),
        ({"lora_size": "4x8"}, Renamed(rank=4, alpha=8.0), []),
        ({"gone": None, "gone_too": False, "rest": 0, "more": [], "last": ""}, Renamed(), []),
        ({"gone": 3}, Renamed(), ["--gone was 3, and no longer exists"]),
        ({"momentum": 0.9}, Renamed(), ["--momentum was 0.9, and no longer exists"]),
        ({"momentum": 0.0}, Renamed(), []),
    ],
)
def test_a_table_of_another_version_is_compared_by_what_the_options_meant(saved, now, differences):
    assert training_differences(saved, now) == differences


@dataclass(frozen=True)
class Placed:
    """A program that reads files."""

    config: Path | None = option(None, "TOML file", affects_training=False)
    folder: Path | None = option(None, "a folder", aliases=("dir",))
    files: tuple[Path, ...] = option((), "files")
    model: str = option("owner/name", "folder or name", is_path=True)
    images: tuple[str, ...] = option((), "pictures", is_path=True)
    prompt: str = option("", "a text")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_home_folder_is_understood_in_every_path(home):
    (home / "x").mkdir(parents=True)
    paths = {"folder": home / "a", "files": (home, home / "c"), "model": f"{home}/m", "images": (f"{home}/i", "j")}
    expected = Placed(**paths, prompt="~/p")
    flags = "--dir ~/a --files ~ ~/c --model ~/m --images ~/i j --prompt ~/p".split()
    assert parse_options(Placed, flags) == expected
    text = 'folder = "~/a"\nfiles = ["~", "~/c"]\nmodel = "~/m"\nimages = ["~/i", "j"]\nprompt = "~/p"'
    (home / "x" / "o.toml").write_text(text, encoding="utf-8")
    assert parse_options(Placed, ["--config", "~/x/o.toml"]) == replace(expected, config=home / "x" / "o.toml")
    assert convert_table(Placed, {"dir": "~/a"}, "a table") == {"folder": home / "a"}

    @dataclass(frozen=True)
    class AtHome:
        folder: Path = option(Path("~/d"), "a folder")

    assert parse_options(AtHome, []).folder == home / "d"


def test_what_only_looks_like_a_home_folder_is_unchanged(home):
    names = ("~no_such_user/a", "a/~/b", "./~", "~no such user\0", "~\ud83d", "C:~")
    assert tuple(map(expand_home, names)) == names
    flags = ["--folder", "~no_such_user/a", "--model", "owner/~name"]
    assert parse_options(Placed, flags) == Placed(folder=Path("~no_such_user/a"), model="owner/~name")


def test_a_state_that_was_saved_with_the_same_path_has_no_differences(home):
    now = parse_options(Placed, "--folder ~/a --files ~/b --model ~/m --images ~/i".split())
    typed = {"folder": "~/a", "files": ["~/b"], "model": "~/m", "images": ["~/i"]}
    assert training_differences(typed, now) == training_differences(training_table(now), now) == []
    assert training_differences(typed | {"prompt": "~"}, now) == ["--prompt was ~, is "]
    assert training_differences(typed | {"folder": "~/c"}, now) == [f"--folder was {home}/c, is {home}/a"]


@pytest.mark.parametrize("name", ["folder", "dir", "files", "model", "images"])
def test_a_path_of_windows_that_became_another_one_is_refused(tmp_path, name):
    flags = toml(tmp_path, f'prompt = "a\\tb"\n{name} = "C:\\tmp\\new"')
    with pytest.raises(UserError) as caught:
        parse_options(Placed, flags)
    assert str(caught.value).splitlines() == [
        f"{flags[1]}: {name}: in double quotes \\t and \\n mean a tab and a line break",
        f'line 2: {name} = "C:\\tmp\\new"',
        "in double quotes a backslash begins an escape: write 'C:\\tmp\\new' in single quotes, or \"C:/tmp/new\"",
    ]
    assert parse_options(Placed, [f"--{name}", "a\tb"]) != Placed()  # whoever types a tab means it
    assert parse_options(Placed, toml(tmp_path, f"{name} = 'C:\\tmp'\nprompt = \"a\\tb\"")).prompt == "a\tb"


def test_a_table_is_checked_for_paths_of_windows_where_its_file_is_known(tmp_path):
    file = Path(toml(tmp_path, 'folder = "D:\\b"')[1])
    with pytest.raises(UserError, match=r'^a table: .*\nline 1: folder = "D:\\b"\n'):
        convert_table(Placed, {"folder": "D:\b"}, "a table", file)


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


def test_exit_codes_distinguish_bad_input_failure_and_interruption(capsys, monkeypatch):
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
    unexpected = capsys.readouterr().err
    assert "ZeroDivisionError: y\nunexpected error; run again with --debug for a traceback" in unexpected
    assert "Traceback" not in unexpected
    monkeypatch.setattr(sys, "argv", ["script", "--debug"])
    assert run_script(bad) == 2 and run_script(foreign) == 1
    assert capsys.readouterr().err.count("Traceback") == 2


def test_reading_options_imports_no_heavy_library():
    code = "import sys, utils.common.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The documents say what is so: their commands parse, their links lead somewhere, their tables are those of the code.

`python -m tests.test_readme` writes the options tables of docs/options.md anew.
"""

import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path

import pytest

import convert_lora_to_comfy
import test_wan_control_lora
import train_wan_lora
from benchmarks import quantised, step
from tests.documents import DOCUMENTS, ROOT, blocks, commands, label, prose, read, toml_files
from utils.common.options import convert_table, parse_options
from utils.data.folders import Rules

OPTIONS_PAGE = ROOT / "docs" / "options.md"
SCRIPTS = {
    "train_wan_lora.py": train_wan_lora.Options,
    "test_wan_control_lora.py": test_wan_control_lora.Options,
    "convert_lora_to_comfy.py": convert_lora_to_comfy.ConvertOptions,
}
LONGEST_LINE = 120

# Flags that a text mentions although no script lists them: WanTraining's, those of other programs, Python's own.
NO_OPTIONS = {"lora_targets", "control_preprocess"}
NO_OPTIONS |= {"use_dwt_loss", "val_timestep", "lora_format", "help"}


# ----------------------------------------------------------------------------------------------------------- commands


COMMANDS = [(path, command) for path in DOCUMENTS for command in commands(path)]
OF_SCRIPTS = [(path, command) for path, command in COMMANDS if not SCRIPTS.keys().isdisjoint(command.split()[1:2])]


@pytest.mark.parametrize("path, command", OF_SCRIPTS, ids=[f"{label(path)}: {line}" for path, line in OF_SCRIPTS])
def test_every_command_of_a_document_is_understood(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in toml_files(path).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    parse_options(SCRIPTS[script], arguments)


def test_the_readme_shows_commands_of_every_script():
    assert {command.split()[1] for path, command in OF_SCRIPTS if path == ROOT / "README.md"} == set(SCRIPTS)


def test_every_other_command_of_a_document_names_something_that_exists():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    for path, command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "make":
            assert set(arguments) <= targets, f"{label(path)}: {command}"
        elif program == "python" and arguments[0] == "-m" and arguments[1] not in ("pip", "pytest"):
            assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists(), f"{label(path)}: {command}"
        elif program == "python" and arguments[0].endswith(".py"):
            assert (ROOT / arguments[0]).exists(), f"{label(path)}: {command}"


def test_every_make_target_that_a_text_mentions_exists():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), flags=re.MULTILINE))
    for path in DOCUMENTS:
        mentioned = set(re.findall(r"`make ([a-z-]+)`", read(path)))
        assert mentioned <= targets, f"{label(path)}: {mentioned - targets}"


def test_every_option_that_a_text_mentions_exists():
    specs = [spec for options in SCRIPTS.values() for spec in fields(options)]
    specs += [*fields(step.Options), *fields(quantised.Options)]
    known = {name for spec in specs for name in (spec.name, *spec.metadata["aliases"])} | NO_OPTIONS
    for path in DOCUMENTS:
        mentioned = set(re.findall(r"`--(?:no-)?([a-z0-9_]+)", "\n".join(prose(read(path)))))
        assert mentioned <= known, f"{label(path)}: {mentioned - known}"


def test_the_datasets_of_a_document_have_options_that_a_dataset_may_have():
    tables = [
        table
        for path in DOCUMENTS
        for block in blocks(read(path), "toml")
        for table in tomllib.loads(block).get("dataset", ())
        if isinstance(table, dict)
    ]
    assert tables
    for table in tables:
        assert table.pop("path")
        convert_table(Rules, table, "a document")


# -------------------------------------------------------------------------------------------------------------- links


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = [line.lstrip("#").strip() for line in prose(read(path)) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKS = [
    (path, target)
    for path in DOCUMENTS
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(read(path))))
    if not target.startswith("http")
]


@pytest.mark.parametrize("path, target", LINKS, ids=[f"{label(path)} to {target}" for path, target in LINKS])
def test_every_link_between_documents_leads_somewhere(path, target):
    name, _, anchor = target.partition("#")
    file = (path.parent / name).resolve() if name else path
    assert file.exists()
    assert not anchor or anchor in anchors(file)


def test_every_document_can_be_reached_from_the_readme():
    reached, waiting = set(), {ROOT / "README.md"}
    while waiting:
        page = waiting.pop()
        reached.add(page)
        found = {(path.parent / target.partition("#")[0]).resolve() for path, target in LINKS if path == page}
        waiting |= {path for path in found if path.suffix == ".md"} - reached
    assert reached >= set(DOCUMENTS)


# --------------------------------------------------------------------------------------------------------------- form


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_no_line_of_prose_is_longer_than_an_editor_is_wide(path):
    long = [line for line in prose(read(path)) if len(line) > LONGEST_LINE and not line.startswith("|")]
    assert not long


def test_contributing_is_one_page():
    assert len(read(ROOT / "CONTRIBUTING.md").splitlines()) <= 100


# ------------------------------------------------------------------------------------------------------------ options


def groups(options: type) -> Iterator[tuple[str, list[Field]]]:
    """The headings of a script's options with the options below each, in the order of `--help`."""
    specs = {spec.name: spec for spec in fields(options)}
    for owner in (*options.__mro__[1:], options):
        own = [specs[name] for name in inspect.get_annotations(owner) if name in specs]
        if own:
            yield "" if owner is options else inspect.cleandoc(owner.__doc__).splitlines()[0], own


def options_table(options: type) -> str:
    """A script's options as docs/options.md shows them: one table, with a row for each group's heading."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for heading, specs in groups(options):
        rows += [f"| **{heading}** | | |"] if heading else []
        for spec in specs:
            default = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
            shown = "" if default in (None, "") else "off" if default is False else f"`{default}`"
            choices = ", ".join(f"`{choice}`" for choice in spec.metadata["choices"])
            text = spec.metadata["help"].replace("<", "&lt;") + (f" ({choices})" if choices else "")
            rows.append(f"| `--{spec.name}` | {shown} | {text} |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """The page with the table of each script between the script's two marks."""
    for script, options in SCRIPTS.items():
        marks = f"<!-- {script} -->\n", f"\n<!-- /{script} -->"
        before, rest = page.split(marks[0])
        page = before + marks[0] + options_table(options) + marks[1] + rest.split(marks[1])[1]
    return page


def test_the_options_tables_are_those_of_the_scripts():
    assert read(OPTIONS_PAGE) == with_tables(read(OPTIONS_PAGE)), "write them with: python -m tests.test_readme"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_groups_and_options_of_the_table_in_the_same_order(script, capsys):
    generated = {"--debug"} - {f"--{spec.name}" for spec in fields(SCRIPTS[script])}
    with pytest.raises(SystemExit):
        parse_options(SCRIPTS[script], ["--help"])
    lines = re.findall(r"^(?:(\S.*):$|  (--\w+))", capsys.readouterr().out, flags=re.MULTILINE)
    shown = [heading or option for heading, option in lines if heading != "options" and option not in generated]
    wanted = [
        entry
        for heading, specs in groups(SCRIPTS[script])
        for entry in (*filter(None, [heading]), *(f"--{spec.name}" for spec in specs))
    ]
    assert shown == wanted


if __name__ == "__main__":
    OPTIONS_PAGE.write_text(with_tables(read(OPTIONS_PAGE)), encoding="utf-8")

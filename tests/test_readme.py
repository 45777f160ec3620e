"""What the README says to type is what the scripts understand."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import convert_lora_to_comfy
import test_wan_control_lora
import train_wan_lora
from utils.common.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = {
    "train_wan_lora.py": train_wan_lora.Options,
    "test_wan_control_lora.py": test_wan_control_lora.Options,
    "convert_lora_to_comfy.py": convert_lora_to_comfy.ConvertOptions,
}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python ") and "_lora" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toml = re.search(r"```toml\n# (\S+)\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / toml[1]).write_text(toml[2], encoding="utf-8")
    _, script, *arguments = shlex.split(command)
    parse_options(OPTIONS[script], arguments)


def test_the_readme_shows_commands_of_every_script():
    assert {command.split()[1] for command in COMMANDS} == set(OPTIONS)


def options_table() -> str:
    """The trainer's options as the README shows them, one table with a row a group."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for group in train_wan_lora.Options.__bases__:
        rows.append(f"| **{group.__doc__}** | | |")
        for spec in fields(group):
            default = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
            shown = "" if default is None else "off" if default is False else f"`{default}`"
            rows.append(f"| `--{spec.name}` | {shown} | {spec.metadata['help']} |")
    return "\n".join(rows)


def test_the_options_table_is_that_of_the_trainer():
    assert f"<!-- options -->\n{options_table()}\n<!-- /options -->" in README

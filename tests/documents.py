"""The documents of the project, and what stands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "nano" / "README.md", ROOT / "benchmarks" / "RECORDS.md"]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> Iterator[str]:
    """The lines outside of code blocks."""
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def toml_files(path: Path) -> dict[str, str]:
    """The files that a document shows in toml blocks, by the names in their first lines."""
    shown = (re.fullmatch(r"# (\S+)\n(.*)", block, flags=re.DOTALL) for block in blocks(read(path), "toml"))
    return {match[1]: match[2] for match in shown if match}


def commands(path: Path) -> list[str]:
    """The lines of a document's bash blocks, without comments; a backslash joins a line with the next."""
    lines = "".join(blocks(read(path), "bash")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]

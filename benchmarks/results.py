"""What has been measured: a file of JSON lines, each written at once, so that an interrupted run can continue.

A line says for which run (commit, device, sizes) and which group of rows it is: that the group has begun, one of its
rows, or that the group is complete. A group that is begun again starts empty.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import Row

BEGIN, ROW, END = "begin", "row", "end"


class Results:
    """The rows of one run."""

    def __init__(self, path: Path, run: Sequence[str]) -> None:
        self.path, self.run = path, list(run)
        self.rows: dict[str, list[Row]] = {}  # by group
        self.complete: set[str] = set()
        self.attempts: dict[str, int] = {}  # of groups that are not complete
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            self._append("\n")  # after a line that was cut off
        for line in text.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            entry = json.loads(line)
            if entry["run"] == self.run:
                self._apply(entry["group"], entry["event"], Row(**entry["row"]) if "row" in entry else None)
        except (ValueError, KeyError, TypeError):
            return  # cut off

    def _apply(self, group: str, event: str, row: Row | None) -> None:
        if event == BEGIN:
            self.rows[group] = []
            self.complete.discard(group)
            self.attempts[group] = self.attempts.get(group, 0) + 1
        elif event == END:
            self.complete.add(group)
            self.attempts.pop(group, None)
        elif row is not None:
            self.rows[group].append(row)

    def begin(self, group: str) -> None:
        self._write(group, BEGIN)

    def add(self, group: str, row: Row) -> None:
        self._write(group, ROW, row)

    def end(self, group: str) -> None:
        self._write(group, END)

    def _write(self, group: str, event: str, row: Row | None = None) -> None:
        entry = {"run": self.run, "group": group, "event": event} | ({} if row is None else {"row": asdict(row)})
        self._append(json.dumps(entry) + "\n")
        self._apply(group, event, row)

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

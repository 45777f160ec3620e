"""What is decided for a run by measuring, or by the machine: kept in its state, so that a resumed run is the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from utils.common.console import say
from utils.common.errors import UserError

DEVICE = "device"


@dataclass(frozen=True)
class Decisions:
    """By name. `saved` are those of the run that is resumed, with the name of its device; none for a new run."""

    device: str
    saved: Mapping[str, str] = field(default_factory=dict)
    changes_allowed: bool = False
    made: dict[str, str] = field(default_factory=dict)

    def kept(self, name: str, is_valid: Callable[[str], object] = bool) -> str | None:
        """What was decided on this device when the run began; None where nothing was. Raises UserError as `take`."""
        kept = self.saved.get(name) if self.saved.get(DEVICE) == self.device else None
        if kept is not None and not is_valid(kept):
            raise UserError(f"the saved run's {name} is {kept!r}: its state is damaged, or of a newer version")
        return kept

    def take(
        self, name: str, decide: Callable[[], str], is_valid: Callable[[str], object] = bool, words: str = ""
    ) -> str:
        """What was decided on this device when the run began, which is said; otherwise what `decide` says now, once.

        `words` say what is decided where `name` is no option. Raises UserError where the outcome is not that of another
        device, unless changes are allowed, and for what was saved and is not valid.
        """
        if name in self.made:
            return self.made[name]
        if (kept := self.kept(name, is_valid)) is not None:
            say(f"{words} is as in the saved run" if words else f"--{name} {kept}, as in the saved run")
            return self.record(name, kept)
        value = decide()
        if name in self.saved and self.saved[name] != value and not self.changes_allowed:
            raise UserError(self._difference(name, value, words))
        return self.record(name, value)

    def _difference(self, name: str, value: str, words: str) -> str:
        before, allow = self.saved.get(DEVICE), "pass --allow_changes to resume anyway"
        if words:
            return f"{words} is not the same on {before} and on {self.device}\n{allow}"
        was = f"{name} was {self.saved[name]} on {before}, and is {value} on {self.device}"
        return f"{was}\n{allow}, or keep it with --{name} {self.saved[name]}"

    def record(self, name: str, value: str) -> str:
        """Keeps a decision that is made elsewhere, in place of an earlier one."""
        self.made[name] = value
        return value

    def forget(self, name: str) -> None:
        """Lets something be decided again."""
        self.made.pop(name, None)

    def table(self) -> dict[str, str]:
        """What a state keeps."""
        return {DEVICE: self.device, **self.made}

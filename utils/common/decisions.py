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

    def take(self, name: str, decide: Callable[[], str]) -> str:
        """What was decided on this device when the run began; otherwise what `decide` says now.

        Raises UserError where that is not what was decided on another device, unless changes are allowed.
        """
        if name in self.saved and self.saved.get(DEVICE) == self.device:
            self.made[name] = self.saved[name]
            say(f"--{name} {self.made[name]}, as in the saved run")
            return self.made[name]
        value = decide()
        if name in self.saved and self.saved[name] != value and not self.changes_allowed:
            before = f"{name} was {self.saved[name]} on {self.saved.get(DEVICE)}, and is {value} on {self.device}"
            raise UserError(f"{before}\npass --allow_changes to resume anyway, or give --{name}")
        self.made[name] = value
        return value

    def table(self) -> dict[str, str]:
        """What a state keeps."""
        return {DEVICE: self.device, **self.made}

"""Everything that a run needs to go on as if nothing had happened, in one safetensors file per checkpoint.

    <run>/checkpoints/state-00000100.safetensors       beside wan-lora-00000100.safetensors

Tensors: `adapter.<name>`, the optimizer's `<kind>.<name>`, `ema.<name>`, and `random.cpu`, `random.cuda`. Facts (step,
schedule, options, data) are JSON in the file's metadata.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.common.errors import UserError
from utils.common.files import replacing
from utils.training.ema import Ema
from utils.training.optim import Updater

FACTS = "facts"
PATTERN = "state-*.safetensors"
WATCHED_STEP = 10
CHANGES_SHOWN = 20
# Options that change nothing of what is learnt.
HARMLESS = frozenset(
    """resume_from_checkpoint allow_changes config debug dataset dataset_config num_workers cache_dir prune_cache
    output_dir skip_bad_files checkpointing_steps save_every_minutes save_every_epochs keep_checkpoints val_steps
    val_samples val_seed sample_prompts sample_every sample_steps sample_guidance""".split()
)


@dataclass(frozen=True)
class State:
    """A saved state: where it is, its tensors (loaded when asked for) and its facts."""

    path: Path
    facts: dict[str, Any]

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent

    @property
    def step(self) -> int:
        return self.facts["step"]

    def tensors(self) -> dict[str, Tensor]:
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


class Learner:
    """What changes while training: adapter, optimizer, schedule, the average of the adapter, and random states."""

    def __init__(self, adapter: Mapping[str, nn.Parameter], updater: Updater, ema: Ema | None = None) -> None:
        self.adapter = adapter
        self.updater = updater
        self.ema = ema
        self.steps: int | None = updater.updates  # whose outcome this is; None in the middle of an update
        self.capture_rng_state()

    def capture_rng_state(self) -> None:
        """Remembers where torch's generators are: a step that fails half-way is done again from there."""
        self._random = {"random.cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            self._random["random.cuda"] = torch.cuda.get_rng_state()

    def update(self, max_grad_norm: float) -> Tensor:
        """Ends a step: `Updater.update`, and the average follows. Returns the norm of the gradients."""
        self.steps = None
        norm = self.updater.update(max_grad_norm)
        if self.ema is not None:
            self.ema.update(self.updater.updates)
        self.capture_rng_state()
        self.steps = self.updater.updates
        return norm

    def idle(self) -> Tensor:
        """After WATCHED_STEP updates how many matrices of the adapter are zero, else none: a scalar on its device."""
        parameters = list(self.adapter.values())
        if self.updater.updates != WATCHED_STEP:
            return torch.zeros((), device=parameters[0].device)
        return torch.stack([(parameter == 0).all() for parameter in parameters]).sum().float()

    def tensors(self) -> dict[str, Tensor]:
        """A copy of all of it, on the CPU, by the names of this module."""
        tensors = {f"adapter.{name}": parameter.detach() for name, parameter in self.adapter.items()}
        for name, parameter in self.adapter.items():
            for kind, value in self.updater.optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value
        if self.ema is not None:
            tensors |= {f"ema.{name}": value for name, value in self.ema.values.items()}
        tensors |= self._random
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Puts everything back. Raises UserError where the state is of another adapter."""
        tensors = state.tensors()
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition(".")
            groups[kind][parameter] = tensor
        shapes = {name: tensor.shape for name, tensor in groups.pop("adapter", {}).items()}
        if shapes != {name: parameter.shape for name, parameter in self.adapter.items()}:
            raise UserError(f"{state.path} is of another adapter: rank and targets must be those it was saved with")
        for name, parameter in self.adapter.items():
            parameter.copy_(tensors[f"adapter.{name}"])
        averages, random = groups.pop("ema", {}), groups.pop("random")
        if self.ema is not None:
            for name, value in self.ema.values.items():
                value.copy_(averages.get(name, self.adapter[name]))
        moments = [{kind: values[name] for kind, values in groups.items() if name in values} for name in self.adapter]
        self.updater.load(moments, state.step)
        self.steps = state.step
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        self.capture_rng_state()


def write_state(path: Path, learner: Learner, facts: Mapping[str, Any]) -> None:
    """Appears whole or not at all. Raises OSError, also for what safetensors calls an error of its own."""
    try:
        with replacing(path) as unfinished:
            save_file(learner.tensors(), unfinished, metadata={FACTS: json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_state(path: Path) -> State:
    """Raises UserError for a file that is missing, cut short or no state."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            return State(path, facts)
    except KeyError:
        raise UserError(f"{path} is no training state: those are the files named {PATTERN}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole training state: {error}") from None


def find_state(wanted: str, output_dir: Path) -> State:
    """The state that `--resume_from_checkpoint` means; what is passed over on the way is told.

    "latest" is the whole state of any run under `output_dir` that was written last; else a state file, or a run's
    folder or its checkpoints, whose newest it is. Raises UserError where there is none.
    """
    where = output_dir if wanted == "latest" else Path(wanted)
    if where.is_file():
        state = read_state(where.absolute())
        if state.path.parent.name != "checkpoints":
            raise UserError(f"{where} must lie in the checkpoints folder of its run: the run goes on there")
        return state
    if wanted == "latest":
        found = list(where.glob(f"*/checkpoints/{PATTERN}"))
    else:
        found = [*where.glob(PATTERN), *where.glob(f"checkpoints/{PATTERN}")]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            return read_state(path)
        except UserError as error:
            print(f"passed over: {error}")
    raise UserError(f"--resume_from_checkpoint {wanted}: there is no whole training state in {where}")


def check_resume_compatible(state: State, options: Mapping[str, Any], data: Mapping[str, str], allowed: bool) -> None:
    """Lists what differs from the run that was saved; raises UserError unless that is allowed.

    Raises it too where the run has taken more steps than it is now to take.
    """
    if state.step > options["max_train_steps"]:
        raise UserError(f"{state.path} is of step {state.step}, past --max_train_steps {options['max_train_steps']}")
    changes = [
        *_differences(state.facts["options"], options, "--"),
        *_differences(state.facts["data"], data, "clip "),
    ]
    if not changes:
        return
    more = [f"and {len(changes) - CHANGES_SHOWN} more"] if len(changes) > CHANGES_SHOWN else []
    listed = "\n".join(f"  {line}" for line in changes[:CHANGES_SHOWN] + more)
    if not allowed:
        raise UserError(f"this is not the run that was saved:\n{listed}\npass --allow_changes to go on all the same")
    print(f"going on with changes:\n{listed}")


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], mark: str) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *now]):
        if name in HARMLESS or saved.get(name) == now.get(name):
            continue
        if name not in saved or name not in now:
            yield f"{mark}{name} is {'new' if name not in saved else 'gone'}"
        elif mark == "--":
            yield f"{mark}{name} was {saved[name]}, is {now[name]}"
        else:
            yield f"{mark}{name} has changed"

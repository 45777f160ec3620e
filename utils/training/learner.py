"""What learns: trainables with their optimizers, and the learner made of them, which can be saved and restored.

A trainable is one set of parameters that is updated together and becomes one file: a LoRA, one expert's LoRA, a
student or its critic, a whole model. A run may have several; they share one random state and one count of steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.common.errors import RunError, UserError
from utils.common.temp_rng import temp_rng
from utils.training.ema import Ema, average_dtype
from utils.training.optim import Updater
from utils.training.optimizers import OptimizerSpec, groups_of

WATCHED_STEP = 10  # by now every matrix of an adapter must have moved

StateDict = dict[str, Any]  # nested; leaves are tensors, numbers and strings


class Adapter(Protocol):
    """What can be trained: parameters by name, a file made of them, and a sentence about them."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    def export(self, path: Path, values: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Writes the file with these values for the parameters; `facts` go into its metadata. Raises OSError."""

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Update:
    """What an update reports: the gradient's norm before clipping, on its device, and the rate it was made with."""

    grad_norm: Tensor
    learning_rate: float


class Trainable:
    """An adapter with its optimizer, schedule and average; `name` tells its files from those of others.

    One that is not `exported`, such as a critic, becomes no file of its own: it is in the state alone.
    """

    def __init__(
        self, name: str, adapter: Adapter, spec: OptimizerSpec, ema_decay: float = 0.0, exported: bool = True
    ) -> None:
        self.name = name
        self.exported = exported
        self.adapter = adapter
        self.updater = Updater(groups_of(adapter.parameters, spec), spec)
        self.ema = Ema(adapter.parameters, ema_decay) if ema_decay else None

    def step(self, max_grad_norm: float) -> Update:
        """Clips, updates, moves the average. Raises RunError where a matrix is zero after WATCHED_STEP updates."""
        learning_rate = self.updater.learning_rate
        norm = self.updater.step(max_grad_norm)
        if self.ema is not None:
            self.ema.update(self.updater.step_count)
        if self.updater.step_count == WATCHED_STEP:
            self._check_learning()
        return Update(norm, learning_rate)

    def export(self, path: Path, facts: Mapping[str, str], average: bool = False) -> None:
        """Writes what has been learned, or its average. Reads copies: the parameters keep their values throughout."""
        if average and self.ema is None:
            raise ValueError(f"{self.name} has no average")
        values = self.ema.values if average and self.ema is not None else self.updater.values()
        self.adapter.export(path, values, facts)

    def _check_learning(self) -> None:
        zero = int(torch.stack([(parameter == 0).all() for parameter in self.adapter.parameters.values()]).sum())
        if zero:
            raise RunError(
                f"after {WATCHED_STEP} updates {zero} matrices of the {self.name} are still zero: it does not learn\n"
                f"is --learning_rate{'' if self.exported else '_critic'} zero, or too small?"
            )

    def state_dict(self) -> StateDict:
        parameters = {name: parameter.detach() for name, parameter in self.adapter.parameters.items()}
        state: StateDict = {"parameters": parameters, "optimizer": self.updater.state_dict()}
        return state if self.ema is None else state | {"ema": dict(self.ema.values)}

    def check_state_dict(self, saved: StateDict) -> None:
        """Raises UserError where `load_state_dict` could not restore this; changes nothing."""
        if not saved.keys() <= {"parameters", "optimizer", "ema"}:
            raise UserError(f"its {self.name} holds something unknown, {', '.join(saved)}")
        parameters = self.adapter.parameters
        self._check_values(saved["parameters"], {name: p.dtype for name, p in parameters.items()})
        if "ema" in saved:
            self._check_values(saved["ema"], {name: average_dtype(p) for name, p in parameters.items()})
        self.updater.check_state_dict(saved["optimizer"])

    def _check_values(self, values: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        """Raises UserError where these are not finite values of this adapter's parameters, in these dtypes."""
        shapes = {name: parameter.shape for name, parameter in self.adapter.parameters.items()}
        if {name: value.shape for name, value in values.items()} != shapes:
            raise UserError("it is of another adapter: rank and targets must be those it was saved with")
        for name, value in values.items():
            if value.dtype != dtypes[name]:
                raise UserError(
                    f"its values of {name} are {value.dtype}, those of this run {dtypes[name]}: "
                    "--adapter_dtype must be the one it was saved with"
                )
            if not value.isfinite().all():
                raise UserError(f"its values of {name} are not finite: the file is damaged")

    @torch.no_grad()
    def load_state_dict(self, saved: StateDict) -> None:
        """Restores what `state_dict` returned. An average that was not saved starts from the parameters."""
        for name, parameter in self.adapter.parameters.items():
            parameter.copy_(saved["parameters"][name])
        if self.ema is not None:
            for name, value in self.ema.values.items():
                value.copy_(_averages(saved)[name])
        self.updater.load_state_dict(saved["optimizer"])


class Learner:
    """Everything that changes while training. `step` counts whole steps: all updates that belong to one."""

    def __init__(self, trainables: Sequence[Trainable]) -> None:
        self.trainables = {trainable.name: trainable for trainable in trainables}
        self.step = 0
        self._planned = self._remaining = 0  # updates of the current step
        self._is_updating = False
        self._capture_rng_state()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for trainable in self.trainables.values() for p in trainable.adapter.parameters.values()]

    @property
    def exported(self) -> dict[str, Trainable]:
        """Those that become files, by name."""
        return {name: trainable for name, trainable in self.trainables.items() if trainable.exported}

    def begin_step(self, num_updates: int = 1) -> None:
        """Opens a step of so many updates. One that is interrupted before its first update is repeated by a resume.

        It is repeated with the random state that the step before it left: between steps nothing is drawn from it.
        """
        self._planned = self._remaining = num_updates

    def update(self, name: str, max_grad_norm: float) -> Update:
        """Updates a trainable from its gradients; the last update of a step completes it."""
        self._is_updating = True
        update = self.trainables[name].step(max_grad_norm)
        self._remaining -= 1
        if self._remaining == 0:
            self.step += 1
            self._capture_rng_state()
        self._is_updating = False
        return update

    @property
    def is_whole(self) -> bool:
        """Whether no step is half done: what would be saved now is the outcome of `step` whole steps."""
        return not self._is_updating and self._remaining in (0, self._planned)

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """A span in which the parameters have the values that are exported; afterwards they are as before."""
        with ExitStack() as stack:
            for trainable in self.trainables.values():
                stack.enter_context(trainable.updater.using_values())
            yield

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """A span after which all of this is as it was before, bit for bit: also counts, and torch's random states."""
        saved = _copied(self.state_dict())
        with temp_rng(0):
            try:
                yield
            finally:
                for parameter in self.parameters:
                    parameter.grad = None
                self.load_state_dict(saved)

    def _capture_rng_state(self) -> None:
        self._random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            self._random["cuda"] = torch.cuda.get_rng_state()

    def state_dict(self) -> StateDict:
        trainables = {name: trainable.state_dict() for name, trainable in self.trainables.items()}
        return {"step": self.step, "trainables": trainables, "random": dict(self._random)}

    def load_state_dict(self, saved: StateDict) -> None:
        """Restores what `state_dict` returned. Raises UserError, before anything changes, where it does not fit."""
        if not saved.keys() <= {"step", "trainables", "random"}:
            raise UserError(f"it holds something unknown, {', '.join(saved)}")
        if saved["trainables"].keys() != self.trainables.keys():
            names = ", ".join(saved["trainables"]), ", ".join(self.trainables)
            raise UserError("it holds {}, this run trains {}".format(*names))
        for name, trainable in self.trainables.items():
            trainable.check_state_dict(saved["trainables"][name])
        _check_rng_state(saved["random"])
        for name, trainable in self.trainables.items():
            trainable.load_state_dict(saved["trainables"][name])
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["random"]["cuda"])
        self.step = saved["step"]
        self._planned = self._remaining = 0
        self._capture_rng_state()


def _copied(tree: StateDict) -> StateDict:
    """The same tree with copies of its tensors, in main memory."""
    copies: StateDict = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            copies[key] = _copied(value)
        else:
            copies[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    return copies


def _averages(saved: StateDict) -> Mapping[str, Tensor]:
    """The averages of a saved trainable; the parameters where it kept none."""
    averages: Mapping[str, Tensor] = saved["ema"] if "ema" in saved else saved["parameters"]
    return averages


def _check_rng_state(random: Mapping[str, Tensor]) -> None:
    """Raises UserError where a generator does not take its saved state."""
    try:
        torch.Generator().set_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.Generator("cuda").set_state(random["cuda"])
    except (KeyError, RuntimeError, TypeError):
        raise UserError("it holds no valid random state: the file is damaged") from None

"""Everything that a run needs to be resumed exactly, in one safetensors file per checkpoint.

    <run>/checkpoints/state-00000100.safetensors       beside wan-lora-00000100.safetensors

Its tensors are those of `Learner.state_dict`, named by their path in it ("trainables/lora/parameters/<name>"). Its
metadata holds the rest as JSON ("facts") and a SHA-256 over both, so that a damaged file is found before it is used.
Nothing that a file says is trusted: types and shapes are checked, here and by the learner, before anything is changed.

Format 2, of version 0.2, has the means of a single phase beside the other metrics. Version 0.1 wrote `adapter.<name>`,
`exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`, `ema.<name>` and `random.<device>` without a checksum. Files of
both are read too.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from utils.common.checkpoint_names import CHECKPOINTS, LORA, STATES, Checkpoint, parse_name
from utils.common.console import say
from utils.common.decisions import DEVICE, Decisions
from utils.common.device import describe
from utils.common.errors import UserError
from utils.common.formatting import counted
from utils.common.options import training_differences
from utils.common.tensor_files import TensorFileError, file_metadata, read_tensors, write_tensors
from utils.runs.metrics import ORDINARY, Means, SavedMetrics
from utils.training.few_step import CRITIC
from utils.training.learner import Learner, StateDict

FACTS, CHECKSUM = "facts", "sha256"
FORMAT = 3
COUNTS = ("bad_steps", "validated_at")
MEANS = {field.name for field in fields(Means)}
FORMER_MEANS = MEANS - {"limit"}  # of version 0.2, and of the first states of format 3
CHANGES_SHOWN = 20


@dataclass(frozen=True)
class Facts:
    """What decides a run besides its learner: options that affect training, clips' fingerprints, and `Decisions`.

    `base` has what is trained on by content, a hash for each transformer and each fused LoRA; states of earlier
    versions have none.
    """

    options: dict[str, Any]
    data: dict[str, str]
    decided: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A state file whose facts have been read and checked; its tensors are read when they are asked for."""

    path: Path
    step: int
    facts: Facts
    metrics: SavedMetrics
    learner: StateDict | None  # without its tensors; None in a file of version 0.1

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent

    @property
    def steps_taken(self) -> dict[str, int]:
        """The updates that each trainable has had, by its name."""
        if self.learner is None:
            return {LORA: self.step}
        return {name: saved["optimizer"]["step_count"] for name, saved in self.learner["trainables"].items()}

    def state_dict(self) -> StateDict:
        """What `Learner.load_state_dict` takes. Raises UserError for a damaged file."""
        tensors, _ = _read(self.path)
        return _join(self.learner, tensors) if self.learner is not None else _from_0_1(tensors, self.step)

    def restore(self, learner: Learner) -> None:
        """Puts the learner where it was. Raises UserError, before anything changes, where the state does not fit."""
        try:
            learner.load_state_dict(self.state_dict())
        except UserError as error:
            raise UserError(f"{self.path} cannot be resumed: {error}") from None
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{self.path} cannot be resumed: it lacks or misplaces {error}") from None


def write_state(path: Path, learner: StateDict, facts: Facts, metrics: SavedMetrics) -> None:
    """Writes the file whole or not at all. Raises TensorFileError."""
    tensors: dict[str, Tensor] = {}
    tree = _split(learner, "", tensors)
    content = {"format": FORMAT, **asdict(facts), "metrics": metrics, "learner": tree}
    text = json.dumps(content)
    write_tensors(path, tensors, {FACTS: text, CHECKSUM: _checksum(tensors, text)})


def read_state(path: Path) -> State:
    """A state file, read whole once so that damage is found early. Raises UserError for any other file."""
    tensors, metadata = _read(path)
    try:
        content = json.loads(metadata[FACTS])
        if "format" not in content:
            say(f"{path} was written by version 0.1, without a checksum: it is read unverified")
            content = _facts_of_0_1(content)
        elif content["format"] == 2:
            content["metrics"] = _metrics_of_one_phase(content["metrics"])
        elif content["format"] != FORMAT:
            raise UserError(f"{path} has the state format {content['format']!r}: it was written by a newer version")
        step = content["learner"]["step"] if content["learner"] else content["step"]
        _check_facts(content, step)
        facts = Facts(content["options"], content["data"], content.get("decided", {}), content.get("base", {}))
        state = State(path, step, facts, content["metrics"], content["learner"])
        if not all(_is_count(count) for count in state.steps_taken.values()):
            raise ValueError("step_count")
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        named = parse_name(path.name)
        if named is not None and named.trainable is not None:
            beside = path.with_name(Checkpoint(named.step).name)
            there = str(beside) if beside.exists() else f"one in {path.parent}; {beside.name} has been removed"
            raise UserError(f"{path} is a LoRA, and a run resumes from a state: give {there}") from None
        reason = f"missing or invalid {error}" if str(error) else type(error).__name__
        raise UserError(f"{path} is not a training state ({STATES}): {reason}") from None
    return state


def find_state(wanted: str, output_dir: Path) -> State:
    """The state that `--resume_from_checkpoint` means; unusable ones are skipped with a message.

    "latest" is the last state of the run under `output_dir` that was trained last; else a state file, or the last state
    of a run's folder or checkpoints folder. Raises UserError where there is none.
    """
    where = output_dir if wanted == "latest" else Path(wanted)
    if where.is_file():
        state = read_state(where.absolute())
        if state.path.parent.name != CHECKPOINTS:
            raise UserError(f"{where} must be in the checkpoints folder of its run: the run is resumed there")
        return state
    if wanted == "latest":
        runs = [list(folder.glob(STATES)) for folder in where.glob(f"*/{CHECKPOINTS}")]
    else:
        runs = [[*where.glob(STATES), *where.glob(f"{CHECKPOINTS}/{STATES}")]]
    for path in _from_last_to_first(runs):
        try:
            return read_state(path)
        except UserError as error:
            say(f"skipped: {error}")
    absent = "" if wanted == "latest" or where.exists() else ": it does not exist; give latest, or the folder of a run"
    raise UserError(f"--resume_from_checkpoint {wanted}: there is no usable training state in {where}{absent}")


def _from_last_to_first(runs: Iterable[Iterable[Path]]) -> Iterator[Path]:
    """State files: those of a run by step, whatever the times of its files; the runs by the time of their last state.

    A run is dated by that state and not by its folder's name, because it may have been resumed later.
    """
    ordered = [sorted(paths, key=_place_in_run, reverse=True) for paths in runs]
    dated = [(next(filter(None, map(_time, paths)), 0), str(paths[0]), paths) for paths in ordered if paths]
    for *_, paths in sorted(dated, reverse=True):
        yield from paths


def _place_in_run(path: Path) -> tuple[int, bool, int]:
    """The order of a run's states: by step; of a copy and the file that the run has written, that file is last."""
    named = parse_name(path.name)
    try:
        content = json.loads(file_metadata(path)[FACTS])
        step = int(content["learner"]["step"] if content.get("learner") else content["step"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        # A damaged one is tried, and reported, in the place that its name claims.
        step = named.step if named else -1
    return step, named is not None, _time(path)


def _time(path: Path) -> int:
    """When a file was written, in ns; 0 for a link to nothing, and for a file that has just been removed."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def decisions_of(state: State | None, device: torch.device, changes_allowed: bool) -> Decisions:
    """Those of the run that is resumed, or none yet."""
    now = describe(device)
    if state is None:
        return Decisions(now)
    saved = state.facts.decided
    before = saved.get(DEVICE, now)
    # Earlier versions knew one dtype for each kind of device, and their states do not name it.
    dtype = "fp32" if before == describe(torch.device("cpu")) else "bf16"
    return Decisions(now, {DEVICE: before, "weight_dtype": dtype, **saved}, changes_allowed)


def check_resume_compatible(
    state: State,
    options: Any,
    data: Mapping[str, str],
    allowed: bool,
    steps: Mapping[str, int],
    base: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Lists what differs from the run that was saved; raises UserError unless that is allowed.

    `steps` are those that each trainable of this run takes. Raises it too where the saved run trained others, or has
    taken more steps with one of them.
    """
    _check_steps(state, steps)
    before = _with_decisions(state.facts, options)
    changes = [*training_differences(before, options), *_data_changes(state.facts.data, data)]
    both = [name for name, digest in base.items() if state.facts.base.get(name, digest) != digest]
    changes += [f"{name} has another content: its hash was {state.facts.base[name]}, is {base[name]}" for name in both]
    if not changes:
        return
    more = [f"and {len(changes) - CHANGES_SHOWN} more"] if len(changes) > CHANGES_SHOWN else []
    listed = "\n".join(f"  {line}" for line in changes[:CHANGES_SHOWN] + more)
    if not allowed:
        raise UserError(f"options or data differ from the saved run:\n{listed}\npass --allow_changes to resume anyway")
    say(f"resuming with changes:\n{listed}")


def _with_decisions(facts: Facts, options: Any) -> dict[str, Any]:
    """The saved options. One that left a decision to the machine has its outcome, where that is what is given now."""
    same = {name: value for name, value in facts.decided.items() if getattr(options, name, None) == value}
    return {name: same.get(name, value) if value == "auto" else value for name, value in facts.options.items()}


def _check_steps(state: State, steps: Mapping[str, int]) -> None:
    """Raises UserError where this run trains others than the saved one, or where one has taken more steps already.

    A critic takes every step, and is asked first: its student takes some of them.
    """
    taken = state.steps_taken
    if others := taken.keys() ^ steps.keys():
        which = "--few_step" if all(name.endswith(CRITIC) for name in others) else "--expert"
        raise UserError(f"{state.path} holds {', '.join(taken)}, this run trains {', '.join(steps)}: see {which}")
    distils = any(name.endswith(CRITIC) for name in taken)
    for name, count in sorted(taken.items(), key=lambda each: not each[0].endswith(CRITIC)):
        if count <= steps[name]:
            continue
        own = name.removesuffix(CRITIC).removesuffix("_") or LORA
        whose = "this run" if own == LORA else f"the {own} expert in this run"
        if distils and own == name:
            total = counted(steps[name], "update")
            raise UserError(f"{state.path} is past the {total} of the LoRA of {whose}: lower --gen_update_interval")
        total = counted(steps[name], "step")
        raise UserError(f"{state.path} is of step {count}, past the {total} of {whose}: raise {_length_of(own)}")


def _length_of(trainable: str) -> str:
    """The options that say how long it is trained."""
    own = "" if trainable == LORA else f", or --{trainable.removesuffix('_noise')}_max_train_steps"
    return f"--max_train_steps{own}"


# ------------------------------------------------------------------------------------------------------------ the file


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises UserError for a file that is missing, cut short, damaged or no safetensors."""
    try:
        tensors, metadata = read_tensors(path)
    except TensorFileError as error:
        raise UserError(f"{path} is not a whole training state: {error}") from None
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, metadata.get(FACTS, "")):
        raise UserError(f"{path} is damaged: its checksum does not match")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes of all tensors, and of the text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split(tree: StateDict, prefix: str, tensors: dict[str, Tensor]) -> StateDict:
    """The tree without its tensors, which go to `tensors` by their paths, on the CPU."""
    rest: StateDict = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach().cpu().contiguous()
        else:
            rest[key] = _split(value, f"{prefix}{key}/", tensors) if isinstance(value, dict) else value
    return rest


def _join(tree: StateDict, tensors: Mapping[str, Tensor]) -> StateDict:
    """The tree with its tensors: what `_split` was given."""
    whole: StateDict = json.loads(json.dumps(tree))
    for path, tensor in tensors.items():
        *parents, name = path.split("/")
        place = whole
        for parent in parents:
            place = place[parent]
        place[name] = tensor
    return whole


# ----------------------------------------------------------------------------------------------------------- its facts


def _check_facts(content: Mapping[str, Any], step: object) -> None:
    """Raises ValueError, TypeError or KeyError where a fact is not of its type."""
    if not _is_count(step):
        raise ValueError("step")
    if not isinstance(content["options"], dict) or not isinstance(content["data"], dict):
        raise TypeError("options or data")
    for name in ("decided", "base"):
        table = content.get(name, {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise TypeError(name)
    if not all(isinstance(value, str) for value in content["data"].values()):
        raise TypeError("data")
    metrics = content["metrics"]
    if metrics.keys() != {*COUNTS, "means"} or not _is_count(metrics["bad_steps"]):
        raise ValueError("metrics")
    if not isinstance(metrics["validated_at"], int) or not isinstance(metrics["means"], dict):
        raise TypeError("metrics")
    for means in metrics["means"].values():
        if means.keys() not in (MEANS, FORMER_MEANS) or not all(_is_finite(value) for value in means.values()):
            raise ValueError("metrics")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _metrics_of_one_phase(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Today's form of metrics from before there were several phases."""
    if metrics.keys() != {*COUNTS, *FORMER_MEANS}:
        raise ValueError("metrics")
    means = {ORDINARY: {name: metrics[name] for name in FORMER_MEANS}}
    return {name: metrics[name] for name in COUNTS} | {"means": means}


def _facts_of_0_1(content: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: content[name] for name in ("bad_steps", *FORMER_MEANS)}
    metrics["validated_at"] = content["step"]  # whatever was due came before the state
    facts = {name: content[name] for name in ("step", "options", "data")}
    return facts | {"metrics": _metrics_of_one_phase(metrics), "learner": None}


def _from_0_1(tensors: Mapping[str, Tensor], step: int) -> StateDict:
    """The state dict of a learner with one LoRA, from the tensors of version 0.1."""
    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("adapter", "ema", "random")}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, parameter = name.partition(".")
        if kind in groups:
            groups[kind][parameter] = tensor
        else:
            moments.setdefault(parameter, {})[kind] = tensor
    state = {name: moments.pop(name, {}) for name in groups["adapter"]}
    if moments:
        raise UserError(f"it has an optimizer state of an unknown parameter, {next(iter(moments))}")
    lora: StateDict = {"parameters": groups["adapter"]}
    lora["optimizer"] = {"step_count": step, "state": state, "groups": []}
    if groups["ema"]:
        lora["ema"] = groups["ema"]
    return {"step": step, "trainables": {"lora": lora}, "random": groups["random"]}


def _data_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *now]):
        if name not in saved or name not in now:
            yield f"clip {name} is {'new' if name not in saved else 'gone'}"
        elif saved[name] != now[name]:
            yield f"clip {name} has changed"

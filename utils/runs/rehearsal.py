"""All that a run will do, once, before the first step: what does not fit or fails is found now, and not after hours.

The largest batch goes through the model, forward and backward, before an update and after it; then the largest
validation clip, a preview and a checkpoint. The state is restored: the run is the same, bit for bit, as without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from tqdm import tqdm

from utils.common.console import say
from utils.common.decisions import Decisions
from utils.common.device import doing
from utils.common.errors import RunError
from utils.common.temp_rng import temp_rng
from utils.encoding.conditioning import Batch
from utils.runs.run import RunSettings, write_checkpoint
from utils.runs.session import Session
from utils.training.checkpoint_plan import AUTO, CheckpointPlan, Room
from utils.training.learner import Learner
from utils.training.phases import Phase, TrainingOptions
from utils.training.room import measure_room

LESS = 0.1  # of the room, where it was less than measured
ROOM = "room"  # what the decision is called


def rehearse_run(
    session: Session, opts: TrainingOptions, save: Callable[[], object], decisions: Decisions | None, spare: float
) -> None:
    """Does everything once that the loop will do, as large as it will be; for --benchmark only steps.

    `decisions` and `spare` as in `rehearse_step`; `save` writes a checkpoint somewhere.
    """
    learner, phases = session.learner, session.schedule.phases
    batch = session.samples.load_batch(session.plan.largest_batch)
    largest = max(phases, key=lambda phase: sum(parameter.numel() for parameter in _trained(phase)))
    accumulates = opts.gradient_accumulation > 1
    step = partial(rehearse_step, largest, batch, session.kept, learner, decisions, spare, accumulates)
    parts: dict[str, Callable[[], object]] = {"training": step}
    if session.validation and not opts.benchmark:
        clip = max(session.validation, key=lambda clip: clip.latents.numel()).to(session.experts.device)
        for phase in phases:
            whose = f" the {phase.name} expert" * (len(phases) > 1)
            brief = replace(phase, sigmas=phase.sigmas[:1])
            parts[f"validating{whose}"] = partial(session.validate_phase, brief, [clip], 0)
    if session.preview is not None and not opts.benchmark:
        parts["generating a preview"] = partial(session.show, session.preview.in_brief())
    if not opts.benchmark:
        parts["saving"] = save
    _held = session.samples.hold(session.plan.largest_batch)  # the next batch may be encoded during any of them
    rehearse(learner, parts)


def rehearse(learner: Learner, parts: Mapping[str, Callable[[], object]]) -> None:
    """Does each part, by what it is: "validating". The learner is as it was before.

    Says how much GPU memory was taken at the peak.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    progress = tqdm(parts.items(), "rehearsing with the largest batch", unit="part", leave=False)
    with learner.unchanged():
        for what, part in progress:
            with doing(f"{what}, before the first step"):
                part()
    if torch.cuda.is_available():
        say(f"rehearsed: tensors took {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory at the peak")


def rehearse_step(
    phase: Phase,
    batch: Batch,
    plan: CheckpointPlan,
    learner: Learner,
    decisions: Decisions | None,
    spare: float = 0.0,
    accumulates: bool = False,
) -> None:
    """A step and the pass of the next one, after settling an open plan by the room that there is.

    The room is one of the `decisions` where these are given: compiled blocks round differently under another plan.
    `spare` is the share of it that is left unused. `accumulates`: whether a pass is made while all gradients exist.
    """
    updaters = [trainable.updater for trainable in learner.trainables.values()]

    def run() -> None:
        with temp_rng(0):  # what is measured is what is tried then
            phase.loss(batch).value.backward()

    def run_alone() -> None:
        _drop_gradients(_trained(phase))
        run()

    def measure() -> Room:
        room = measure_room(phase.model, run_alone, sum(updater.bytes_of_first_step() for updater in updaters))
        return replace(room, free=int(room.free * (1 - spare)))

    learner.begin_step()
    with phase.speaking():
        if plan.is_open:
            plan.settle(measure() if decisions is None else _kept_room(decisions, measure))
            say(plan.describe(batch.tokens(phase.model.shape.patch_size)))
        _run_with_less(run_alone, phase, plan)
        if accumulates:
            run()
        phase.step()
        # From the second step on there are the optimizer's moments, also those of other LoRAs.
        known = {id(parameter) for parameter in _trained(phase)}
        idle = [updater for updater in updaters if id(updater.parameters[0]) not in known]
        others = sum(updater.bytes_of_first_step() for updater in idle)
        _moments = torch.empty(others, dtype=torch.uint8, device=batch.latents.device)
        _run_with_less(run_alone, phase, plan)
    if decisions is not None and plan.room is not None:
        decisions.record(ROOM, str(plan.room))


def rehearse_saving(learner: Learner, settings: RunSettings, folder: Path) -> None:
    """Writes a checkpoint into a folder, and removes it. Raises RunError as `Run.save` does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="rehearsal-", dir=folder) as place:
            write_checkpoint(Path(place), learner, settings, {"bad_steps": 0, "validated_at": -1, "means": {}})
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None


def _kept_room(decisions: Decisions, measure: Callable[[], Room]) -> Room:
    """The room of the run that is resumed, or what is measured now."""

    def is_room(text: str) -> bool:
        try:
            Room.parse(text)
        except ValueError:
            return False
        return True

    return Room.parse(decisions.take(ROOM, lambda: str(measure()), is_room, "what blocks keep"))


def _trained(phase: Phase) -> list[nn.Parameter]:
    """Those of the adapter that answers."""
    return [parameter for parameter in phase.model.parameters() if parameter.requires_grad]


def _drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _run_with_less(run: Callable[[], None], phase: Phase, plan: CheckpointPlan) -> None:
    """Runs a step as it will be. Where memory is full, blocks keep less, as long as that is possible.

    Each try begins with the expert of the phase on the device: a failed one may have left another there.
    """
    while True:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with phase.speaking():
                return run()
        except torch.OutOfMemoryError:
            if plan.strategy != AUTO or not plan.settle_for_less(LESS):
                raise
        say("that was too much: the blocks keep less")

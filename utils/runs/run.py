"""One training run: its folder, its learner, its metrics, and when its checkpoints are written."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from utils.adapters.lora_file import LoraError
from utils.adapters.lora_header import EXPERT_KEY
from utils.adapters.model_card import ModelCard, model_card, unheard
from utils.common.checkpoint_names import (
    CHECKPOINTS,
    DEFAULT_NAME,
    EXPERTS,
    Checkpoint,
    check_name,
    check_name_of_pairs,
)
from utils.common.console import say
from utils.common.errors import RunError, UserError
from utils.common.options import option
from utils.common.run_options import options_name
from utils.common.tensor_files import TensorFileError
from utils.data.scan import Source
from utils.media.thumbnail import thumbnail
from utils.runs.folder import archive_later_files, day_of, names_used, new_folder, prune
from utils.runs.metrics import SAMPLES, Metrics, SavedMetrics
from utils.runs.state import Facts, State, write_state
from utils.setup.sharing import EVERYTHING, STANDARD
from utils.training.learner import Learner
from wan.configs import Family


@dataclass(frozen=True)
class RunOptions:
    """run and checkpoints"""

    output_dir: Path = option(Path("outputs"), "where each run gets its own dated folder", affects_training=False)
    name: str = option(DEFAULT_NAME, "what the LoRA files are called, before their step", affects_training=False)
    trigger: str | None = option(
        None,
        "words that call the LoRA, separated by commas, for programs that list LoRAs; no caption gets them",
        affects_training=False,
    )
    metadata: str = option(
        STANDARD,
        "what LoRA files say of their run; full: all options too, with their paths and prompts",
        choices=(STANDARD, EVERYTHING),
        affects_training=False,
    )
    resume_from_checkpoint: str | None = option(
        None, "resume from 'latest', a run folder or a state file", affects_training=False, is_path=True
    )
    allow_changes: bool = option(
        False,
        "resume although options or data have changed",
        requires="resume_from_checkpoint",
        affects_training=False,
    )

    checkpointing_steps: int = option(
        100, "write the LoRA and the resumable state every N steps", minimum=1, affects_training=False
    )
    save_every_minutes: float = option(
        0.0, "also write them when N minutes have passed; 0: never", minimum=0, affects_training=False
    )
    save_every_epochs: int = option(0, "also write them every N epochs; 0: never", minimum=0, affects_training=False)
    keep_checkpoints: int = option(
        0, "keep the newest N; 0: every LoRA, and the newest two states", minimum=0, affects_training=False
    )

    def check_names(self) -> None:
        """Raises UserError for a --name that no file can have, and for a --trigger without a word."""
        check_name(self.name)
        if self.trigger is not None and not self.trigger.strip(" ,"):
            raise UserError("--trigger is empty: give the words that call the LoRA, or leave it out")

    def say_unheard(self, sources: Sequence[Source]) -> None:
        """Says which words of the trigger no caption holds."""
        for word in unheard(self.trigger or "", (text for source in sources for text in source.captions)):
            say(f"note: no caption holds the trigger {word!r}, so it is not learnt: see --caption_prefix")

    def check_name_for(self, family: Family) -> None:
        """Raises UserError for a --name that would hide which expert of this family a file is for."""
        if family.boundaries:
            check_name_of_pairs(self.name)


class Run:
    """A folder, a learner, and the metrics of what it does.

    `last_saved_files` are the LoRAs of the last checkpoint, one for each that is exported; empty where none was
    written.
    """

    def __init__(self, folder: Path, learner: Learner, metrics: Metrics, settings: "RunSettings") -> None:
        self.folder = folder
        self.learner = learner
        self.metrics = metrics
        self.settings = settings
        self.checkpoints = folder / CHECKPOINTS
        files = [settings.file_of(self.step, name).find(self.checkpoints) for name in learner.exported]
        self.last_saved_files = [] if None in files else [path for path in files if path is not None]
        self._saved_step = self.step if self.last_saved_files else None
        self._saved_at = time.monotonic()
        self._picture, self._pictured_step = "", -1

    @property
    def step(self) -> int:
        """The number of whole steps that the learner has taken."""
        return self.learner.step

    def is_due(self, every: int) -> bool:
        """Whether this step is the last one or a multiple of `every`, 0 included; an `every` of 0 means never."""
        return self.step == self.settings.total_steps or (every > 0 and self.step % every == 0)

    def saving_is_due(self, *every: int, minutes: float) -> bool:
        """Whether this step is not saved yet, and is due by one of the periods, or so many minutes have passed.

        0 minutes mean never.
        """
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        return self.step not in (0, self._saved_step) and (late or any(map(self.is_due, every)))

    def log_previews(self, videos: Sequence[tuple[str, Tensor]], fps: float) -> None:
        """Writes previews as `Metrics.log_previews` does. A checkpoint of this step shows the first of them."""
        if videos:
            self._picture, self._pictured_step = thumbnail(videos[0][1]), self.step
        self.metrics.log_previews(videos, fps)

    def save(self) -> list[Path]:
        """Writes what is exported of what was learned, its average, and the state from which the run can be resumed.

        Returns the files of what was learned, without averages and state. The state comes last: where there is one, the
        rest is whole. Raises RunError where the disk refuses, and for values that are not finite.
        """
        self.metrics.flush()  # the state holds what is known of the loss
        shown = Shown(day_of(self.folder), self._picture if self._pictured_step == self.step else "")
        self.last_saved_files = write_checkpoint(
            self.checkpoints, self.learner, self.settings, self.metrics.state_dict(), shown
        )
        self.metrics.say(f"step {self.step}: saved {_listed(self.last_saved_files)}")
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self.metrics.restart_clock()
        return self.last_saved_files

    def prune(self, keep: int) -> None:
        """Removes all checkpoints but the newest `keep`, as `utils.runs.folder.prune` says."""
        prune(self.checkpoints, keep, self.settings.name)

    def failure(self, reason: object) -> RunError:
        """The error that ends this run, with what is left of it."""
        last = self.last_saved_files
        kept = f"the last checkpoint is {_listed(last)}" if last else "no checkpoint was written yet"
        return RunError(f"{reason}\n{kept}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind in (None, KeyboardInterrupt):  # after an error the device may not answer
            self.metrics.flush()
        self.metrics.close()


@dataclass(frozen=True)
class RunSettings:
    """What is decided before a run begins.

    `facts` go into its states, `about` and what `card` says into the metadata of exported files.
    """

    output_dir: Path
    total_steps: int
    max_grad_norm: float
    options_json: str
    facts: Facts
    about: Mapping[str, str]
    card: ModelCard
    name: str = DEFAULT_NAME

    def file_of(self, step: int, trainable: str, average: bool = False) -> Checkpoint:
        """The file of a trainable."""
        return Checkpoint(step, trainable, average, self.name)


@dataclass(frozen=True)
class Shown:
    """What the files of a checkpoint show of their run: the day that it began, and a preview of this step, or ""."""

    day: str = ""
    picture: str = ""


NOTHING_SHOWN = Shown()


def write_checkpoint(
    folder: Path, learner: Learner, settings: RunSettings, metrics: SavedMetrics, shown: Shown = NOTHING_SHOWN
) -> list[Path]:
    """Writes what `Run.save` says to a folder, and returns what it returns. Raises RunError as it does."""
    written = []
    try:
        for name, trainable in learner.exported.items():
            about = {"steps": str(learner.step), **settings.about} | ({EXPERT_KEY: name} if name in EXPERTS else {})
            for average in (False, True) if trainable.ema else (False,):
                file = settings.file_of(learner.step, name, average)
                # Previews are made with what was learned: they do not show the average.
                card = model_card(settings.card, file, shown.day, "" if average else shown.picture)
                trainable.export(folder / file.name, card | about, average)
            written.append(folder / settings.file_of(learner.step, name).name)
        write_state(folder / Checkpoint(learner.step).name, learner.state_dict(), settings.facts, metrics)
    except (TensorFileError, LoraError) as error:
        raise RunError(f"cannot write a checkpoint to {folder}: {error}") from None
    return written


def open_run(settings: RunSettings, learner: Learner, state: State | None = None) -> Run:
    """A new run in a dated folder of its own, or the one that `state` belongs to; the learner is restored from it.

    Raises UserError, before a file is touched, where the state does not fit, and RunError for a full disk.
    """
    if state is not None:
        state.restore(learner)
    folder = new_folder(settings.output_dir) if state is None else state.run_folder
    step = learner.step
    try:
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        if state is not None:
            names = names_used(folder) | {settings.name}
            archive_later_files(folder / CHECKPOINTS, folder / SAMPLES, step, names)
        (folder / options_name(None if state is None else step)).write_text(
            settings.options_json + "\n", encoding="utf-8"
        )
        left = "" if step < settings.total_steps else ": nothing is left to train"
        say(f"resuming {folder} at step {step} of {settings.total_steps}{left}" if state else f"writing to {folder}")
        metrics = Metrics(folder, settings.total_steps, step, settings.max_grad_norm)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    if state is not None:
        metrics.load_state_dict(state.metrics)
    return Run(folder, learner, metrics, settings)


def _listed(files: Sequence[Path]) -> str:
    """The first file's path and the others' names: they are in the same folder."""
    first, *others = files
    return " and ".join([str(first), *(path.name for path in others)])

"""The numbers of a run, on the console and in TensorBoard."""

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NotRequired, TypedDict

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.checkpoint_names import preview_name, sheet_name
from utils.common.errors import RunError
from utils.diffusion.objectives import Loss
from utils.media.contact_sheet import contact_sheet
from utils.media.frames import save_image, write_video
from utils.runs.tensorboard import TensorBoardLog
from utils.training.learner import Update
from utils.training.validation import Losses
from utils.training.variety import COLLAPSED

LOG_SECONDS = 1.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
SMOOTHING = 0.98
MAX_BAD_STEPS = 3
NO_NUMBERS: Mapping[str, float] = MappingProxyType({})
FEWEST = 20  # updates whose running mean says something
SAMPLES = "samples"  # the folder of previews
ORDINARY = "train"  # the phase of a run that has one


@dataclass(frozen=True)
class _Numbers:
    """What is known of an update, on its way to the host, which need not wait for it."""

    step: int
    phase: str
    learning_rate: float
    names: Sequence[str]
    values: Tensor  # on the CPU, one for each name
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, phase: str, learning_rate: float, named: Mapping[str, Tensor]) -> "_Numbers":
        names, values = [*named], torch.stack([*named.values()])
        if values.device.type != "cuda":
            return cls(step, phase, learning_rate, names, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, phase, learning_rate, names, host, arrived)

    def has_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def read(self) -> dict[str, float]:
        """By name; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


@dataclass(frozen=True)
class Means:
    """Exponential means over the updates of a phase. Dividing by `weight` corrects the bias of their start."""

    smooth: float = 0.0  # the loss
    weight: float = 0.0  # the sum of all weights so far, which approaches 1
    clipped: float = 0.0  # 1 for each update whose gradient was clipped, 0 for others
    limit: float = 0.0  # of the loss, where there is one
    below: float = 0.0  # 1 once the loss was below its limit

    def after(self, loss: float, grad_norm: float, max_grad_norm: float, limit: float = 0.0) -> "Means":
        """The means after one more update. `clipped` stays where no gradient is clipped (`max_grad_norm` 0)."""
        smooth = SMOOTHING * self.smooth + (1 - SMOOTHING) * loss
        weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        clipped = SMOOTHING * self.clipped + (1 - SMOOTHING) * (grad_norm > max_grad_norm)
        limit = SMOOTHING * self.limit + (1 - SMOOTHING) * limit
        is_known = weight > 1 - SMOOTHING ** (FEWEST - 0.5)
        below = 1.0 if is_known and smooth < limit else self.below
        return Means(smooth, weight, clipped if max_grad_norm else self.clipped, limit, below)

    @property
    def diverges(self) -> bool:
        """Whether the mean loss has risen above its limit, if it has one, from below it."""
        return bool(self.below) and 0 < self.limit < self.smooth

    @property
    def loss(self) -> float:
        """The mean loss; NaN before the first update."""
        return self.smooth / self.weight if self.weight else math.nan

    @property
    def clipped_share(self) -> float:
        """The mean share of clipped updates; NaN before the first update."""
        return self.clipped / self.weight if self.weight else math.nan


class SavedMetrics(TypedDict):
    """What a resumed run continues: updates in a row that were not finite, the last validated step, means by phase.

    `variety` is the largest that each student has had, as a share of its teacher's; earlier versions have none.
    """

    bad_steps: int
    validated_at: int
    means: dict[str, dict[str, float]]
    variety: NotRequired[dict[str, float]]


class Metrics:
    """Logs every step, but the host never waits for one to end: about once a second it reads what has arrived.

    Losses appear under the name of their phase ("train/loss"), and each phase has its own means: experts at other noise
    levels have other losses. `step` counts the steps that were logged.
    """

    def __init__(self, folder: Path, total_steps: int, step: int = 0, max_grad_norm: float = 0.0) -> None:
        self.folder = folder
        self.step = step
        self.max_grad_norm = max_grad_norm
        self.board = TensorBoardLog(folder, step, self.say)
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True, mininterval=interval, bar_format=BAR)
        self._pending: deque[_Numbers] = deque()
        self._means: dict[str, Means] = {}
        self._phase = ORDINARY  # of the update that was read last
        self._bad_steps: Counter[str] = Counter()  # of each phase, in a row
        self._variety: dict[str, float] = {}
        self._validated_at = -1
        self.restart_clock()

    def state_dict(self) -> SavedMetrics:
        means = {phase: asdict(means) for phase, means in self._means.items()}
        saved: SavedMetrics = {"bad_steps": self._bad_steps.total(), "validated_at": self._validated_at, "means": means}
        return {**saved, "variety": dict(self._variety)} if self._variety else saved

    def load_state_dict(self, saved: SavedMetrics) -> None:
        self._means = {phase: Means(**means) for phase, means in saved["means"].items()}
        self._bad_steps = Counter({next(iter(self._means), ORDINARY): saved["bad_steps"]})
        self._validated_at, self._variety = saved["validated_at"], dict(saved.get("variety", {}))

    @property
    def is_validated(self) -> bool:
        """Whether this step has been validated, perhaps before the run was interrupted."""
        return self._validated_at == self.step

    @property
    def has_previews(self) -> bool:
        """Whether this step has its previews, perhaps from before the run was interrupted."""
        return (self.folder / SAMPLES / sheet_name(self.step)).exists()

    def log(self, phase: str, loss: Loss, update: Update) -> None:
        """Notes an update of the step that is being taken."""
        named = {"loss": loss.value, "grad_norm": update.grad_norm, **loss.watched}
        named |= {} if loss.limit is None else {"loss_limit": loss.limit}
        self._pending.append(_Numbers.of(self.step + 1, phase, update.learning_rate, named))

    def end_step(self, tokens: int) -> None:
        """Counts a step.

        Raises RunError once loss or gradients were not finite several times in a row, and where a phase diverges.
        """
        self.step += 1
        self._tokens += tokens
        self._steps += 1
        self.bar.update()
        if time.perf_counter() - self._since >= LOG_SECONDS:
            self._write_arrived(wait=False)

    def flush(self) -> None:
        """Waits for the numbers of all steps and writes them. Raises RunError as `end_step` does."""
        self._write_arrived(wait=True)

    def _write_arrived(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].has_arrived()):
            numbers = self._pending.popleft()
            self._write_update(numbers, numbers.read())
        if self._steps:
            self._write_speed()

    def _write_update(self, numbers: _Numbers, values: Mapping[str, float]) -> None:
        step, phase, loss, grad_norm = numbers.step, numbers.phase, values["loss"], values["grad_norm"]
        self._phase = phase
        self.board.scalar(f"{phase}/learning_rate", numbers.learning_rate, step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped(numbers, loss, grad_norm)
            return
        self._bad_steps[phase] = 0
        limit = values.get("loss_limit", 0.0)
        means = self._means[phase] = self.means(phase).after(loss, grad_norm, self.max_grad_norm, limit)
        for name, value in values.items():
            self.board.scalar(f"{phase}/{name}", value, step)
        self.board.scalar(f"{phase}/loss_smooth", means.loss, step)
        if self.max_grad_norm:
            self.board.scalar(f"{phase}/clipped_share", means.clipped_share, step)
        if means.diverges:
            raise RunError(
                f"step {step}: the {phase} diverges: its mean loss is {means.loss:.3f}, and would be "
                f"{means.limit / means.weight:.3f} if it answered zero\ntry a lower learning rate for it"
            )

    def _skipped(self, numbers: _Numbers, loss: float, grad_norm: float) -> None:
        self._bad_steps[numbers.phase] += 1
        self.say(f"step {numbers.step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was skipped")
        if self._bad_steps.total() >= MAX_BAD_STEPS:  # a critic that learns does not make good for its student
            raise RunError(f"{MAX_BAD_STEPS} steps in a row were not finite; try a lower learning rate")

    def _write_speed(self) -> None:
        elapsed = time.perf_counter() - self._since
        seconds, speed = elapsed / self._steps, self._tokens / elapsed
        self.board.scalar("speed/seconds_per_step", seconds, self.step)
        self.board.scalar("speed/tokens_per_second", speed, self.step)
        self.board.scalar("memory/host_gb", psutil.Process().memory_info().rss / 1e9, self.step)
        if torch.cuda.is_available():
            self.board.scalar("memory/gpu_peak_gb", torch.cuda.max_memory_allocated() / 1e9, self.step)
        loss = f"{'' if self._phase == ORDINARY else f'{self._phase} '}loss {self.means(self._phase).loss:.4f}"
        shown = f"{loss}, {seconds:.2f} s/step, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.restart_clock()

    def means(self, phase: str = ORDINARY) -> Means:
        """The running means of a phase, of all steps whose numbers were read."""
        return self._means.get(phase, Means())

    def log_validation(self, measured: Mapping[str, Losses], variety: Mapping[str, float] = NO_NUMBERS) -> None:
        """Writes for each phase one loss per noise level and their mean. The step is validated then.

        `variety` is that of students as a share of their teachers'. Raises RunError where one has collapsed: where it
        is a small part of the largest that there was, or of the teacher's.
        """
        for phase, losses in measured.items():
            self._write_validation(phase, losses)
        for phase, share in variety.items():
            self.board.scalar(f"val/{phase}/variety", share, self.step)
            what = f"samples of the {phase} differ {share:.2f} times as much as the teacher's"
            self.say(f"step {self.step}: {what}, best near 1")
        self._validated_at = self.step
        self.restart_clock()
        for phase, share in variety.items():
            # Before it learns, a student sees the mean of all videos in pure noise, and its samples differ little.
            largest = self._variety[phase] = max(share, self._variety.get(phase, 0.0))
            if not share >= COLLAPSED * min(1.0, largest):
                raise RunError(
                    f"step {self.step}: the {phase} has collapsed: its samples differed {largest:.2f} times as much as "
                    f"the teacher's, and now {share:.2f} times\ntry a lower --learning_rate, a higher "
                    "--learning_rate_critic, --gen_update_interval or --diversity_weight, or --critic_alignment"
                )

    def _write_validation(self, phase: str, losses: Losses) -> None:
        prefix, of_phase = ("val", "") if phase == ORDINARY else (f"val/{phase}", f" of {phase}")
        values = losses.values.tolist()
        mean = sum(values) / len(values)
        self.board.scalar(f"{prefix}/loss", mean, self.step)
        for sigma, value in zip(losses.sigmas, values, strict=True):
            self.board.scalar(f"{prefix}/loss_sigma_{sigma:g}", value, self.step)
        each = ", ".join(f"{sigma:g}: {value:.4f}" for sigma, value in zip(losses.sigmas, values, strict=True))
        self.say(f"step {self.step}: validation loss{of_phase} {mean:.4f}  (by sigma {each})")

    def log_previews(self, videos: Sequence[tuple[str, Tensor]], fps: float) -> None:
        """Writes prompts' videos (F, 3, H, W) uint8 as samples/<step>-<n>.mp4, and a contact sheet of all of them.

        A failure is reported and does not end the training: nothing that is learned depends on previews.
        """
        path, sheet = self.folder / SAMPLES / sheet_name(self.step), contact_sheet(list(videos))
        try:
            path.parent.mkdir(exist_ok=True)
            for number, (_, frames) in enumerate(videos, 1):
                write_video(path.with_name(preview_name(self.step, number)), frames, fps)
            save_image(path, sheet)
        except (OSError, ValueError) as error:  # PyAV's errors are of these kinds
            self.say(f"step {self.step}: cannot write previews to {path.parent}: {error}")
        else:
            self.say(f"step {self.step}: previews in {path}")
        self.board.image("samples", sheet, self.step)
        self.restart_clock()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.bar.write(text)

    def restart_clock(self) -> None:
        """Leaves what was done since (validating, previews, saving) out of the next step's seconds and memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0

    def close(self) -> None:
        self.bar.close()
        self.board.close()

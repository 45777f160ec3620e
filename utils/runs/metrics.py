"""The numbers of a run, on the console and in TensorBoard."""

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.checkpoint_names import preview_name, sheet_name
from utils.common.errors import RunError
from utils.media.contact_sheet import contact_sheet
from utils.media.frames import save_image, write_video
from utils.runs.tensorboard import TensorBoardLog
from utils.training.learner import Update

LOG_SECONDS = 1.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
SMOOTHING = 0.98
MAX_BAD_STEPS = 3
SAMPLES = "samples"  # the folder of previews


@dataclass(frozen=True)
class _Numbers:
    """What is known of an update, on its way to the host, which need not wait for it."""

    step: int
    phase: str
    learning_rate: float
    values: Tensor  # loss and gradient norm, (2,) on the CPU
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, phase: str, learning_rate: float, values: Tensor) -> "_Numbers":
        if values.device.type != "cuda":
            return cls(step, phase, learning_rate, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, phase, learning_rate, host, arrived)

    def has_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm = self.values.tolist()
        return loss, grad_norm


class Metrics:
    """Logs every step, but the host never waits for one to end: about once a second it reads what has arrived.

    Losses appear under the name of their phase ("train/loss"). `step` counts the steps that were logged.
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
        self._smooth = self._weight = self._clipped = 0.0
        self._bad_steps = 0
        self._validated_at = -1
        self.restart_clock()

    def state_dict(self) -> dict[str, float]:
        """The running means, how many steps in a row were not finite, and the step of the last validation."""
        means = {"smooth": self._smooth, "weight": self._weight, "clipped": self._clipped}
        return {"bad_steps": self._bad_steps, "validated_at": self._validated_at, **means}

    def load_state_dict(self, saved: Mapping[str, float]) -> None:
        self._smooth, self._weight, self._clipped = saved["smooth"], saved["weight"], saved["clipped"]
        self._bad_steps, self._validated_at = int(saved["bad_steps"]), int(saved["validated_at"])

    @property
    def is_validated(self) -> bool:
        """Whether this step has been validated, perhaps before the run was interrupted."""
        return self._validated_at == self.step

    @property
    def has_previews(self) -> bool:
        """Whether this step has its previews, perhaps from before the run was interrupted."""
        return (self.folder / SAMPLES / sheet_name(self.step)).exists()

    def log(self, phase: str, loss: Tensor, update: Update) -> None:
        """Notes an update of the step that is being taken."""
        values = torch.stack([loss.detach(), update.grad_norm])
        self._pending.append(_Numbers.of(self.step + 1, phase, update.learning_rate, values))

    def end_step(self, tokens: int) -> None:
        """Counts a step. Raises RunError once loss or gradients were not finite several times in a row."""
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
            self._write_update(numbers, *numbers.read())
        if self._steps:
            self._write_speed()

    def _write_update(self, numbers: _Numbers, loss: float, grad_norm: float) -> None:
        step, phase = numbers.step, numbers.phase
        self.board.scalar(f"{phase}/learning_rate", numbers.learning_rate, step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped(step, loss, grad_norm)
            return
        self._bad_steps = 0
        self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.board.scalar(f"{phase}/loss", loss, step)
        self.board.scalar(f"{phase}/loss_smooth", self.smooth_loss, step)
        self.board.scalar(f"{phase}/grad_norm", grad_norm, step)
        if self.max_grad_norm:
            self._clipped = SMOOTHING * self._clipped + (1 - SMOOTHING) * (grad_norm > self.max_grad_norm)
            self.board.scalar(f"{phase}/clipped_share", self._clipped / self._weight, step)

    def _skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self._bad_steps += 1
        self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was skipped")
        if self._bad_steps >= MAX_BAD_STEPS:
            raise RunError(f"{MAX_BAD_STEPS} steps in a row were not finite; try a lower --learning_rate")

    def _write_speed(self) -> None:
        elapsed = time.perf_counter() - self._since
        seconds, speed = elapsed / self._steps, self._tokens / elapsed
        self.board.scalar("speed/seconds_per_step", seconds, self.step)
        self.board.scalar("speed/tokens_per_second", speed, self.step)
        self.board.scalar("memory/host_gb", psutil.Process().memory_info().rss / 1e9, self.step)
        if torch.cuda.is_available():
            self.board.scalar("memory/gpu_peak_gb", torch.cuda.max_memory_allocated() / 1e9, self.step)
        shown = f"loss {self.smooth_loss:.4f}, {seconds:.2f} s/step, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self.restart_clock()

    @property
    def smooth_loss(self) -> float:
        """The running mean of the loss, corrected for the bias of its start."""
        return self._smooth / self._weight if self._weight else math.nan

    def log_validation(self, losses: Tensor, sigmas: Sequence[float]) -> None:
        """Writes one loss per noise level and their mean."""
        values = losses.tolist()
        self._validated_at = self.step
        mean = sum(values) / len(values)
        self.board.scalar("val/loss", mean, self.step)
        for sigma, value in zip(sigmas, values, strict=True):
            self.board.scalar(f"val/loss_sigma_{sigma:g}", value, self.step)
        each = ", ".join(f"{sigma:g}: {value:.4f}" for sigma, value in zip(sigmas, values, strict=True))
        self.say(f"step {self.step}: validation loss {mean:.4f}  (by sigma {each})")
        self.restart_clock()

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

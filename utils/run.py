"""One training run: its folder, its numbers on the console and in TensorBoard, its checkpoints."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.device import out_of_memory
from utils.errors import RunError, UserError
from utils.lora_files import LoraFile, write_lora
from utils.media import MediaError, contact_sheet, save_image, write_video

LOG_SECONDS = 1.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
SMOOTHING = 0.98
MAX_BAD_STEPS = 3


@dataclass(frozen=True)
class _Numbers:
    """Loss and gradient norm of a step, on their way to the host: it need not wait for them to arrive."""

    step: int
    learning_rate: float
    values: Tensor  # (2,) on the CPU
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, learning_rate: float, values: Tensor) -> "_Numbers":
        if values.device.type != "cuda":
            return cls(step, learning_rate, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, learning_rate, host, arrived)

    def has_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Run:
    """The step counter and everything that is told of a run.

    Every step is logged, but the host never waits for a step to end: about once a second it reads what has arrived.
    """

    def __init__(self, output_dir: Path, total_steps: int, options_json: str) -> None:
        self.folder = _new_folder(output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir()
        (self.folder / "command_args.json").write_text(options_json + "\n", encoding="utf-8")
        self.step = 0
        self.writer = SummaryWriter(str(self.folder))
        print(f"writing to {self.folder}")
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=total_steps, dynamic_ncols=True, mininterval=interval, bar_format=BAR)
        self._pending: deque[_Numbers] = deque()
        self._restart_clock()
        self._smooth = self._weight = 0.0
        self._bad_steps = 0
        self.last_saved: Path | None = None

    def log(self, loss: Tensor, grad_norm: Tensor, learning_rate: float, tokens: int) -> None:
        """Notes one finished step. Raises RunError once loss or gradients were not finite several times in a row."""
        self.step += 1
        numbers = torch.stack([loss.detach(), grad_norm])
        self._pending.append(_Numbers.of(self.step, learning_rate, numbers))
        self._tokens += tokens
        self._steps += 1
        self.bar.update()
        if time.perf_counter() - self._since >= LOG_SECONDS:
            self._write_arrived(wait=False)

    def flush(self) -> None:
        """Waits for the numbers of all steps and writes them out."""
        self._write_arrived(wait=True)

    def _write_arrived(self, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].has_arrived()):
            numbers = self._pending.popleft()
            self._write_step(numbers.step, *numbers.read(), numbers.learning_rate)
        if self._steps:
            self._write_speed()

    def _write_speed(self) -> None:
        elapsed = time.perf_counter() - self._since
        seconds, speed = elapsed / self._steps, self._tokens / elapsed
        self.writer.add_scalar("speed/seconds_per_step", seconds, self.step)
        self.writer.add_scalar("speed/tokens_per_second", speed, self.step)
        self.writer.add_scalar("memory/host_gb", psutil.Process().memory_info().rss / 1e9, self.step)
        if torch.cuda.is_available():
            self.writer.add_scalar("memory/gpu_peak_gb", torch.cuda.max_memory_allocated() / 1e9, self.step)
        shown = f"loss {self.smooth_loss:.4f}, {seconds:.2f} s/step, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(shown, refresh=False)
        self._restart_clock()

    @property
    def smooth_loss(self) -> float:
        """The running mean of the loss, without the bias of its start."""
        return self._smooth / self._weight if self._weight else math.nan

    def log_validation(self, losses: Tensor, sigmas: Sequence[float]) -> None:
        """Writes one loss per noise level and their mean."""
        values = losses.tolist()
        mean = sum(values) / len(values)
        self.writer.add_scalar("val/loss", mean, self.step)
        for sigma, value in zip(sigmas, values, strict=True):
            self.writer.add_scalar(f"val/loss_sigma_{sigma:g}", value, self.step)
        each = ", ".join(f"{sigma:g}: {value:.4f}" for sigma, value in zip(sigmas, values, strict=True))
        self.say(f"step {self.step}: validation loss {mean:.4f}  (by sigma {each})")
        self._restart_clock()

    def log_previews(self, videos: Sequence[tuple[str, Tensor]], fps: float) -> None:
        """Writes prompts' videos (F, 3, H, W) uint8 as samples/<step>-<n>.mp4, and a contact sheet of all of them.

        Where that fails it is told, and the training goes on: nothing that is learnt depends on it.
        """
        path, sheet = self.folder / "samples" / f"{self.step:08d}.png", contact_sheet(list(videos))
        try:
            path.parent.mkdir(exist_ok=True)
            for number, (_, frames) in enumerate(videos, 1):
                write_video(path.with_name(f"{path.stem}-{number:02d}.mp4"), frames, fps)
            save_image(path, sheet)
        except (OSError, ValueError) as error:  # PyAV's errors are of these kinds
            self.say(f"step {self.step}: cannot write previews to {path.parent}: {error}")
        else:
            self.say(f"step {self.step}: previewed {path}")
        self.writer.add_image("samples", np.asarray(sheet), self.step, dataformats="HWC")
        self._restart_clock()

    def save(self, lora: LoraFile) -> Path:
        """Writes the adapter of this step. A matrix that is not finite is refused by `write_lora`."""
        self.flush()
        path = self.checkpoints / f"wan-lora-{self.step:08d}.safetensors"
        write_lora(path, lora)
        self.last_saved = path
        self.say(f"step {self.step}: saved {path}")
        self._restart_clock()
        return path

    def failure(self, reason: object) -> RunError:
        """The error that ends this run, with what is left of it."""
        kept = f"the last checkpoint is {self.last_saved}" if self.last_saved else "no checkpoint was written yet"
        return RunError(f"{reason}\n{kept}")

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.bar.write(text)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind in (None, KeyboardInterrupt):  # after an error the device may not answer
            self.flush()
        self.bar.close()
        self.writer.close()

    def _restart_clock(self) -> None:
        # What was done since (validating, previewing, saving) is not part of a step, in seconds and in memory.
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0

    def _write_step(self, step: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        self.writer.add_scalar("train/learning_rate", learning_rate, step)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped(step, loss, grad_norm)
            return
        self._bad_steps = 0
        self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.writer.add_scalar("train/loss", loss, step)
        self.writer.add_scalar("train/loss_smooth", self.smooth_loss, step)
        self.writer.add_scalar("train/grad_norm", grad_norm, step)

    def _skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self._bad_steps += 1
        self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was skipped")
        if self._bad_steps >= MAX_BAD_STEPS:
            raise self.failure(f"{MAX_BAD_STEPS} steps in a row were not finite; try a lower --learning_rate")


@contextmanager
def keeping_what_is_learnt(run: Run, snapshot: Callable[[], LoraFile]) -> Iterator[None]:
    """Ctrl-C, a clip that has become unreadable and a full GPU save the LoRA before they end the run.

    The last two become a RunError that names the checkpoint.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        reason = None
    except MediaError as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = out_of_memory(error)
    # Here, because inside the handlers the exception still holds the tensors of the step.
    if run.step:
        run.save(snapshot())
    if reason is None:
        raise KeyboardInterrupt
    raise run.failure(reason)


def _new_folder(output_dir: Path) -> Path:
    """<output_dir>/YYYY-MM-DD_HH-MM-SS, with a number behind it where that is taken."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 100):
        folder = output_dir / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot create {folder}: {error.strerror}; choose another --output_dir") from None
    raise UserError(f"{output_dir} has too many runs of the same second")

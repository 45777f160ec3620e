"""One training run: its folder, its numbers on the console and in TensorBoard, its checkpoints."""

import itertools
import math
import re
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from utils.adapters.lora_file import LoraError, LoraFile
from utils.adapters.lora_writer import write_lora
from utils.common.device import out_of_memory
from utils.common.errors import LoaderError, RunError, UserError
from utils.common.files import UNFINISHED
from utils.common.formatting import counted
from utils.common.signals import Stop, signals_ignored
from utils.data.loading import loader_failure
from utils.media.frames import contact_sheet, save_image, write_video
from utils.runs.state import Learner, State
from utils.runs.tensorboard import Board

LOG_SECONDS = 1.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
SMOOTHING = 0.98
MAX_BAD_STEPS = 3
STATES_KEPT = 2
OWN = re.compile(r"(?:wan-lora|state)-(\d{8})(?:-ema)?\.safetensors")
RESUME = "--resume_from_checkpoint"


@dataclass(frozen=True)
class _Numbers:
    """What is known of a step, on its way to the host: it need not wait for it to arrive."""

    step: int
    learning_rate: float
    values: Tensor  # loss, gradient norm and idle matrices, (3,) on the CPU
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

    def __init__(
        self, folder: Path, total_steps: int, options_json: str, max_grad_norm: float = 0.0, step: int = 0
    ) -> None:
        self.folder = folder
        self.max_grad_norm = max_grad_norm
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        name = "command_args.json" if step == 0 else f"command_args-{step:08d}.json"
        (folder / name).write_text(options_json + "\n", encoding="utf-8")
        self.step = step
        self.board = Board(folder, step, self.say)
        print(f"{'going on in' if step else 'writing to'} {folder}")
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=total_steps, initial=step, dynamic_ncols=True, mininterval=interval, bar_format=BAR)
        self._pending: deque[_Numbers] = deque()
        self._restart_clock()
        self._smooth = self._weight = self._clipped = 0.0
        self._bad_steps = 0
        self._saved_at = time.monotonic()
        lora = self._lora_path()
        self.last_saved = lora if lora.exists() else None

    @property
    def facts(self) -> dict[str, float]:
        """What a state keeps of the numbers; `recall` takes it back."""
        means = {"smooth": self._smooth, "weight": self._weight, "clipped": self._clipped}
        return {"step": self.step, "bad_steps": self._bad_steps, **means}

    def recall(self, facts: Mapping[str, float]) -> None:
        self._smooth, self._weight, self._clipped = facts["smooth"], facts["weight"], facts["clipped"]
        self._bad_steps = facts["bad_steps"]

    def saving_is_due(self, *every: int, minutes: float) -> bool:
        """Whether this step is a multiple of one of the numbers of steps `every`, or so many minutes have passed.

        A 0 stands for never.
        """
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        return self.step > 0 and (late or any(steps and self.step % steps == 0 for steps in every))

    def log(self, loss: Tensor, grad_norm: Tensor, idle: Tensor, learning_rate: float, tokens: int) -> None:
        """Notes one finished step; `idle` is how many of the adapter's matrices have learnt nothing.

        Raises RunError once loss or gradients were not finite several times in a row, or a matrix is idle.
        """
        self.step += 1
        numbers = torch.stack([loss.detach(), grad_norm, idle])
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
        self.board.scalar("speed/seconds_per_step", seconds, self.step)
        self.board.scalar("speed/tokens_per_second", speed, self.step)
        self.board.scalar("memory/host_gb", psutil.Process().memory_info().rss / 1e9, self.step)
        if torch.cuda.is_available():
            self.board.scalar("memory/gpu_peak_gb", torch.cuda.max_memory_allocated() / 1e9, self.step)
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
        self.board.scalar("val/loss", mean, self.step)
        for sigma, value in zip(sigmas, values, strict=True):
            self.board.scalar(f"val/loss_sigma_{sigma:g}", value, self.step)
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
        self.board.image("samples", sheet, self.step)
        self._restart_clock()

    def save(self, lora: LoraFile, average: LoraFile | None, write_state: Callable[[Path], None]) -> Path:
        """Writes the adapter of this step, its average, and by `write_state` the state from which the run can go on.

        The state comes last: where there is one, the rest is whole. Raises RunError where the disk refuses, and for
        a matrix that is not finite.
        """
        self.flush()
        path = self._lora_path()
        try:
            write_lora(path, lora)
            if average is not None:
                write_lora(path.with_stem(f"{path.stem}-ema"), average)
            write_state(self.checkpoints / f"state-{self.step:08d}.safetensors")
        except (OSError, LoraError) as error:
            raise self.failure(f"cannot write a checkpoint to {self.checkpoints}: {error}") from None
        self.last_saved = path
        self.say(f"step {self.step}: saved {path}")
        self._saved_at = time.monotonic()
        self._restart_clock()
        return path

    def prune(self, keep: int) -> None:
        """Removes all checkpoints but the newest `keep`; with 0 all LoRA files stay, and the newest two states.

        Other files that lie with them, such as converted ones, are left alone.
        """
        for kind, count in (("state", keep or STATES_KEPT), ("wan-lora", keep)):
            own = {
                path: step for path, step in list_checkpoints(self.checkpoints).items() if path.name.startswith(kind)
            }
            kept = sorted(set(own.values()))[-count:]
            for path in (path for path, step in own.items() if step not in kept):
                path.unlink(missing_ok=True)

    def _lora_path(self) -> Path:
        return self.checkpoints / f"wan-lora-{self.step:08d}.safetensors"

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
        self.board.close()

    def _restart_clock(self) -> None:
        # What was done since (validating, previewing, saving) is not part of a step, in seconds and in memory.
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0

    def _write_step(self, step: int, loss: float, grad_norm: float, idle: float, learning_rate: float) -> None:
        self.board.scalar("train/learning_rate", learning_rate, step)
        if idle:
            reason = f"after {step} steps {idle:.0f} matrices of the LoRA are still zero: it does not learn"
            raise self.failure(f"{reason}\nis --learning_rate zero, or too small for its dtype?")
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped(step, loss, grad_norm)
            return
        self._bad_steps = 0
        self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        self.board.scalar("train/loss", loss, step)
        self.board.scalar("train/loss_smooth", self.smooth_loss, step)
        self.board.scalar("train/grad_norm", grad_norm, step)
        if self.max_grad_norm:
            self._clipped = SMOOTHING * self._clipped + (1 - SMOOTHING) * (grad_norm > self.max_grad_norm)
            self.board.scalar("train/clipped_share", self._clipped / self._weight, step)

    def _skipped(self, step: int, loss: float, grad_norm: float) -> None:
        self._bad_steps += 1
        self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was skipped")
        if self._bad_steps >= MAX_BAD_STEPS:
            raise self.failure(f"{MAX_BAD_STEPS} steps in a row were not finite; try a lower --learning_rate")


@contextmanager
def save_on_exit(run: Run, learner: Learner, stop: Stop, keep: Callable[[], None]) -> Iterator[None]:
    """Whatever ends the run early saves it first, where the device still answers, and says how to go on.

    Ctrl-C stays a KeyboardInterrupt; a file that has vanished, a loader that died and a full GPU become a RunError.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        reason = None
    except (UserError, LoaderError) as error:
        reason = str(error)
    except torch.OutOfMemoryError as error:
        reason = out_of_memory(error)
    except RuntimeError as error:
        # Raised by a signal handler of torch's in the middle of anything; whoever ends us may have ended them first.
        if (failure := loader_failure(error)) is None:
            raise
        reason = None if stop.asked else str(failure)
    # Here, because inside the handlers the exception still holds the tensors of the step.
    with signals_ignored():
        if run.step and learner.steps == run.step:
            keep()
        elif run.step:
            run.say("it was interrupted in the middle of an update, which is not saved")
        if reason is not None:
            raise run.failure(reason)
        if run.last_saved is not None:
            run.say(f"go on with: {resume_command(sys.argv, run.folder)}")
        raise KeyboardInterrupt


def resume_command(argv: Sequence[str], folder: Path) -> str:
    """The command line that goes on with the run in this folder: the one that started it, and where it was."""
    words = list(argv)
    if RESUME in words:
        at = words.index(RESUME)
        del words[at : at + 2]
    words = [word for word in words if not word.startswith(f"{RESUME}=")]
    return shlex.join(["python", *words, RESUME, str(folder)])


def open_run(
    output_dir: Path, total_steps: int, options_json: str, max_grad_norm: float = 0.0, state: State | None = None
) -> Run:
    """A new run in a dated folder of its own, or the one that the state belongs to. Raises RunError for a full disk."""
    folder = new_folder(output_dir) if state is None else state.run_folder
    step = 0 if state is None else state.step
    try:
        if state is not None:
            archive_later_checkpoints(folder / "checkpoints", step)
        run = Run(folder, total_steps, options_json, max_grad_norm, step)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}") from None
    if state is not None:
        run.recall(state.facts)
    return run


def list_checkpoints(checkpoints: Path) -> dict[Path, int]:
    """The files that a run has written there, and the step of each."""
    matches = {path: OWN.fullmatch(path.name) for path in checkpoints.iterdir()}
    return {path: int(match[1]) for path, match in matches.items() if match}


def archive_later_checkpoints(checkpoints: Path, step: int) -> None:
    """Moves what is of later steps than `step` into a folder of its own: a run that goes on from there writes its own.

    Removes what a crash has left unfinished.
    """
    for path in checkpoints.glob(UNFINISHED):
        path.unlink()
    later = [path for path, its_step in list_checkpoints(checkpoints).items() if its_step > step]
    if later:
        names = (checkpoints / f"aside-{number}" for number in itertools.count(1))
        aside = next(folder for folder in names if not folder.exists())
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        print(f"moved {counted(len(later), 'file')} of later steps to {aside}")


def new_folder(output_dir: Path) -> Path:
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

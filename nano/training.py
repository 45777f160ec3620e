"""How Wan-Nano is trained from scratch: Muon for matrices, AdamW for the rest, averaged weights, exact resume."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.files import replacing
from utils.training.optim import OptimizerSpec, learning_rate_factor

Model = TypeVar("Model", bound=nn.Module)

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update, like that of AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SAVE_EVERY = 100
MIN_MATRIX_SIDE = 16
WARMUP_STEPS = 50


def training_dtype(device: torch.device) -> torch.dtype:
    """bf16, except on a CPU without AVX-512, where bf16 is tens of times slower than fp32."""
    is_slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return torch.float32 if is_slow else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Convolutions and matrix products in the `training_dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training_dtype(device) == torch.bfloat16)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximately the nearest orthogonal matrices: (N, R, C) -> the same shape, all singular values near 1.

    Newton-Schulz iteration in the `training_dtype` with the coefficients of Muon (Jordan et al., 2024).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(training_dtype(matrices.device))
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(Optimizer):
    """SGD with momentum whose updates are orthogonalised. A kernel is a matrix with one row per output channel.

    torch.optim.Muon does not accept kernels and handles one matrix at a time. Here all matrices of one shape are
    updated together, which is three times as fast at these sizes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters. A closure, if given, first computes the gradients and returns the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            self._update(group["params"], group["lr"])
        return loss

    def _update(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                direction = self._direction(parameter, parameter.grad).flatten(1)
                by_shape.setdefault((len(direction), direction.shape[1]), []).append((parameter, direction))
        for shape, directions in by_shape.items():
            updates = orthogonalised(torch.stack([direction for _, direction in directions]))
            scale = MUON_RMS * max(shape) ** 0.5
            for (parameter, _), update in zip(directions, updates, strict=True):
                parameter.add_(update.view_as(parameter), alpha=-learning_rate * scale)

    def _direction(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The direction of Nesterov momentum: between the gradient and the momentum that already includes it."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
        return gradient.lerp(momentum, MUON_MOMENTUM)


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining. A saved state belongs to a stage in which every value is the same."""

    name: str
    seed: int  # of the initial weights
    steps: int
    learning_rate: float  # Muon's
    rest_learning_rate: float  # AdamW's
    ema_decay: float
    evaluate_every: int
    data: str  # a fingerprint of the training data and of the settings of the loss

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, OptimizerSpec(1.0, 0.0, "cosine", WARMUP_STEPS, self.steps))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains a parameter: matrices and kernels, except narrow ones, embeddings and the last layer."""
    outer = any(part in name for part in ("modulation", "embedding", "time_projection", "head.head"))
    return not outer and parameter.ndim > 1 and min(parameter.flatten(1).shape) >= MIN_MATRIX_SIDE


def fit(
    model: Model,
    stage: Stage,
    loss_at: Callable[[int], Tensor],
    evaluate: Callable[[Model, int], str],
    work: Path,
) -> Model:
    """Trains the parameters of `model` that are not frozen, and returns a copy of it with averaged weights.

    `loss_at(step)` draws its own data, always the same for a step. `evaluate(average, step)` returns figures to print.
    The state is saved to `work/<name>.pt` every SAVE_EVERY steps; training resumes from that file if it exists. Raises
    UserError if the file is damaged or belongs to another stage.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in trained.items() if is_matrix(name, p)]
    rest = [p for name, p in trained.items() if not is_matrix(name, p)]
    optimizers = {
        "muon": (Muon(matrices, stage.learning_rate), stage.learning_rate),
        "adamw": (AdamW(rest, stage.rest_learning_rate, (0.9, 0.95), weight_decay=0.0), stage.rest_learning_rate),
    }
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(stage.ema_decay), use_buffers=False)
    # torch declares it as any Module; it is a deep copy of the model.
    averaged: Model = average.module  # type: ignore[assignment]
    parts: dict[str, nn.Module | Optimizer] = {"model": model, "average": average}
    parts |= {name: optimizer for name, (optimizer, _) in optimizers.items()}
    path, first = work / f"{stage.name}.pt", 0
    if path.exists():
        first = _restore(path, stage, parts)

    bar = tqdm(range(first, stage.steps), stage.name, stage.steps, initial=first, dynamic_ncols=True)
    smooth = None
    for step in bar:
        for optimizer, rate in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate * stage.learning_rate_factor(step)
        torch.manual_seed(step)
        loss = loss_at(step)
        loss.backward()
        for optimizer, _ in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        done = step + 1
        if done % SAVE_EVERY == 0 or done == stage.steps:
            bar.set_postfix_str(f"loss {smooth.item():.4f}")
            with replacing(path) as unfinished:
                progress = {"step": done, "plan": asdict(stage)}
                torch.save(progress | {name: part.state_dict() for name, part in parts.items()}, unfinished)
        if done % stage.evaluate_every == 0 or done == stage.steps:
            say(f"{stage.name} step {done}: {evaluate(averaged, done)}")
    return averaged


def _restore(path: Path, stage: Stage, parts: Mapping[str, nn.Module | Optimizer]) -> int:
    """Restores every part from a saved state and returns its step. Raises UserError."""
    mismatch = UserError(f"{path} is damaged, or belongs to another training: remove it, or choose another --work")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["plan"] != asdict(stage):
            raise mismatch
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError, EOFError, UnpicklingError):
        raise mismatch from None


@contextmanager
def faster_attention(device: torch.device) -> Iterator[None]:
    """Plain attention on a CPU, where the fused one is three times slower in bf16."""
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        yield


def fingerprint(settings: str, *tensors: Tensor) -> str:
    """16 hex digits of the SHA-256 of settings and tensors."""
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()[:16]

"""How Wan-Nano is trained from nothing: Muon on matrices, AdamW on the rest, averaged weights, exact resume."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from utils.common.errors import UserError
from utils.common.files import replacing
from utils.training.optim import OptimizerSpec, learning_rate_factor

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update, as AdamW's is
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
SAVE_EVERY = 100
MIN_MATRIX_SIDE = 16
WARMUP_STEPS = 50


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: (N, R, C) -> the same shape, all singular values near 1.

    Newton-Schulz in bf16 with the coefficients of Muon (Jordan et al., 2024).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(Optimizer):
    """Momentum whose update is made orthogonal. Kernels count as matrices of one row per output channel.

    torch.optim.Muon takes no kernels and one matrix at a time; here all of one shape go together, which is three times
    as fast for matrices this small.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = len(parameter), parameter[0].numel()
                    by_shape.setdefault(shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                moved = orthogonalised(torch.stack([self._direction(p).flatten(1) for p in parameters]))
                scale = MUON_RMS * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, moved, strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's: the gradient, leaning on the momentum that it has just moved."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - MUON_MOMENTUM)
        return parameter.grad.lerp(momentum, MUON_MOMENTUM)


@dataclass(frozen=True)
class Plan:
    """One stage of pretraining; `seed` is that of the weights it starts from."""

    name: str
    seed: int
    steps: int
    learning_rate: float  # Muon's
    rest_learning_rate: float  # AdamW's
    ema_decay: float
    evaluate_every: int
    data: str  # a fingerprint of what it is trained on

    def factor(self, step: int) -> float:
        return learning_rate_factor(step, OptimizerSpec(1.0, 0.0, "cosine", WARMUP_STEPS, self.steps))


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: a matrix wide enough that orthogonal means something, and no embedding or last layer."""
    outer = any(part in name for part in ("modulation", "embedding", "time_projection", "head.head"))
    return not outer and parameter.ndim > 1 and min(parameter.flatten(1).shape) >= MIN_MATRIX_SIDE


def fit(
    model: nn.Module,
    plan: Plan,
    loss_at: Callable[[int], Tensor],
    evaluate: Callable[[nn.Module, int], str],
    work: Path,
) -> nn.Module:
    """Trains what is not frozen of `model` and returns the average of its weights.

    `loss_at(step)` draws its own data, the same each time. Goes on from `work/<name>.pt` where that exists; it is
    written every hundred steps. Raises UserError where it is of another plan.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [p for name, p in trained.items() if is_matrix(name, p)]
    rest = [p for name, p in trained.items() if not is_matrix(name, p)]
    optimizers = {
        "muon": (Muon(matrices, plan.learning_rate), plan.learning_rate),
        "adamw": (AdamW(rest, plan.rest_learning_rate, (0.9, 0.95), weight_decay=0.0), plan.rest_learning_rate),
    }
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay), use_buffers=False)
    parts = {"model": model, "average": average} | {name: optimizer for name, (optimizer, _) in optimizers.items()}
    path, first = work / f"{plan.name}.pt", 0
    if path.exists():
        first = _restore(path, plan, parts)

    bar = tqdm(range(first, plan.steps), plan.name, plan.steps, initial=first, dynamic_ncols=True)
    smooth = None
    for step in bar:
        for optimizer, rate in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate * plan.factor(step)
        torch.manual_seed(step)
        loss = loss_at(step)
        loss.backward()
        for optimizer, _ in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        done = step + 1
        if done % SAVE_EVERY == 0 or done == plan.steps:
            bar.set_postfix_str(f"loss {smooth.item():.4f}")
            with replacing(path) as unfinished:
                progress = {"step": done, "plan": asdict(plan)}
                torch.save(progress | {name: part.state_dict() for name, part in parts.items()}, unfinished)
        if done % plan.evaluate_every == 0 or done == plan.steps:
            bar.write(f"{plan.name} step {done}: {evaluate(average.module, done)}")
    return average.module


def _restore(path: Path, plan: Plan, parts: Mapping[str, nn.Module | Optimizer]) -> int:
    """Puts the parts back to where they were, and returns the step. Raises UserError for a state of another plan."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["plan"] != asdict(plan):
            raise KeyError
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError):
        reason = "damaged, or of another plan of training"
        raise UserError(f"{path} is {reason}: remove it, or choose another --work") from None
    return state["step"]


@contextmanager
def faster_attention(device: torch.device) -> Iterator[None]:
    """On a CPU the fused attention is three times slower in bf16 than the plain one."""
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        yield


def fingerprint(settings: str, *tensors: Tensor) -> str:
    """Of settings and tensors, to the bit."""
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()[:16]

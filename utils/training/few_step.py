"""Few-step distillation on one frozen base: student and critic are adapters, and the base alone is the teacher."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.adapters.lora import ADAPTER, speaking
from utils.common.tensors import map_tensors
from utils.diffusion.few_step import noised_to_steps, predict_latents, pure_noise, roll_out, student_loss
from utils.diffusion.flow import Noisy, Predict, add_noise, sample_noisy, shift_sigma, unshift_sigma
from utils.diffusion.objectives import Loss, squared_error
from utils.encoding.conditioning import Batch, Cond, draw_held, loss_weight, make_predict, replace_text
from wan.image2video import hold_first
from wan.modules.model import WanModel
from wan.utils.fm_solvers import unipc

STUDENT, CRITIC = ADAPTER, "critic"  # the adapters of a model
FIRST = 0.999  # where the official grid begins, before the shift
CLOSE = 1e-6  # the least distance, before the shift, over which a solver steps


@dataclass(frozen=True)
class Upper:
    """The finished student of the expert above, from whose samples this one starts."""

    sigmas: Sequence[float]  # its steps
    answering: Callable[[], AbstractContextManager[Predict[Cond]]]  # a span in which it is there to answer


@dataclass(frozen=True)
class Diversity:
    """A loss that keeps samples varied: how far results are from what the teacher samples from the same noisy latents.

    It is the regression loss of DMD, https://arxiv.org/abs/2311.18828, section 3.3, but with samples that the teacher
    makes meanwhile, and for each of the steps. DP-DMD, https://arxiv.org/abs/2602.03139, has it for the first one.
    """

    weight: float = 0.0
    num_steps: int = 8  # of the teacher


@dataclass(frozen=True)
class FewStep:
    """The losses of a student and of its critic, each of which a phase asks for while it speaks.

    Both draw from torch's global random state. A mask of a clip has no effect: what is compared are distributions.
    Raises ValueError without a step, and for a roll-out that begins neither at pure noise nor with an expert above.
    """

    model: WanModel
    sigmas: Sequence[float]  # the steps of the student
    interval: tuple[float, float]  # the noise levels at which teacher and critic are compared, after the shift
    shift: float
    guidance: float  # of the teacher: uncond + guidance * (cond - uncond)
    negative: Tensor  # (T, E), the text that the teacher is guided away from
    held_share: float = 0.0  # of the samples that are given their first latent frame, where they can be
    rolls_out: bool = False  # whether the student starts from its own samples, and not from clips
    upper: Upper | None = None  # for a roll-out that does not begin at pure noise
    diversity: Diversity = Diversity()

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise ValueError("a student has at least one step")
        if self.rolls_out and self.upper is None and self.sigmas[0] != 1:
            raise ValueError(f"a student that rolls out begins at noise level 1, not at {self.sigmas[0]:g}")

    def student_loss(self, batch: Batch) -> Loss:
        """As `utils.diffusion.few_step.student_loss`, for the student's samples, and with the loss of `Diversity`.

        The student speaks.
        """
        cond = draw_held(batch.cond, self.held_share)
        noisy, weight = self._start(batch, cond), _weight(batch, cond)
        latents = self._answer(noisy, cond)
        matched = student_loss(latents, self.teach, self._voice(CRITIC), cond, self.shift, self.interval, weight)
        if not self.diversity.weight:
            return Loss(matched.loss, watched={"distance": matched.distance})
        diversity = squared_error(latents, self.sample_teacher(noisy, cond, self.diversity.num_steps), weight)
        loss = matched.loss + self.diversity.weight * diversity
        return Loss(loss, watched={"distance": matched.distance, "diversity": diversity})

    @torch.no_grad()
    def sample_teacher(self, start: Noisy, cond: Cond, num_steps: int) -> Tensor:
        """The teacher's clean latents from noisy ones, in so many steps of UniPC, as the model is sampled.

        Each sample is at one of the student's steps. Where the interval ends above 0, clean is what the teacher sees
        there.
        """
        latents, device = list(start.latents.split(1)), start.latents.device
        solvers = [unipc(self._levels(sigma, num_steps).numpy(), device) for sigma in start.sigma.tolist()]
        for index in range(max(len(solver.timesteps) for solver in solvers)):
            rows = [row for row, solver in enumerate(solvers) if index < len(solver.timesteps)]
            timestep = torch.stack([solvers[row].timesteps[index] for row in rows])
            noisy = torch.cat([latents[row] for row in rows])
            velocity = self.teach(noisy, timestep, map_tensors(cond, itemgetter(rows)))
            for row, time, answer in zip(rows, timestep, velocity.split(1), strict=True):
                (latents[row],) = solvers[row].step(answer, time, latents[row], return_dict=False)
        return torch.cat(latents)

    def _levels(self, sigma: float, num_steps: int) -> Tensor:
        """The noise levels (N,) at which the teacher answers from `sigma` on: evenly spaced before the shift.

        Rounded, so that one at the boundary of two experts is exactly there.
        """
        low, high = (unshift_sigma(level, self.shift) for level in (self.interval[0], sigma))
        if high < low + CLOSE:
            return torch.tensor([sigma])
        even = torch.linspace(min(high, FIRST), low, num_steps + 1, dtype=torch.float64)
        return shift_sigma(even if low else even[:-1], self.shift).round(decimals=9)

    def critic_loss(self, batch: Batch) -> Loss:
        """How far the critic's velocity is from that of the student's samples. The critic speaks.

        It diverges where it is farther than an answer of zero would be.
        """
        cond = draw_held(batch.cond, self.held_share)
        with torch.no_grad(), speaking(self.model, STUDENT):
            latents = self._answer(self._start(batch, cond), cond)
        noisy, weight = sample_noisy(latents, self.shift, self.interval), _weight(batch, cond)
        velocity = make_predict(self.model)(noisy.latents, noisy.timestep, cond)
        limit = squared_error(torch.zeros_like(velocity), noisy.velocity, weight)
        return Loss(squared_error(velocity, noisy.velocity, weight), limit)

    def teach(self, latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The teacher's guided velocity, whoever speaks around it."""
        return guided_together(self._voice(None), latents, timestep, cond, self.negative, self.guidance)

    @torch.no_grad()
    def first(self, batch: Batch, cond: Cond) -> Noisy:
        """Latents at the first of the steps: noise, clips with noise, or samples of the expert above with noise."""
        noise, clean = torch.randn_like(batch.latents), batch.latents
        if self.sigmas[0] == 1:
            return pure_noise(noise)
        if self.rolls_out and self.upper is not None:
            with self.upper.answering() as predict:
                start = pure_noise(torch.randn_like(noise))
                noisy = roll_out(predict, start, cond, self.upper.sigmas, len(self.upper.sigmas) - 1)
                clean = predict_latents(predict, noisy, cond)
        return add_noise(clean, noise, torch.full((len(noise),), self.sigmas[0], device=noise.device))

    def _answer(self, noisy: Noisy, cond: Cond) -> Tensor:
        """What the student, which speaks, makes of noisy latents: clean ones."""
        latents = predict_latents(make_predict(self.model), noisy, cond)
        return latents if cond.first is None else hold_first(latents, cond.first, cond.held)

    def _start(self, batch: Batch, cond: Cond) -> Noisy:
        """Noisy latents at the student's steps."""
        if not self.rolls_out:
            return noised_to_steps(batch.latents, self.sigmas)
        exit_at = int(torch.randint(len(self.sigmas), ()))
        return roll_out(make_predict(self.model), self.first(batch, cond), cond, self.sigmas, exit_at)

    def _voice(self, adapter: str | None) -> Predict[Cond]:
        """The answers of an adapter, or of the base, whoever speaks around it."""

        def answer(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
            with speaking(self.model, adapter):
                return make_predict(self.model)(latents, timestep, cond)

        return answer


def _weight(batch: Batch, cond: Cond) -> Tensor | None:
    """How much each position counts: a first frame that is given does not."""
    return loss_weight(replace(batch, mask=None), cond)


def guided_together(
    predict: Predict[Cond], latents: Tensor, timestep: Tensor, cond: Cond, negative: Tensor, guidance: float
) -> Tensor:
    """The guided velocity, of one forward pass with both texts; weights that stream come once for it.

    uncond + guidance * (cond - uncond), with guidance 1 the plain answer. `negative` is a text (T, E).
    """
    if guidance == 1:
        return predict(latents, timestep, cond)
    length = max(cond.text.shape[1], len(negative))
    texts = [F.pad(each, (0, 0, 0, length - each.shape[1])) for each in (cond.text, replace_text(cond, negative).text)]
    both = replace(map_tensors(cond, _twice), text=torch.cat(texts))
    with_text, without = predict(_twice(latents), _twice(timestep), both).chunk(2)
    return without + guidance * (with_text - without)


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])

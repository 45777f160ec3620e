"""Few-step distillation on one frozen base: student and critic are adapters, and the base alone is the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.adapters.lora import speaking
from utils.common.tensors import map_tensors
from utils.diffusion.few_step import noised_to_steps, predict_latents, roll_out, student_loss
from utils.diffusion.flow import Noisy, Predict, sample_noisy
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, draw_held, loss_weight, make_predict, replace_text
from wan.image2video import hold_first
from wan.modules.model import WanModel

STUDENT, CRITIC = "student", "critic"  # the adapters of a model


@dataclass(frozen=True)
class FewStep:
    """The losses of a student and of its critic, each of which a phase asks for while it speaks.

    Both draw from torch's global random state. A mask of a clip has no effect: what is compared are distributions.
    Raises ValueError without a step, and for a roll-out that does not begin at pure noise.
    """

    model: WanModel
    sigmas: Sequence[float]  # the steps of the student
    interval: tuple[float, float]  # the noise levels at which teacher and critic are compared, after the shift
    shift: float
    guidance: float  # of the teacher: uncond + guidance * (cond - uncond)
    negative: Tensor  # (T, E), the text that the teacher is guided away from
    held_share: float = 0.0  # of the samples that are given their first latent frame, where they can be
    rolls_out: bool = False  # whether the student starts from its own samples, and not from clips

    def __post_init__(self) -> None:
        if not self.sigmas:
            raise ValueError("a student has at least one step")
        if self.rolls_out and self.sigmas[0] != 1:
            raise ValueError(f"a student that rolls out begins at noise level 1, not at {self.sigmas[0]:g}")

    def student_loss(self, batch: Batch) -> Tensor:
        """As `utils.diffusion.few_step.student_loss`, for the student's samples. The student speaks."""
        cond = draw_held(batch.cond, self.held_share)
        latents = self._sample(batch, cond)
        teacher, critic = self._voice(None), self._voice(CRITIC)
        guide = partial(guided_together, teacher, negative=self.negative, guidance=self.guidance)
        return student_loss(latents, guide, critic, cond, self.shift, self.interval, _weight(batch, cond))

    def critic_loss(self, batch: Batch) -> Tensor:
        """How far the critic's velocity is from that of the student's samples, a scalar. The critic speaks."""
        cond = draw_held(batch.cond, self.held_share)
        with torch.no_grad(), speaking(self.model, STUDENT):
            latents = self._sample(batch, cond)
        noisy = sample_noisy(latents, self.shift, self.interval)
        velocity = make_predict(self.model)(noisy.latents, noisy.timestep, cond)
        return squared_error(velocity, noisy.velocity, _weight(batch, cond))

    def _sample(self, batch: Batch, cond: Cond) -> Tensor:
        """What the student, which speaks, makes of noisy latents at one of its steps: clean ones."""
        latents = predict_latents(make_predict(self.model), self._start(batch, cond), cond)
        return latents if cond.first is None else hold_first(latents, cond.first, cond.held)

    def _start(self, batch: Batch, cond: Cond) -> Noisy:
        if not self.rolls_out:
            return noised_to_steps(batch.latents, self.sigmas)
        exit_at = int(torch.randint(len(self.sigmas), ()))
        noise = torch.randn_like(batch.latents)
        return roll_out(make_predict(self.model), noise, cond, self.sigmas, exit_at)

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

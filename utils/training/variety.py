"""How much a student's samples of one prompt differ, compared with its teacher's.

A student that makes the same of every noise has collapsed, long before its pictures look bad.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.common.temp_rng import temp_rng
from utils.common.tensors import map_tensors
from utils.diffusion.few_step import TINY, predict_latents, roll_out
from utils.diffusion.flow import Noisy
from utils.encoding.conditioning import Batch, make_predict
from utils.training.few_step import FewStep

COLLAPSED = 0.25  # of the teacher's variance
TEACHER_STEPS = 20
FRAMES, TOKENS = 5, 1600  # the most latent frames, and tokens, of a sample that is measured


@dataclass(frozen=True)
class Variety:
    """The variance of samples of one clip's prompt across `count` noises, averaged over all positions.

    `batch` is that clip alone, on the device; `at_once` samples go through the model together. The noise is that of the
    seed, and torch's random state stays as it was.
    """

    few_step: FewStep
    batch: Batch
    seed: int
    at_once: int = 1
    taught: float = 1.0  # the teacher's
    count: int = 64

    def with_teacher(self, name: str, decisions: Decisions) -> "Variety":
        """With the variance of the teacher, kept under this name as long as it would be the same.

        Raises UserError where a state holds something else there.
        """
        key = f"variety_{name}"
        known = decisions.made.get(key) or decisions.saved.get(key, "")
        number, _, identity = known.partition(" ")
        try:
            taught = float(number) if known and identity == self._identity else self.of_teacher()
        except ValueError:
            raise UserError(f"the saved run's {key} is {known!r}: its state is damaged") from None
        decisions.record(key, f"{taught!r} {self._identity}")
        return replace(self, taught=taught)

    @property
    def _identity(self) -> str:
        """16 hex digits of all that decides the teacher's samples besides its weights."""
        few_step = self.few_step
        facts = (self.seed, self.count, few_step.guidance, few_step.shift, few_step.interval, few_step.sigmas[0])
        digest = hashlib.sha256(repr(facts).encode())

        def add(tensor: Tensor) -> Tensor:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
            return tensor

        add(few_step.negative)
        map_tensors(self.batch, add)
        return digest.hexdigest()[:16]

    def share_of_student(self) -> float:
        """The student's variance by the teacher's. The student speaks."""
        return self.of_student() / max(self.taught, TINY)

    def of_student(self) -> float:
        """That of its samples in all of its steps. The student speaks."""
        few_step = self.few_step

        def sample(start: Noisy, batch: Batch) -> Tensor:
            predict = make_predict(few_step.model)
            last = roll_out(predict, start, batch.cond, few_step.sigmas, len(few_step.sigmas) - 1)
            return predict_latents(predict, last, batch.cond)

        return self._measure(sample, "variety of the student's samples")

    def of_teacher(self) -> float:
        """That of guided samples from the same starts, in TEACHER_STEPS steps of UniPC, as the model is sampled."""

        def sample(start: Noisy, batch: Batch) -> Tensor:
            return self.few_step.sample_teacher(start, batch.cond, TEACHER_STEPS)

        return self._measure(sample, "variety of the teacher's samples")

    @torch.no_grad()
    def _measure(self, sample: Callable[[Noisy, Batch], Tensor], words: str) -> float:
        total = squares = torch.zeros((), dtype=torch.float64)
        with temp_rng(self.seed):
            for begin in tqdm(range(0, self.count, self.at_once), words, unit="batch", leave=False):
                batch = _repeated(self.batch, min(self.at_once, self.count - begin))
                made = sample(self.few_step.first(batch, batch.cond), batch).double()
                total, squares = total.to(made) + made.sum(0), squares.to(made) + made.square().sum(0)
        variance = squares / self.count - (total / self.count) ** 2
        # A first frame that is given differs little or not at all.
        is_given = self.batch.cond.first is not None or self.batch.cond.channels is not None
        own = variance[:, 1:] if is_given and variance.shape[1] > 1 else variance
        return own.mean().item()


def corner(batch: Batch, patch_size: tuple[int, int, int]) -> Batch:
    """The first FRAMES latent frames of a batch, and of these as large a corner as TOKENS allow."""
    frames, height, width = batch.latents.shape[2:]
    frames = min(frames, FRAMES)
    _, rows, columns = patch_size
    share = min(1.0, math.sqrt(TOKENS * rows * columns / (frames * height * width)))
    height, width = (max(int(side * share) // step, 1) * step for side, step in ((height, rows), (width, columns)))

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :, :frames, :height, :width] if tensor.ndim == 5 else tensor

    return map_tensors(replace(batch, mask=None), cut)


def _repeated(batch: Batch, count: int) -> Batch:
    """A batch of one clip as one of `count` clips."""
    return map_tensors(batch, lambda tensor: tensor.expand(count, *tensor.shape[1:]))

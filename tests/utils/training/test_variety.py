"""The variety of a student's samples, compared with its teacher's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY_SHAPE
from utils.common.decisions import Decisions
from utils.common.errors import UserError
from utils.diffusion.flow import latents_to_velocity
from utils.encoding.conditioning import Batch, Cond
from utils.training import variety
from utils.training.few_step import FewStep
from utils.training.variety import COLLAPSED, Variety, corner

DEVIATION, MEAN = 0.5, 2.0


def batch_of(frames: int = 2, height: int = 4, width: int = 6) -> Batch:
    return Batch(torch.zeros(1, 3, frames, height, width), Cond(torch.zeros(1, 5, TINY_SHAPE.text_dim)))


def exact(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """The velocity of data of one mean and deviation."""
    sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
    total = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
    clean = MEAN + (1 - sigma) * DEVIATION**2 / total * (latents - (1 - sigma) * MEAN)
    return latents_to_velocity(latents, clean, timestep / 1000)


@pytest.fixture
def measured(monkeypatch):
    """A variety whose teacher is exact, and whose student answers with samples of a deviation."""

    def make(deviation: float, interval: tuple[float, float] = (0.0, 1.0), **changes) -> Variety:
        def student(latents: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
            drawn = MEAN + deviation * torch.randn_like(latents)
            return latents_to_velocity(latents, drawn, timestep / 1000)

        monkeypatch.setattr(variety, "make_predict", lambda model: student)
        monkeypatch.setattr(FewStep, "teach", lambda self, latents, timestep, cond: exact(latents, timestep, cond))
        sigmas = [1.0, 0.8] if interval[1] == 1 else [0.7, 0.4]
        few_step = FewStep(None, sigmas, interval, 3.0, 1.0, torch.zeros(1, 1))
        return Variety(few_step, batch_of(), seed=1, **changes)

    return make


def test_it_is_the_variance_across_noises(measured):
    """Of 64 values the variance deviates by a sixth, of the mean over 144 positions by little."""
    assert measured(0.3).of_student() == pytest.approx(0.3**2, rel=0.05)
    assert measured(0.3).of_teacher() == pytest.approx(DEVIATION**2, rel=0.15)  # in 20 steps


def test_of_one_expert_it_is_that_of_the_clean_latents_which_it_sees_at_its_last_level(measured):
    """Of x0 seen at level 0.6 the deviation is a share of the data's: 0.4 d^2 / (0.16 d^2 + 0.36) of that at 0.6."""
    seen = 0.4 * DEVIATION**2 / (0.16 * DEVIATION**2 + 0.36) * (0.16 * DEVIATION**2 + 0.36) ** 0.5
    assert measured(0.3, (0.6, 1.0)).of_teacher() == pytest.approx(seen**2, rel=0.2)


def test_the_noise_is_that_of_the_seed_and_nothing_else_changes(measured):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    values = [measured(0.3, at_once=count).of_student() for count in (1, 1, 64)]
    assert torch.equal(torch.get_rng_state(), before)
    assert values[0] == values[1] and values[2] == pytest.approx(values[0], rel=0.1)
    assert replace(measured(0.3), seed=2).of_student() != values[0]


def test_a_student_is_judged_by_its_teacher_and_a_constant_one_has_collapsed(measured):
    decisions = Decisions("cpu")
    for deviation, share in ((DEVIATION, 1.0), (0.4 * DEVIATION, 0.16), (0.0, 0.0)):
        found = measured(deviation).with_teacher("student", decisions).share_of_student()
        assert found == pytest.approx(share, rel=0.15, abs=1e-6) and (found < COLLAPSED) == (share < COLLAPSED)


def test_the_teachers_is_kept_and_what_a_state_says_is_checked(measured):
    found = measured(0.3).with_teacher("student", decisions := Decisions("cpu"))
    again = measured(0.3).with_teacher("student", Decisions("other", decisions.table()))
    number, identity = decisions.made["variety_student"].split()
    assert again.taught == found.taught == float(number)
    with pytest.raises(UserError, match="variety_student is 'much"):
        measured(0.3).with_teacher("student", Decisions("cpu", {"variety_student": f"much {identity}"}))
    kept = Decisions("cpu", {"variety_student": f"99.0 {identity}"})
    assert measured(0.3).with_teacher("student", kept).taught == 99
    assert replace(measured(0.3), seed=2).with_teacher("student", kept).taught < 1


def test_a_frame_that_is_given_does_not_count(measured):
    free = measured(0.3)
    first = torch.zeros(1, 3, 1, 4, 6)
    held = replace(free, batch=replace(free.batch, cond=replace(free.batch.cond, first=first)))
    assert held.of_student() == pytest.approx(0.3**2, rel=0.1)


def test_a_long_or_large_clip_is_measured_in_a_corner():
    whole = batch_of(3, 8, 8)
    assert corner(whole, (1, 2, 2)).latents.shape == whole.latents.shape
    large = batch_of(21, 60, 104)
    large = replace(large, cond=replace(large.cond, channels=torch.zeros(1, 20, 21, 60, 104)))
    cut = corner(large, (1, 2, 2))
    frames, height, width = cut.latents.shape[2:]
    assert frames == 5 and height % 2 == width % 2 == 0 and 1400 < cut.tokens((1, 2, 2)) <= 1600
    assert cut.cond.channels.shape[2:] == cut.latents.shape[2:] and cut.cond.text.shape == large.cond.text.shape

"""Dataclasses of tensors are moved and stacked field by field."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from utils.common.tensors import map_tensors, stack_tensors


@dataclass(frozen=True)
class Inner:
    text: Tensor
    image: Tensor | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    latents: Tensor
    inner: Inner
    mask: Tensor | None = None


def make(value: float, mask: bool = False) -> Outer:
    latents = torch.full((2, 3), value)
    return Outer(f"{value}", latents, Inner(latents[0] + 1), latents[:1] if mask else None)


def test_a_function_meets_every_tensor_and_the_rest_stays():
    before = make(1.0, mask=True)
    after = map_tensors(before, lambda tensor: tensor * 2)
    assert after.name == "1.0" and after.inner.image is None
    assert after.latents.eq(2).all() and after.inner.text.eq(4).all() and after.mask.eq(2).all()
    assert before.latents.eq(1).all()


def test_values_are_stacked_along_a_new_first_axis_at_every_depth():
    values = [make(1.0), make(2.0), make(3.0)]
    stacked = stack_tensors(values)
    assert stacked.latents.shape == (3, 2, 3) and stacked.inner.text.shape == (3, 3)
    for index, value in enumerate(values):
        assert torch.equal(stacked.latents[index], value.latents)
        assert torch.equal(stacked.inner.text[index], value.inner.text)
    assert stacked.mask is None and stacked.inner.image is None and stacked.name == "1.0"


@pytest.mark.parametrize("masked", [(True, False), (False, True)])
def test_a_tensor_that_only_some_values_have_is_never_dropped(masked):
    with pytest.raises(ValueError, match="only some of the values have mask"):
        stack_tensors([make(1.0, mask) for mask in masked])

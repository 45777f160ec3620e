from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from utils.common.tensors import in_parts, map_tensors, stack_tensors


@dataclass(frozen=True)
class Cond:
    text: Tensor
    channels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    latents: Tensor
    cond: Cond
    caption: str = "a fox"
    mask: Tensor | None = None
    sizes: tuple[int, ...] = (1, 2)
    kind: type = Cond


def test_every_tensor_is_mapped_at_any_depth_and_nothing_else_changes():
    batch = Batch(torch.zeros(2), Cond(torch.ones(3)), mask=torch.full((4,), 5.0))
    changed = map_tensors(batch, lambda tensor: tensor + 1)
    assert type(changed) is Batch and type(changed.cond) is Cond
    assert changed.latents.tolist() == [1, 1] and changed.cond.text.tolist() == [2, 2, 2]
    assert changed.mask.tolist() == [6, 6, 6, 6] and changed.cond.channels is None
    assert (changed.caption, changed.sizes, changed.kind) == ("a fox", (1, 2), Cond)
    assert batch.latents.tolist() == [0, 0] and batch.cond.text.tolist() == [1, 1, 1]


def test_the_function_sees_each_tensor_once_in_the_order_of_the_fields():
    seen: list[Tensor] = []
    tensors = [torch.tensor(float(number)) for number in range(4)]
    batch = Batch(tensors[0], Cond(tensors[1], tensors[2]), mask=tensors[3])
    map_tensors(batch, lambda tensor: seen.append(tensor) or tensor)
    assert [tensor.item() for tensor in seen] == [0, 1, 2, 3]


def test_a_subclass_keeps_its_type_and_its_own_fields_are_mapped_too():
    @dataclass(frozen=True)
    class WithImage(Cond):
        image: Tensor | None = None

    changed = map_tensors(WithImage(torch.ones(1), image=torch.ones(2)), torch.neg)
    assert type(changed) is WithImage and changed.image.tolist() == [-1, -1] and changed.text.tolist() == [-1]


def test_what_is_no_dataclass_instance_is_refused():
    for value in (torch.ones(1), None, {"text": torch.ones(1)}):
        with pytest.raises(TypeError):
            map_tensors(value, torch.neg)


def test_a_field_that_cannot_be_set_is_refused_instead_of_dropped():
    @dataclass(frozen=True)
    class Derived:
        text: Tensor
        length: int = field(init=False, default=3)

    with pytest.raises((TypeError, ValueError)):
        map_tensors(Derived(torch.ones(1)), torch.neg)


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


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], []),
        ([3], [[3]]),
        ([9], [[9]]),
        ([2, 2, 1, 4], [[2, 2, 1], [4]]),
        ([9, 1, 9, 9, 5], [[9], [1], [9], [9], [5]]),
        ([0, 5, 0, 1], [[0, 5, 0], [1]]),
    ],
)
def test_parts_hold_all_tensors_in_order_and_no_more_values_than_allowed_or_one_tensor(sizes, parts):
    tensors = [torch.zeros(size) for size in sizes]
    assert [[tensor.numel() for tensor in tensors[part]] for part in in_parts(tensors, most=5)] == parts

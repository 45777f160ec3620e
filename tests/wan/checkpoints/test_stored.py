"""Quantised become the values that ComfyUI computes with; a rotation is undone exactly."""

import math

import pytest
import torch
from torch import Tensor

from wan.checkpoints.stored import GROUPS, Quantised, rotate_columns, rotation

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CPU = torch.device("cpu")
R4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=FP64)


def by_hand(group: int) -> Tensor:
    """R4 x R4 x ..., written entry by entry: the product of those of R4 at the digits of row and column to base 4."""
    matrix = torch.empty(group, group, dtype=FP64)
    for row in range(group):
        for column in range(group):
            entry, r, c = 1.0, row, column
            for _ in range(round(math.log(group, 4))):
                entry *= float(R4[r % 4, c % 4])
                r, c = r // 4, c // 4
            matrix[row, column] = entry / math.sqrt(group)
    return matrix


def draw(rows: int, columns: int, group: int, dtype: torch.dtype = torch.int8) -> Quantised:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(dtype)
    return Quantised(codes, torch.rand(rows, 1, generator=generator) + 0.5, group)


# -------------------------------------------------------------------------------------------------------- the rotation


@pytest.mark.parametrize("group", [4, 16, 64])
def test_a_rotation_has_the_entries_of_the_kronecker_products_of_r4(group):
    assert torch.equal(rotation(group, CPU).double(), by_hand(group))


@pytest.mark.parametrize("group", GROUPS)
def test_a_rotation_is_symmetric_undoes_itself_and_its_rows_sum_to_one(group):
    matrix = rotation(group, CPU)
    exact = matrix.double()
    assert matrix.dtype == BF16 and matrix.shape == (group, group)
    assert torch.equal(exact.abs(), torch.full_like(exact, group**-0.5))  # powers of two: nothing was rounded
    assert torch.equal(exact, exact.T)
    assert torch.equal(exact @ exact, torch.eye(group, dtype=FP64))
    assert torch.equal(exact.sum(dim=1), torch.ones(group, dtype=FP64))


def test_columns_are_mixed_group_by_group_in_the_dtype_of_the_values():
    x = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x[..., :16].double() @ by_hand(16), x[..., 16:].double() @ by_hand(16)], dim=-1)
    torch.testing.assert_close(rotate_columns(x.double(), rotation(16, CPU)), expected)
    assert rotate_columns(x.bfloat16(), rotation(16, CPU)).dtype == BF16
    torch.testing.assert_close(rotate_columns(rotate_columns(x, rotation(16, CPU)), rotation(16, CPU)), x)


def test_a_rotation_that_was_made_in_inference_mode_can_be_trained_with():
    rotation.cache_clear()
    with torch.inference_mode():
        rotation(4, CPU)
    x = torch.randn(2, 4, dtype=BF16, requires_grad=True)  # the dtype of the rotation, which is kept as it is
    rotate_columns(x, rotation(4, CPU)).sum().backward()
    assert x.grad is not None


# ----------------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("group", [0, 4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-6), (BF16, 2e-2)])
def test_int8_is_rotated_back_and_then_multiplied_by_the_scale_of_its_row(group, dtype, tolerance):
    stored = draw(6, 32, group)
    expected = stored.codes.double()
    if group:
        whole = torch.block_diag(*[by_hand(group)] * (32 // group))
        expected = expected @ whole
    expected = expected * stored.scale.double()
    found = stored.values(dtype)
    assert found.dtype == dtype and found.shape == stored.shape == (6, 32)
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance
    assert stored.codes.dtype == torch.int8  # as it was


def test_values_that_are_rotated_alone_have_no_scale():
    codes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = Quantised(codes, None, 4).values(FP64)
    torch.testing.assert_close(found, codes.double() @ torch.block_diag(by_hand(4), by_hand(4)))


@pytest.mark.parametrize("scale", [True, False])
def test_what_is_quantised_goes_to_a_device_with_its_scale_and_its_rotation(scale):
    stored = draw(6, 32, 16)
    moved = Quantised(stored.codes, stored.scale if scale else None, 16).to("meta")
    assert moved.codes.is_meta and moved.group == 16
    assert moved.scale.is_meta if scale else moved.scale is None
    found = moved.values(BF16)
    assert found.is_meta and found.shape == (6, 32) and found.dtype == BF16

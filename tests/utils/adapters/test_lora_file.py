import math

import pytest
import torch

from tests.loras import make_pair
from utils.adapters.lora_file import LoraPair, delta, largest, shown


def test_delta_is_the_scaled_product_in_fp32():
    pair = make_pair((6, 4, 1, 2, 2), rank=2, alpha=3.0, dtype=torch.bfloat16)
    expected = torch.einsum("or,rithw->oithw", pair.up.double().flatten(1), pair.down.double()) * (0.5 * 3 / 2)
    assert delta(pair, 0.5).dtype == torch.float32
    torch.testing.assert_close(delta(pair, 0.5).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(delta(LoraPair(torch.ones(2, 5), torch.ones(6, 2), None)), torch.full((6, 5), 2.0))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, -7.0])
def test_no_number_of_a_delta_exceeds_the_bound_of_its_pair(alpha):
    pair = make_pair((6, 4, 1, 2, 2), rank=3, alpha=alpha)
    product = pair.up.flatten(1) @ pair.down.flatten(1)
    assert 0 < largest(delta(LoraPair(pair.down, pair.up, 1.0))) < pair.bound
    assert largest(delta(pair)) < pair.bound and largest(product) < pair.bound
    ones = LoraPair(torch.ones(3, 5), torch.full((6, 3), -2.0), alpha)  # here it is exact
    assert ones.bound == max(3.0, 3.0 if alpha is None else abs(alpha)) * 2


def test_the_largest_magnitude_sees_both_signs_nan_and_overflow():
    assert largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]])) == 3 and largest(torch.tensor([-2.0, 5.0]).half()) == 5
    assert math.isnan(largest(torch.tensor([1.0, torch.nan]))) and largest(torch.tensor([-torch.inf, 0])) == math.inf
    assert largest(torch.tensor([1e39, 0], dtype=torch.float64)) == math.inf


def test_foreign_text_is_shown_in_one_line_of_ascii():
    assert shown("blocks.0") == "blocks.0" and shown("a\nb\x1b[0m\u202ec") == r"a\nb\x1b[0m\u202ec"
    assert shown("x" * 101) == "x" * 100 + "..." and shown([1, None]) == "[1, None]"

"""What can be counted by hand is counted so."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.training.counting import WORKSPACE, Counts, count_step

SMALL = 64  # bytes of scalars beside what a test is about
DEVICES = ["cpu", "meta"]


def parameter(*shape: int, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_counts_from_the_operation_that_makes_it_until_it_is_freed(device):
    scale = parameter(device=device)

    def loss() -> Tensor:
        a = torch.ones(1000, device=device)
        b = a + 1
        del a
        c = b.view(10, 100).t()[2:] + 1
        c.add_(1)
        del b
        return scale * c.sum()

    counts = count_step(loss)
    assert 8000 <= counts.peak_bytes <= 8000 + SMALL
    assert counts.kept_bytes <= SMALL


def test_what_the_backward_pass_reads_is_kept_and_the_loss_is_not():
    x = parameter(250)
    counts = count_step(lambda: (x * 1).exp().sum())
    assert counts.kept_bytes == 1000
    assert 2000 <= counts.peak_bytes <= 2000 + SMALL


def test_a_tensor_that_only_a_name_holds_is_alive_as_long_as_the_name():
    x, held = parameter(250), []
    counts = count_step(lambda: (held.append(x * 1) or held[-1] + x).sum())
    assert counts.kept_bytes == 1000


@pytest.mark.parametrize("device", DEVICES)
def test_each_multiply_and_each_add_of_a_product_is_an_operation(device):
    a, b, bias = (parameter(*shape, device=device) for shape in ((3, 5), (5, 7), (7,)))
    forward = 2 * 3 * 5 * 7
    assert count_step(lambda: (a @ b).sum()).product_flops == 3 * forward
    assert count_step(lambda: (a.detach() @ b).sum()).product_flops == 2 * forward
    assert count_step(lambda: F.linear(a, b.t(), bias).sum()).product_flops == 3 * forward
    assert count_step(lambda: torch.addmm(bias, a, b, alpha=2).sum()).product_flops == 3 * forward
    assert count_step(lambda: torch.zeros(3, 7, device=device).addmm_(a, b).sum()).product_flops == 3 * forward
    batched = parameter(4, 3, 5, device=device)
    assert count_step(lambda: (batched @ b.expand(4, 5, 7)).sum()).product_flops == 3 * 4 * forward


@pytest.mark.parametrize("device", DEVICES)
def test_an_embedding_of_patches_is_a_product(device):
    patches, video = nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2), device=device), torch.ones(2, 3, 1, 4, 6, device=device)
    patches.requires_grad_(False)
    scale = parameter(device=device)
    assert count_step(lambda: scale * patches(video).sum()).product_flops == 2 * (2 * 2 * 3) * (3 * 2 * 2) * 8


@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_two_products_forward_and_five_backward_with_a_workspace_of_its_own(device):
    q = parameter(1, 2, 32, 16, device=device)
    k, v = (torch.ones(1, 2, 8, 16, device=device) for _ in range(2))

    def loss() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).sum()

    counts = count_step(loss)
    assert counts.attention_flops == (2 + 5) * 2 * 2 * 32 * 8 * 16
    assert counts.product_flops == 0
    alive = 4 * q.numel() * 2 + 4 * 2 * k.numel() + 4 * 2 * 32  # answer, gradients of q, k, v, log-sum-exp
    assert alive + WORKSPACE * q.numel() <= counts.peak_bytes <= alive + WORKSPACE * q.numel() + SMALL


def test_elementwise_operations_move_what_they_read_and_write_and_products_are_not_among_them():
    matrix = torch.ones(10, 10)

    def moved(function: Callable[[Tensor], Tensor]) -> float:
        x = parameter(10, 10)
        return count_step(lambda: (function(x) @ matrix).sum()).elementwise_bytes

    plain = 400 + 4 + 2 * 4  # the sum, and its gradient: one like it
    assert moved(lambda x: x) == plain
    assert moved(lambda x: x + 1) == plain + 2 * 400
    row = torch.ones(1, 10)
    assert moved(lambda x: x * row) == plain + 2 * (400 + 40 + 400)
    assert moved(lambda x: x.t()) == plain


def test_what_the_first_step_makes_for_all_others_is_not_counted():
    x, cache = parameter(250), []

    def loss() -> Tensor:
        if not cache:
            cache.append(torch.ones(10_000))
        return (x * cache[0][:250]).sum()

    assert count_step(loss).peak_bytes < 3000


def test_what_is_added_to_a_gradient_that_exists_is_not_counted_as_another():
    x = parameter(250)
    anew, again = count_step(lambda: (x * x).sum()), count_step(lambda: (x * x).sum(), [x])
    assert anew.kept_bytes == again.kept_bytes == 0
    assert 2000 <= anew.peak_bytes <= 3000 + SMALL  # two parts of the gradient, and their sum
    assert again.elementwise_bytes - anew.elementwise_bytes == 3000


def test_counts_are_added_and_scaled():
    one = Counts(1, 2, 3, 4, 5)
    assert one + one == one * 2 == Counts(2, 4, 6, 8, 10)

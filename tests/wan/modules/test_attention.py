"""Every attention kernel gives the same answer in the same layout, and a model uses the one that it is given."""

import pytest
import torch
from torch import Tensor

from tests.kernels import installed
from tests.tiny import TINY_SHAPE, tiny_transformer
from utils.common.imports import hidden
from wan.modules.attention import KERNELS, PACKAGES, attention, is_installed

STAND_INS = ("flash2", "flash3", "sage")


def heads(keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 24, generator=generator) for length in (7, keys, keys))
    return q, k, v


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("keys", [7, 9])
def test_each_package_is_called_in_its_layout(name, keys):
    with installed():
        torch.testing.assert_close(KERNELS[name](*heads(keys)), attention(*heads(keys)))


def test_an_earlier_flash3_returns_a_pair():
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_attn_interface.flash_attn_func", lambda q, k, v: (q + 1, None))
        q, k, v = heads()
        assert torch.equal(KERNELS["flash3"](q, k, v), q + 1)


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_a_model_attends_by_the_kernel_that_it_is_given(name):
    model = tiny_transformer(TINY_SHAPE)
    inputs = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, TINY_SHAPE.text_dim)
    expected, calls = model(*inputs), []
    with installed(), pytest.MonkeyPatch.context() as patch:
        module = __import__(PACKAGES[name])
        own = module.flash_attn_func
        patch.setattr(module, "flash_attn_func", lambda *heads: calls.append(heads) or own(*heads))
        model.use_attention(name)
        found = model(*inputs)
    torch.testing.assert_close(found, expected)
    assert len(calls) == 2 * TINY_SHAPE.num_layers
    model.use_attention("sdpa")
    assert torch.equal(model(*inputs), expected)


def test_what_is_installed_is_known_without_importing_it():
    assert is_installed("sdpa") and is_installed("cudnn")
    with installed():
        assert all(map(is_installed, KERNELS))
    with hidden(*PACKAGES.values()):
        assert not any(map(is_installed, PACKAGES))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "sage"])
def test_on_a_gpu_each_kernel_and_its_gradients_are_those_of_attention_in_fp32(name):
    if not is_installed(name):
        pytest.skip(f"{PACKAGES[name]} is not installed")
    q, k, v, grad = (torch.randn(1, 256, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    results = []
    for attend, dtype in ((KERNELS[name], torch.bfloat16), (attention, torch.float32)):
        leaves = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    for found, exact in zip(*results, strict=True):
        assert (found.float() - exact).norm() < 0.01 * exact.norm()

"""Checkpointed blocks change what is kept in memory, and no number."""

import torch
from torch import Tensor

from tests.tiny import TINY_SHAPE, tiny_shape, tiny_transformer
from utils.adapters.lora import add_lora, select_modules
from utils.training import memory
from utils.training.memory import Memory, checkpoint_blocks, prepare
from wan.configs import FAMILIES
from wan.modules.model import WanModel


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 2, 4, 6, generator=generator)
    return latents, torch.tensor([100.0, 900.0]), torch.randn(2, 5, TINY_SHAPE.text_dim, generator=generator)


def adapted(checkpointed: bool) -> tuple[WanModel, list[Tensor]]:
    """A model whose adapters are not zero, with or without checkpointing."""
    model = tiny_transformer()
    parameters = add_lora(model, select_modules(model, ["all-linear"]), rank=4, alpha=4)
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if checkpointed:
        checkpoint_blocks(model.blocks)
    return model, parameters


def test_velocity_and_gradients_are_bit_for_bit_those_without_checkpointing():
    results = []
    for checkpointed in (False, True):
        model, parameters = adapted(checkpointed)
        velocity = model(*inputs())
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(parameter.grad for parameter in parameters)])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_image_tokens_and_two_timesteps_reach_checkpointed_blocks():
    results = []
    for checkpointed in (False, True):
        model = tiny_transformer(tiny_shape(FAMILIES["wan2.1-flf2v-14B-720P"])).requires_grad_(True)
        if checkpointed:
            checkpoint_blocks(model.blocks)
        latents, _, text = inputs()
        image = torch.ones(2, 6, model.shape.image_dim).cumsum(dim=1)
        velocity = model(latents.repeat(1, 3, 1, 1, 1)[:, :36], torch.tensor([[0.0, 100.0], [0.0, 900.0]]), text, image)
        velocity.square().mean().backward()
        results.append([velocity.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


def test_the_names_of_parameters_and_modules_stay():
    plain, checkpointed = adapted(False)[0], adapted(True)[0]
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in checkpointed.named_modules()]


def test_the_first_block_trains_although_its_input_needs_no_gradient():
    model, _ = adapted(True)
    model(*inputs()).square().mean().backward()
    up = model.blocks[0].self_attn.q.lora_B["default"].weight
    assert up.grad.isfinite().all() and up.grad.abs().max() > 0


def test_each_block_runs_again_in_the_backward_pass_and_only_there():
    model, _ = adapted(True)
    calls = []
    for index, block in enumerate(model.blocks):
        block.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    loss = model(*inputs()).square().mean()
    assert calls == [0, 1]
    loss.backward()
    assert calls == [0, 1, 1, 0]


def test_less_is_saved_for_the_backward_pass():
    saved = []
    for checkpointed in (False, True):
        model, _ = adapted(checkpointed)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model(*inputs())
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 4


def test_without_gradients_the_answer_is_the_same():
    with torch.no_grad():
        assert torch.equal(adapted(True)[0](*inputs()), adapted(False)[0](*inputs()))


def test_strategies_are_applied_after_the_adapter_and_in_their_order(monkeypatch):
    order = []
    monkeypatch.setattr(memory, "checkpoint_blocks", lambda blocks: order.append("checkpoint"))
    monkeypatch.setattr(memory, "compile_blocks", lambda blocks: order.append("compile"))
    attached = prepare(tiny_transformer(), Memory("full", compile=True), lambda model: order.append("attach") or "it")
    assert attached == "it" and order == ["attach", "checkpoint", "compile"]
    order.clear()
    prepare(tiny_transformer(), Memory(), lambda model: order.append("attach"))
    assert order == ["attach"]

"""A check before the first step: every condition reaches the model.

A condition that is dropped on its way costs hours and shows only in the result: a LoRA for an image-to-video model that
was trained without images, or a control that the model never saw.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from utils.adapters.attach import LoraAdapter
from utils.adapters.lora import speaking
from utils.common.errors import UserError
from utils.diffusion.flow import Noisy, add_noise, seeded_noise
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, loss_weight, make_predict

REMEDY = "its weights are damaged, or are not those of the model that its folder says it is"


def check_conditions(adapter: LoraAdapter, batch: Batch, sigma: float, has_control: bool) -> None:
    """Raises UserError where a condition of this batch does not reach the model, or the control not its LoRA.

    The base model's answer at this noise level must change without each condition. Draws no random numbers, and leaves
    no gradient behind.
    """
    predict, noisy = make_predict(adapter.model), _noisy(batch, sigma)

    @torch.no_grad()
    def answer(cond: Cond) -> Tensor:
        return predict(noisy.latents, noisy.timestep, cond)

    with speaking(adapter.model, None):
        for name, cond in _without_each(batch, has_control):
            if not _matters(answer, batch.cond, cond):
                raise UserError(f"the base model does not read the {name}: {REMEDY}")
    if not has_control:
        return

    # The base does not read the control, and the LoRA's new input columns start at zero: no answer depends on it yet.
    # The gradient of the columns does.
    matrix = adapter.parameters[f"patch_embedding.lora_B.{adapter.name}.weight"]
    weight = loss_weight(replace(batch, mask=None), batch.cond)

    def gradient(cond: Cond) -> Tensor:
        loss = squared_error(predict(noisy.latents, noisy.timestep, cond), noisy.velocity, weight)
        return torch.autograd.grad(loss, matrix)[0]

    with adapter.speaking():
        if not _matters(gradient, batch.cond, _without_control(batch)):
            raise UserError("the control does not reach the LoRA: is the control of the first clip empty?")


def _matters(answer: Callable[[Cond], Tensor], cond: Cond, changed: Cond) -> bool:
    """Whether the answer to changed conditions differs by more than two answers to the same ones do."""
    once, again, other = answer(cond), answer(cond), answer(changed)
    return bool((once - other).abs().max() > (once - again).abs().max())  # false for NaN


def _noisy(batch: Batch, sigma: float) -> Noisy:
    noise = seeded_noise(batch.latents.shape, 0).to(batch.latents)
    return add_noise(batch.latents, noise, torch.full((len(noise),), sigma, device=noise.device))


def _without_each(batch: Batch, has_control: bool) -> Iterator[tuple[str, Cond]]:
    """Each condition of the base by name, and the conditions without it."""
    cond = batch.cond
    yield "text", replace(cond, text=torch.zeros_like(cond.text))
    given = 0 if cond.channels is None else cond.channels.shape[1] - has_control * batch.latents.shape[1]
    if cond.channels is not None and given:
        channels = torch.cat([torch.zeros_like(cond.channels[:, :given]), cond.channels[:, given:]], dim=1)
        yield "channels of the given frames", replace(cond, channels=channels)
    if cond.image is not None:
        yield "vision tokens", replace(cond, image=torch.zeros_like(cond.image))
    if cond.first is not None:
        yield "given first frame", replace(cond, first=torch.zeros_like(cond.first))


def _without_control(batch: Batch) -> Cond:
    channels = batch.cond.channels
    if channels is None:
        raise ValueError("the batch has no control")
    given, control = channels.split([channels.shape[1] - batch.latents.shape[1], batch.latents.shape[1]], dim=1)
    return replace(batch.cond, channels=torch.cat([given, torch.zeros_like(control)], dim=1))

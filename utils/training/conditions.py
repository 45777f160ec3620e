"""A check before the first step: every condition reaches the model.

A condition that is dropped on its way costs hours and shows only in the result: a LoRA for an image-to-video model that
was trained without images, or a control that the model never saw.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from utils.adapters.attach import LoraAdapter
from utils.adapters.lora import speaking
from utils.common.errors import UserError
from utils.diffusion.flow import Noisy, add_noise, seeded_noise
from utils.diffusion.objectives import squared_error
from utils.encoding.conditioning import Batch, Cond, loss_weight, make_predict
from utils.encoding.pictures import PLACES

REMEDY = "its weights are damaged, or are not those of the model that its folder says it is"


def check_conditions(adapter: LoraAdapter, batch: Batch, sigma: float, given: Sequence[int], has_control: bool) -> None:
    """Raises UserError where a condition of this batch does not reach the model, or the control not its LoRA.

    The base model's answer at this noise level must change without each condition; `given` are the places of the frames
    that it is given. Draws no random numbers, and leaves
    no gradient behind.
    """
    predict, noisy = make_predict(adapter.model), _noisy(batch, sigma)

    @torch.no_grad()
    def answer(cond: Cond) -> Tensor:
        return predict(noisy.latents, noisy.timestep, cond)

    with speaking(adapter.model, None):
        unread = _that_do_not_matter(answer, batch.cond, _without_each(batch, given, has_control))
    if unread:
        raise UserError(f"the base model does not read the {' and the '.join(unread)}: {REMEDY}")
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
        unread = _that_do_not_matter(gradient, batch.cond, {"control": _without_control(batch)})
    if unread:
        raise UserError("the control does not reach the LoRA: is the control of the longest clip empty?")


def _that_do_not_matter(answer: Callable[[Cond], Tensor], cond: Cond, without: Mapping[str, Cond]) -> list[str]:
    """The conditions without which the answer changes by no more than two answers to the same conditions differ."""
    once = answer(cond)
    noise = (once - answer(cond)).abs().max()
    differences = {name: (once - answer(changed)).abs().max() for name, changed in without.items()}
    return [name for name, difference in differences.items() if not bool(difference > noise)]  # a NaN counts as none


def _noisy(batch: Batch, sigma: float) -> Noisy:
    noise = seeded_noise(batch.latents.shape, 0).to(batch.latents)
    return add_noise(batch.latents, noise, torch.full((len(noise),), sigma, device=noise.device))


def _without_each(batch: Batch, given: Sequence[int], has_control: bool) -> dict[str, Cond]:
    """The conditions without each of those that the base reads, by its name."""
    cond = batch.cond
    own = 0 if cond.channels is None else cond.channels.shape[1] - has_control * batch.latents.shape[1]
    found = {"text": replace(cond, text=torch.zeros_like(cond.text))}
    for number, place in enumerate(given):
        if cond.channels is not None and own:
            channels = cond.channels.clone()
            channels[:, :own, place] = 0
            found[f"channels of the given {PLACES[place]}"] = replace(cond, channels=channels)
        if cond.image is not None:
            image = torch.stack(cond.image.chunk(len(given), dim=1))
            image[number] = 0
            found[f"vision tokens of the {PLACES[place]}"] = replace(cond, image=torch.cat([*image], dim=1))
    if cond.first is not None:
        found["given first frame"] = replace(cond, first=torch.zeros_like(cond.first))
    return found


def _without_control(batch: Batch) -> Cond:
    channels = batch.cond.channels
    if channels is None:
        raise ValueError("the batch has no control")
    given, control = channels.split([channels.shape[1] - batch.latents.shape[1], batch.latents.shape[1]], dim=1)
    return replace(batch.cond, channels=torch.cat([given, torch.zeros_like(control)], dim=1))

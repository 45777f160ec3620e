"""The mean of several checkpoints of one run.

The matrices are averaged, not their products: within one run both change slowly, and the mean keeps the rank. The
trainer's exponential moving average (`utils/training/ema.py`) does the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from utils.adapters.lora_file import LoraFile
from utils.adapters.model_card import of_mean
from utils.common.checkpoint_names import Checkpoint, list_checkpoints, parse_name
from utils.common.errors import UserError


def last_checkpoints(path: Path, count: int) -> list[Path]:
    """`path` and the checkpoints of the same run before it, `count` in all, oldest first.

    Raises UserError for a path that is not a checkpoint of a run, and where there are fewer.
    """
    last = parse_name(path.name)
    if last is None or last.trainable is None or last.average:
        example = Checkpoint(100, "lora").name
        raise UserError(f"--average takes a checkpoint of a run, named like {example}, not {path.name}")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    same = {
        other.step: file
        for file, other in list_checkpoints(path.parent).items()
        if replace(other, step=last.step) == last and other.step <= last.step
    }
    same[last.step] = path  # and not one of the earlier form of names
    found = [same[step] for step in sorted(same)][-count:]
    if len(found) < count:
        raise UserError(f"--average {count}: {path.parent} has only {len(found)} checkpoints up to {path.name}")
    return found


def average(loras: Sequence[LoraFile]) -> LoraFile:
    """The mean of LoRAs in fp32, with the metadata of the last, but for its picture and title.

    Raises UserError if they are not from one run.
    """
    first = loras[0]
    if any(lora.lycoris or lora.magnitudes for lora in loras):
        raise UserError("only plain LoRAs can be averaged: fold LoHa, LoKr and DoRA first, with --fold RANK")
    for other in loras[1:]:
        same = other.factors.keys() == first.factors.keys() and other.diffs.keys() == first.diffs.keys()
        if not same or any(other.factors[name].alpha != each.alpha for name, each in first.factors.items()):
            raise UserError("the checkpoints to average belong to different LoRAs: modules and alpha must agree")
    pairs = {}
    for name, pair in loras[-1].pairs.items():
        along = [lora.pairs[name] for lora in loras]
        pairs[name] = replace(pair, down=_mean([one.down for one in along]), up=_mean([one.up for one in along]))
    diffs = {name: _mean([lora.diffs[name] for lora in loras]) for name in first.diffs}
    return replace(loras[-1], pairs=pairs, diffs=diffs, metadata=of_mean(loras[-1].metadata, len(loras)))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise UserError("the checkpoints to average belong to different LoRAs: their ranks must agree")
    return torch.stack([tensor.float() for tensor in tensors]).mean(dim=0)

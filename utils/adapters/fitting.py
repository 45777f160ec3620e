"""The part of a LoRA that a model has a place for, where it was trained on a sibling of this model.

Text-to-video and image-to-video Wans of one size differ in the layers that read a picture and in the inputs of the
patch embedding, which begin with the noise in all of them. The rest of a LoRA means the same in both.
"""

import re
from dataclasses import replace
from pathlib import Path

from utils.adapters.lora import diff_target, pad_inputs
from utils.adapters.lora_file import LoraFile, delta
from utils.common.errors import UserError
from wan.configs import FAMILIES
from wan.modules.model import WanModel
from wan.names import PATCH

MAX_SHOWN = 4  # kinds of modules in one sentence


def fitting(lora: LoraFile, model: WanModel, source: Path) -> tuple[LoraFile, list[str]]:
    """What of a LoRA this model can be given, and a sentence for each thing that differs; none where all of it fits.

    Modules that the model lacks are left out. A change of the patch embedding is brought to the model's number of
    inputs. Blocks beyond the model's and other widths stay, for they are another Wan's: `Fusion` refuses them.
    Raises UserError where nothing fits, and for a control LoRA of a model with other inputs.
    """
    lora = _check_control(lora, model, source)
    lora, left_out = _leave_out(lora, model, source)
    lora, resized = _fit_inputs(lora, model, source)
    return lora, [*lora.remarks(source), *left_out, *resized]


def _check_control(lora: LoraFile, model: WanModel, source: Path) -> LoraFile:
    """The LoRA, without the statement of its inputs where these are a released model's own: it is no control LoRA."""
    if PATCH not in lora.input_shapes:
        return lora
    stated, shape = lora.input_shapes[PATCH][1], model.shape
    if stated == shape.in_dim + shape.out_dim:
        return lora
    if stated in {family.in_dim for family in FAMILIES.values()} | {shape.in_dim}:
        return replace(lora, input_shapes={name: size for name, size in lora.input_shapes.items() if name != PATCH})
    raise UserError(
        f"{source} is a control LoRA for a model that has {stated} input channels with the control; this model has "
        f"{shape.in_dim}, and {shape.in_dim + shape.out_dim} with the control.\nUse it on the Wan that it was made for."
    )


def _leave_out(lora: LoraFile, model: WanModel, source: Path) -> tuple[LoraFile, list[str]]:
    parameters = dict(model.named_parameters())
    absent = {name for name in lora.factors if f"{name}.weight" not in parameters}
    absent |= {key for key in lora.diffs if diff_target(key, parameters) not in parameters}
    absent = {name for name in absent if not _is_of_a_deeper_model(name, len(model.blocks))}
    if not absent:
        return lora, []
    missing = {_module(name) if name in lora.diffs else name for name in absent}
    fitting = lora.part(lambda name: name not in absent)
    if not fitting.modules:
        raise UserError(
            f"{source} adapts {kinds(missing)}, and this model has no such module. Was it made for another Wan?"
        )
    are = "is" if len(missing) == 1 else "are"
    of_all = f"{len(missing)} of {len(lora.modules)} modules of {source}"
    return fitting, [f"{of_all} {are} not in this model ({kinds(missing)}): left out"]


def _fit_inputs(lora: LoraFile, model: WanModel, source: Path) -> tuple[LoraFile, list[str]]:
    """A change of the patch embedding for the inputs that the model has: the later ones are cut off, or unchanged.

    A control LoRA states the inputs that it needs, and they become the model's.
    """
    if PATCH in lora.input_shapes:
        return lora, []
    weight, diff, pair = model.patch_embedding.weight, lora.diffs.get(f"{PATCH}.diff"), lora.pairs.get(PATCH)
    if PATCH in lora.lycoris:
        diff = delta(lora.lycoris[PATCH])  # in full, which is small: its factors cannot be cut
    stored = diff if pair is None else pair.down
    if stored is None:
        return lora, []
    kernel, in_dim = weight.shape[2:], weight.shape[1]
    own, rest = divmod(stored.shape[1:].numel(), kernel.numel())  # convolutions come flattened too
    if rest or own == in_dim:
        return lora, []
    if PATCH in lora.magnitudes:
        raise UserError(
            f"{source} is a DoRA for a patch embedding of {own} input channels, and this model has {in_dim}.\n"
            "A DoRA depends on all inputs of a layer: use it on the Wan that it was made for."
        )
    fitted = pad_inputs(stored.reshape(len(stored), own, *kernel)[:, :in_dim], in_dim)
    shared = f"the first {min(own, in_dim)} are changed"
    note = f"{source} was made for {own} input channels, and this model has {in_dim}: {shared}"
    if pair is None:
        lycoris = {name: each for name, each in lora.lycoris.items() if name != PATCH}
        return replace(lora, diffs=lora.diffs | {f"{PATCH}.diff": fitted}, lycoris=lycoris), [note]
    return replace(lora, pairs=lora.pairs | {PATCH: replace(pair, down=fitted)}), [note]


def _is_of_a_deeper_model(name: str, num_blocks: int) -> bool:
    block = re.match(r"blocks\.(\d+)\.", name)
    return block is not None and int(block[1]) >= num_blocks


def _module(key: str) -> str:
    """The module of a delta: "x.diff" -> "x"."""
    return key.rpartition(".")[0]


def kinds(names: set[str]) -> str:
    """What kinds of modules or changes these are, without numbers of blocks: "cross_attn.k_img, img_emb"."""
    inner = (re.sub(r"^(?:vace_)?blocks\.\d+\.", "", name) for name in names)
    found = sorted({"img_emb" if name.startswith("img_emb.") else name for name in inner})
    return ", ".join(found[:MAX_SHOWN]) + (", ..." if len(found) > MAX_SHOWN else "")

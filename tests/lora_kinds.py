"""A small file of every kind of LoRA that people have, for a tiny model: tensors, metadata, adapter_config.json."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wan.modules.model import WanModel
from wan.names import diffusers_name

ATTENTION = [f"{part}.{x}" for part in ("self_attn", "cross_attn") for x in "qkvo"]
RANK = 2
DOWN_UP = ("lora_down.weight", "lora_up.weight")
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 1, "target_modules": ["q"]}


@dataclass(frozen=True)
class Kind:
    """A kind of file: what of it is a row's first two cells, and its content."""

    what: str
    made_by: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


class Maker:
    """Makes tensors that fit a model."""

    def __init__(self, model: WanModel) -> None:
        self.parameters = dict(model.named_parameters())
        self.linear = [f"blocks.{block}.{name}" for block in range(len(model.blocks)) for name in ATTENTION]
        self.linear += [f"blocks.{block}.ffn.{number}" for block in range(len(model.blocks)) for number in (0, 2)]
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=self.generator)

    def pairs(
        self,
        stem: Callable[[str], str],
        roles: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
        alpha: float | None = None,
    ) -> dict[str, Tensor]:
        tensors = {}
        for name in self.linear:
            out, width = self.parameters[f"{name}.weight"].shape
            tensors[f"{stem(name)}.{roles[0]}"] = self.draw(RANK, width)
            tensors[f"{stem(name)}.{roles[1]}"] = self.draw(out, RANK)
            if alpha is not None:
                tensors[f"{stem(name)}.alpha"] = torch.tensor(alpha)
        return tensors

    def like(self, name: str) -> Tensor:
        return self.draw(*self.parameters[name].shape)

    def factors(self, stem: Callable[[str], str], shapes: Callable[[int, int], dict[str, tuple[int, int]]]) -> dict:
        tensors = {}
        for name in self.linear:
            out, width = self.parameters[f"{name}.weight"].shape
            tensors |= {f"{stem(name)}.{role}": self.draw(*shape) for role, shape in shapes(out, width).items()}
            tensors[f"{stem(name)}.alpha"] = torch.tensor(1.0)
        return tensors

    def magnitudes(self, stem: Callable[[str], str], role: str) -> dict[str, Tensor]:
        lengths = {name: self.parameters[f"{name}.weight"].detach().norm(dim=1) for name in self.linear}
        shape = (-1, 1) if role == "dora_scale" else (-1,)
        return {f"{stem(name)}.{role}": 1.2 * length.reshape(shape) for name, length in lengths.items()}


def comfy(name: str) -> str:
    return f"diffusion_model.{name}"


def peft(name: str) -> str:
    return f"base_model.model.{name}"


def flat(name: str) -> str:
    return name.replace(".", "_")


def loha(out: int, width: int) -> dict[str, tuple[int, int]]:
    return {f"hada_w{n}_{side}": ((out, RANK) if side == "a" else (RANK, width)) for n in (1, 2) for side in "ab"}


def lokr(out: int, width: int) -> dict[str, tuple[int, int]]:
    return {"lokr_w1": (4, 4), "lokr_w2_a": (out // 4, RANK), "lokr_w2_b": (RANK, width // 4)}


def make_kinds(model: WanModel) -> list[Kind]:
    """The rows of docs/lora_formats.md, in their order."""
    make = Maker(model)
    diffusers = make.pairs(lambda name: f"transformer.{diffusers_name(name)}")
    return [*_plain_pairs(make, diffusers), *_more_than_pairs(make), *_widened(make, diffusers)]


def _plain_pairs(make: Maker, diffusers: dict[str, Tensor]) -> list[Kind]:
    config = {"r": RANK, "lora_alpha": 1, "target_modules": [diffusers_name(name) for name in make.linear]}
    stated = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    stated_second = {key: text.replace("transformer.", "transformer_2.") for key, text in stated.items()}
    second = {key.replace("transformer.", "transformer_2."): tensor for key, tensor in diffusers.items()}
    biases = {f"transformer.{diffusers_name(name)}.lora_B.bias": make.like(f"{name}.bias") for name in make.linear}
    own = make.pairs(comfy, alpha=1.0)
    wrapped = make.pairs(lambda name: comfy(f"_orig_mod.{name}"), alpha=1.0)
    musubi = make.pairs(lambda name: f"lora_unet_{flat(name)}", DOWN_UP, 1.0)
    fun = make.pairs(lambda name: f"lora_unet__{flat(name)}", DOWN_UP, 1.0)
    onetrainer = make.pairs(lambda name: f"lora_transformer_{flat(name)}", DOWN_UP, 1.0)
    diffsynth = make.pairs(lambda name: name, ("lora_A.default.weight", "lora_B.default.weight"))
    return [
        Kind("`diffusion_model.` `lora_A`/`lora_B`", "this trainer, diffusion-pipe, ai-toolkit", own),
        Kind("`lora_unet_` `lora_down`/`lora_up`", "musubi-tuner", musubi),
        Kind("`lora_unet__`", "VideoX-Fun", fun),
        Kind("`lora_transformer_`", "OneTrainer", onetrainer),
        Kind("`transformer.`, names of diffusers", "diffusers, finetrainers", diffusers, stated),
        Kind("the same with `lora_B.bias`", "diffusers", diffusers | biases),
        Kind("`transformer_2.` alone", "diffusers, low noise", second, stated_second),
        Kind("alpha in the metadata `lora_alpha` alone", "some tools", make.pairs(comfy), {"lora_alpha": "1"}),
        Kind("no prefix, `lora_A.default`", "DiffSynth-Studio", diffsynth),
        Kind("no prefix", "WanTraining", make.pairs(lambda name: name)),
        Kind("folder of PEFT", "PEFT", make.pairs(peft), config=CONFIG),
        Kind("`_orig_mod.`, `module.` in names", "compiled, parallel", wrapped),
    ]


def _more_than_pairs(make: Maker) -> list[Kind]:
    biases = {f"{comfy(name)}.diff_b": make.like(f"{name}.bias") for name in make.linear}
    normed = ("blocks.0.norm3", "blocks.0.self_attn.norm_q")
    norms = {f"{comfy(name)}.diff": make.like(f"{name}.weight") for name in normed}
    head = {f"{comfy('head.head')}.diff": make.like("head.head.weight")}
    head |= {f"{comfy('head.head')}.diff_b": make.like("head.head.bias")}
    modulation = {comfy("blocks.0.diff_m"): make.like("blocks.0.modulation")}
    full = {f"{comfy(name)}.diff": make.like(f"{name}.weight") for name in make.linear}
    musubi_loha = make.factors(lambda name: f"lora_unet_{flat(name)}", loha)
    simpletuner = make.factors(lambda name: f"lycoris_{flat(diffusers_name(name))}", lokr)
    kohya_dora = make.pairs(comfy, DOWN_UP, 1.0) | make.magnitudes(comfy, "dora_scale")
    peft_dora = make.pairs(peft) | make.magnitudes(peft, "lora_magnitude_vector")
    return [
        Kind("pairs with `.diff_b` and `.diff`", "LightX2V", make.pairs(comfy, DOWN_UP) | biases | norms | head),
        Kind("the same with `diff_m`", "LightX2V", make.pairs(comfy, DOWN_UP) | biases | modulation),
        Kind("`.diff` alone", "extracted", full),
        Kind("LoHa", "musubi-tuner, LyCORIS", musubi_loha),
        Kind("LoKr", "ai-toolkit", make.factors(comfy, lokr)),
        Kind("LoKr, `lycoris_`", "SimpleTuner", simpletuner),
        Kind("DoRA, `dora_scale`", "LyCORIS", kohya_dora),
        Kind("DoRA, `lora_magnitude_vector`", "PEFT", peft_dora, config=CONFIG | {"use_dora": True}),
    ]


def _widened(make: Maker, diffusers: dict[str, Tensor]) -> list[Kind]:
    dim = len(make.parameters["patch_embedding.weight"])
    wide = make.pairs(comfy, alpha=1.0) | {
        comfy("patch_embedding.lora_A.weight"): make.draw(RANK, 32, 1, 2, 2),
        comfy("patch_embedding.lora_B.weight"): make.draw(dim, RANK, 1, 1, 1),
        comfy("patch_embedding.alpha"): torch.tensor(1.0),
        comfy("patch_embedding.reshape_weight"): torch.tensor([dim, 32, 1, 2, 2]),
    }
    full = make.pairs(comfy, alpha=1.0) | {comfy("patch_embedding.diff"): make.draw(dim, 32, 1, 2, 2)}
    both = diffusers | {key.replace("transformer.", "transformer_2."): -tensor for key, tensor in diffusers.items()}
    return [
        Kind("control LoRA, `reshape_weight`", "this trainer", wide),
        Kind("control LoRA, `patch_embedding.diff`", "fully trained", full),
        Kind("`transformer.` and `transformer_2.`", "diffusers, both experts", both),
    ]

"""One transformer on disk, known by the names and shapes of its tensors and, where there is one, by its config.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan.checkpoints.errors import CheckpointError, shown
from wan.checkpoints.files import read_json
from wan.checkpoints.tensors import Shape
from wan.checkpoints.variants import refuse_variant_by_tensors
from wan.checkpoints.weights import Weights, count_blocks, read_weights, reading_widths
from wan.configs import Traits
from wan.modules.model import WanShape

CONFIG = "config.json"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
INDEX = f"{TRANSFORMER}.index.json"
WIDTHS = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim", "patch_size")  # in the tensors
_HEAD_DIM = 128  # channels of an attention head of every released Wan
_SMALLEST_HEAD = 6  # channels: a pair for each axis of its rotated positions
_LONGEST_TEXT = 2**16  # tokens; no Wan reads more than 512
# What diffusers' config.json calls the same.
_DIFFUSERS = {"in_channels": "in_dim", "out_channels": "out_dim", "num_attention_heads": "num_heads"}


@dataclass(frozen=True)
class Config:
    """What a transformer's config.json says, in the official terms."""

    path: Path
    values: Mapping[str, Any]
    is_official: bool = True

    def term(self, name: str) -> str:
        """What this config calls what is called `name` officially."""
        return name if self.is_official else next((own for own, ours in _DIFFUSERS.items() if ours == name), name)

    @property
    def is_of_transformer(self) -> bool:
        """Whether it is a transformer's at all; in diffusers every part has a config.json."""
        return "num_heads" in self.values and ("dim" if self.is_official else "attention_head_dim") in self.values

    @property
    def task(self) -> Any:
        """The task that an official config.json states."""
        return self.values.get("model_type")

    def traits(self, is_alone: bool) -> Traits:
        """What it says of the family. Without the tensors an official one does not tell whether image tokens are read.

        They are where the task starts from pictures and the transformer `is_alone`, not one of two experts.
        """
        dim, in_dim, out_dim = (self.values.get(name) for name in ("dim", "in_dim", "out_dim"))
        if self.is_official:
            image = None if self.task is None else self.task in ("i2v", "flf2v") and is_alone
            return Traits(dim, in_dim, out_dim, image, task=self.task)
        image, positions = (bool(self.values.get(name)) for name in ("image_dim", "pos_embed_seq_len"))
        return Traits(dim, in_dim, out_dim, image, positions)


@dataclass(frozen=True)
class TransformerFiles(Weights):
    """A transformer: where each of its tensors is, and its widths."""

    shape: WanShape

    @property
    def traits(self) -> Traits:
        """What its tensors say of the family."""
        shape = self.shape
        return Traits(shape.dim, shape.in_dim, shape.out_dim, shape.image_dim > 0, shape.image_positions > 0)


def read_config(folder: Path) -> Config:
    """The config.json in the folder of a transformer. Raises CheckpointError if it is missing or not a JSON object."""
    path = folder / CONFIG
    values = read_json(path)
    if "dim" in values or "model_type" in values:
        return Config(path, values)
    values = {_DIFFUSERS.get(name, name): value for name, value in values.items()}
    head_dim, num_heads = values.get("attention_head_dim", _HEAD_DIM), values.get("num_heads")
    if type(head_dim) is int and type(num_heads) is int:
        values["dim"] = head_dim * num_heads
    return Config(path, values, is_official=False)


def read_transformer(path: Path, own: Config | None = None, others: Iterable[Config] = ()) -> TransformerFiles:
    """The transformer in a file, or in a folder as one file or as shards.

    Widths come from the tensors, so that a Wan of any size loads. The rest is from its `own` config.json, or from the
    first of the `others` that has the same widths, or else as in all released models. Raises CheckpointError for a
    missing or unreadable file, for tensors that are not a Wan's, for a variant of Wan that is not trained here, and
    where the tensors and the transformer's own config disagree.
    """
    weights = read_weights(path, "transformer")
    refuse_variant_by_tensors(weights.path, weights.shapes)
    shape = _read_shape(weights.path, weights.shapes)
    if own is not None and (fault := _disagreement(shape, own)):
        raise CheckpointError(f"{own.path} {fault}")
    config = own or next((config for config in others if not _disagreement(shape, config)), None)
    shape = _released(shape, weights.path) if config is None else _complete(shape, config)
    return TransformerFiles(weights.path, weights.tensors, shape)


def _read_shape(path: Path, shapes: Mapping[str, Shape]) -> WanShape:
    with reading_widths(path):
        dim, in_dim, frames, height, width = shapes["patch_embedding.weight"]
        return WanShape(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_layers=count_blocks(shapes),
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // (frames * height * width),
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
            patch_size=(frames, height, width),
            image_dim=shapes.get("img_emb.proj.1.weight", (0, 0))[1],
            image_positions=shapes.get("img_emb.emb_pos", (1, 0))[1],
        )


def _disagreement(shape: WanShape, config: Config) -> str:
    """What a config says otherwise than the tensors; an empty string where they agree."""
    for name in WIDTHS:
        ours, theirs = getattr(shape, name), config.values.get(name)
        if name in config.values and theirs not in (ours, list(ours) if isinstance(ours, tuple) else ours):
            return f"says {config.term(name)} {shown(theirs)}, but the weights have {ours}"
    return ""


def _released(shape: WanShape, path: Path) -> WanShape:
    """The shape with what no tensor tells, as all released models have it."""
    if shape.dim % _HEAD_DIM:
        fault = f"has the width {shape.dim}, which is no multiple of {_HEAD_DIM}: its number of heads is not known"
        raise CheckpointError(f"{path} {fault}; it needs a {CONFIG} beside it")
    return replace(shape, num_heads=shape.dim // _HEAD_DIM)


def _complete(shape: WanShape, config: Config) -> WanShape:
    """The shape with what no tensor tells: the number of heads, eps and the text length."""
    heads = config.term("num_heads")
    if "num_heads" not in config.values:
        raise CheckpointError(f"{config.path} does not state {heads}, the number of heads, which no tensor tells")
    try:
        if isinstance(config.values["num_heads"], bool):
            raise TypeError
        num_heads, eps = int(config.values["num_heads"]), float(config.values.get("eps", 1e-6))
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{config.path} lacks a valid {heads} or eps") from None
    if num_heads < 1 or shape.dim % num_heads:
        raise CheckpointError(f"{config.path}: {shown(num_heads)} heads do not divide the width {shape.dim}")
    if shape.dim // num_heads < _SMALLEST_HEAD or shape.dim // num_heads % 2:
        fact = f"{shown(num_heads)} heads of the width {shape.dim} have {shape.dim // num_heads} channels"
        raise CheckpointError(f"{config.path}: {fact}, where an even number of at least {_SMALLEST_HEAD} is needed")
    if not 0 < eps < 1:
        raise CheckpointError(f"{config.path} lacks a valid {heads} or eps: eps is {eps}")
    text_len = config.values.get("text_len", 512)
    if type(text_len) is not int or not 0 < text_len <= _LONGEST_TEXT:
        raise CheckpointError(f"{config.path}: text_len must be a positive whole number, not {shown(repr(text_len))}")
    return replace(shape, num_heads=num_heads, eps=eps, text_len=text_len)

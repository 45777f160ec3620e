"""One transformer on disk, known by its config.json and the headers of its safetensors files."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan.checkpoints.errors import CheckpointError
from wan.checkpoints.tensors import Shape, read_shapes
from wan.checkpoints.variants import refuse_variant_by_tensors
from wan.modules.model import WanShape

CONFIG = "config.json"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
INDEX = f"{TRANSFORMER}.index.json"
WIDTHS = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim", "patch_size")  # in the tensors
LONGEST_TEXT = 2**16  # tokens; no Wan reads more than 512


@dataclass(frozen=True)
class Config:
    """What a transformer's config.json says."""

    path: Path
    values: Mapping[str, Any]


@dataclass(frozen=True)
class TransformerFiles:
    """A transformer: which file holds each of its tensors, and its widths."""

    path: Path  # the file, or the index of the shards
    tensors: Mapping[str, Path]  # official name -> file, in the order of reading
    shape: WanShape


def read_config(folder: Path) -> Config:
    """The config.json in the folder of a transformer. Raises CheckpointError if it is missing or not a JSON object."""
    path = existing(folder / CONFIG)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return Config(path, values)


def read_transformer(path: Path, config: Config) -> TransformerFiles:
    """The transformer in a file, or in a folder as one file or as shards with their index.

    Widths come from the tensors, so that a Wan of any size loads; `config` adds what no tensor has. Raises
    CheckpointError for a missing or unreadable file, for tensors that are not a Wan's, for a variant of Wan that is not
    trained here, and where tensors and config disagree.
    """
    path, files = _find_files(path) if path.is_dir() else (existing(path), [path])
    shapes: dict[str, Shape] = {}
    tensors: dict[str, Path] = {}
    for file in files:
        found = read_shapes(file)
        shapes |= found
        tensors |= dict.fromkeys(found, file)
    refuse_variant_by_tensors(path, shapes)
    return TransformerFiles(path, tensors, _transformer_shape(path, shapes, config))


def existing(path: Path) -> Path:
    """The path of a file or folder. Raises CheckpointError if there is none."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the official layout of a model has it")
    return path


@contextmanager
def reading_widths(path: Path) -> Iterator[None]:
    """Inside, a tensor that is missing or has other axes than the official one becomes a CheckpointError."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the tensor {error.args[0]}: not the official layout") from None
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} has a tensor of unexpected shape: {error}") from None


def count_blocks(names: Mapping[str, object]) -> int:
    """The number of blocks that tensors of these names belong to."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The one file, or the index and the shards that it names."""
    if (folder / TRANSFORMER).exists():
        return folder / TRANSFORMER, [folder / TRANSFORMER]
    index = existing(folder) / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {TRANSFORMER} nor {INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a valid index of safetensors shards") from None
    # A name from a file's content is never followed out of the folder.
    if outside:
        raise CheckpointError(f"{index} names a shard outside its folder: {outside[0]}")
    return index, [existing(folder / name) for name in names]


def _transformer_shape(path: Path, shapes: Mapping[str, Shape], config: Config) -> WanShape:
    with reading_widths(path):
        dim, in_dim, frames, height, width = shapes["patch_embedding.weight"]
        shape = WanShape(
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
    for name in WIDTHS:
        ours, theirs = getattr(shape, name), config.values.get(name)
        if name in config.values and theirs not in (ours, list(ours) if isinstance(ours, tuple) else ours):
            raise CheckpointError(f"{config.path} says {name} {theirs}, but the weights have {ours}")
    return _complete(shape, config)


def _complete(shape: WanShape, config: Config) -> WanShape:
    """The shape with what no tensor tells: the number of heads, eps and the text length."""
    try:
        num_heads, eps = int(config.values["num_heads"]), float(config.values.get("eps", 1e-6))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{config.path} lacks a valid num_heads or eps") from None
    if num_heads < 1 or shape.dim % num_heads:
        raise CheckpointError(f"{config.path}: {num_heads} heads do not divide the width {shape.dim}")
    if not 0 < eps < 1:
        raise CheckpointError(f"{config.path} lacks a valid num_heads or eps: eps is {eps}")
    text_len = config.values.get("text_len", 512)
    if type(text_len) is not int or not 0 < text_len <= LONGEST_TEXT:
        raise CheckpointError(f"{config.path}: text_len must be a positive whole number, not {text_len!r}")
    return replace(shape, num_heads=num_heads, eps=eps, text_len=text_len)

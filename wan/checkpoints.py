"""From a model folder in the official layout to loaded modules: meta device, assign, strict names.

    config.json, diffusion_pytorch_model*.safetensors (one file, or shards with their index)
    Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/

Widths are read from the tensors, so a Wan of any size in this layout loads. Nothing is ever unpickled: `.pth` files
are read with weights_only. This is the only file here that opens weights.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from easydict import EasyDict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan.configs import CONFIGS, find_config
from wan.modules.model import WanModel, WanShape, is_fp32
from wan.modules.t5 import TextEncoder, UMT5Encoder
from wan.modules.tokenizers import Tokenizer
from wan.modules.vae import WanVAE

TRANSFORMER = "diffusion_pytorch_model.safetensors"
VAE = "Wan2.1_VAE.pth"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
HUB_PATTERNS = ("config.json", "diffusion_pytorch_model*", VAE, TEXT_ENCODER, f"{TOKENIZER}/*")
LOCAL_MODELS = Path("models")
Progress = Callable[[list[str]], Iterable[str]]


class CheckpointError(Exception):
    """A model folder or file cannot be used; the message names it and says what to do."""


def find_model(name_or_path: str) -> Path:
    """The folder of a model: a path as given, or a hub name that stands under ./models/.

    Raises CheckpointError where neither is there.
    """
    for folder in (Path(name_or_path), LOCAL_MODELS / name_or_path):
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"no model at {name_or_path} or {LOCAL_MODELS / name_or_path}\n"
        f"download it with: python train_wan_lora.py --download_model --pretrained_model_name_or_path {name_or_path}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; raises CheckpointError where it is missing or not a JSON object."""
    path = _existing(folder / "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return config


def load_config(folder: Path) -> EasyDict:
    """The row of `wan.configs` for the model in this folder; raises CheckpointError for one that is not supported."""
    config = read_config(folder)
    task, in_dim = config.get("model_type"), config.get("in_dim")
    row = find_config(task, in_dim)
    if row is None:
        known = ", ".join(sorted({f"{row.task} with {row.in_dim}" for row in CONFIGS.values()}))
        raise CheckpointError(f"{folder} is a {task} model with {in_dim} input channels; supported: {known}")
    return row


def text_length(folder: Path) -> int:
    """The number of text tokens the transformer was made for."""
    length = read_config(folder).get("text_len", 512)
    if not isinstance(length, int) or length < 1:
        raise CheckpointError(f"{folder}/config.json: text_len must be a positive whole number, not {length!r}")
    return length


def transformer_layout(folder: Path) -> WanModel:
    """The transformer without its weights, on the meta device: what it has is known before minutes are spent on it."""
    with torch.device("meta"):
        return WanModel(_transformer_shape(folder, _tensor_shapes(_transformer_files(folder))))


def load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", progress: Progress = iter
) -> WanModel:
    """The frozen transformer on `device`; its linear layers in `dtype`, its fp32 islands (`is_fp32`) in fp32.

    Tensors are read one by one straight to the device, so host memory never holds a second copy; `progress` may wrap
    the list of their names in a bar. Raises CheckpointError for a missing, foreign or misshapen tensor, or a file that
    cannot be read.
    """
    files = _transformer_files(folder)
    shapes = _tensor_shapes(files)
    shape = _transformer_shape(folder, shapes)
    state = {}
    tensors = _tensors(files, device)
    for _ in progress(list(shapes)):
        name, tensor = next(tensors)
        state[name] = tensor.to(torch.float32 if is_fp32(name) else dtype)
    return _assign(lambda: WanModel(shape), state, folder / TRANSFORMER)


def load_vae(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
    """The frozen VAE, fp32 as in official use. Raises CheckpointError as `load_transformer` does."""
    path = _existing(folder / VAE)
    state = _read_pth(path)
    with _fitting(path):
        base, z_dim = len(state["encoder.conv1.weight"]), len(state["conv2.weight"])
        vae = _assign(lambda: WanVAE(dim=base, z_dim=z_dim), state, path)
    return vae.to(device, dtype)


def load_text_encoder(folder: Path, text_len: int, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """The frozen UMT5 encoder with its tokenizer, which truncates to `text_len`. Raises CheckpointError."""
    path = _existing(folder / TEXT_ENCODER)
    try:
        tokenizer = Tokenizer(_existing(folder / TOKENIZER), text_len)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / TOKENIZER} does not hold a tokenizer: {error}") from None
    state = _read_pth(path)
    with _fitting(path):
        vocab_size, dim = state["token_embedding.weight"].shape
        num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        widths = {
            "vocab_size": vocab_size,
            "dim": dim,
            "dim_attn": len(state["blocks.0.attn.q.weight"]),
            "dim_ffn": len(state["blocks.0.ffn.fc1.weight"]),
            "num_heads": num_heads,
            "num_layers": _count_blocks(state),
            "num_buckets": num_buckets,
        }
        encoder = _assign(lambda: UMT5Encoder(**widths), state, path)
    return TextEncoder(encoder.to(device, dtype), tokenizer)


def text_encoder_bytes(folder: Path) -> int:
    """The size of the text encoder's weights as stored (bf16)."""
    return _existing(folder / TEXT_ENCODER).stat().st_size


def text_encoder_fingerprint(folder: Path, text_len: int, dtype: torch.dtype) -> str:
    """A name for what this text encoder computes: equal for equal weights, tokenizer, length and dtype."""
    return _fingerprint(f"{text_len} {dtype}", folder / TEXT_ENCODER, folder / TOKENIZER / "tokenizer.json")


def vae_fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """A name for what this VAE computes: equal for equal weights and dtype."""
    return _fingerprint(f"{dtype}", folder / VAE)


def _fingerprint(settings: str, *paths: Path) -> str:
    """Reads 64 evenly spaced windows of a large file, not all 11 GB; a fine-tuned one differs in every one."""
    digest = hashlib.sha256(settings.encode())
    for path in map(_existing, paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if size <= 2**25:
                digest.update(file.read())
                continue
            for window in range(64):
                file.seek(window * (size - 2**16) // 63)
                digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; a model folder has the official layout "
            f"(config.json, {TRANSFORMER}, {VAE}, {TEXT_ENCODER}, {TOKENIZER}/)"
        )
    return path


def _transformer_files(folder: Path) -> list[Path]:
    """The one file, or the shards that the index names."""
    if (folder / TRANSFORMER).exists():
        return [folder / TRANSFORMER]
    index = _existing(folder).joinpath(f"{TRANSFORMER}.index.json")
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {TRANSFORMER} nor {index.name}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a valid index of safetensors shards") from None
    # A name from a file's content is never followed out of the folder.
    if foreign:
        raise CheckpointError(f"{index} names a shard outside its folder: {foreign[0]}")
    return [_existing(folder / name) for name in names]


def _transformer_shape(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> WanShape:
    config = read_config(folder)
    with _fitting(folder / TRANSFORMER):
        dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
        widths = {
            "dim": dim,
            "in_dim": in_dim,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_layers": _count_blocks(shapes),
            "out_dim": shapes["head.head.weight"][0] // (patch_size[0] * patch_size[1] * patch_size[2]),
            "text_dim": shapes["text_embedding.0.weight"][1],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "patch_size": tuple(patch_size),
        }
    for name, value in widths.items():
        if name in config and config[name] not in (value, list(value) if isinstance(value, tuple) else value):
            raise CheckpointError(f"{folder}: config.json says {name} {config[name]}, but the weights have {value}")
    try:  # what no tensor's shape tells
        widths |= {"num_heads": int(config["num_heads"]), "eps": float(config.get("eps", 1e-6))}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{folder}/config.json lacks a valid num_heads or eps") from None
    if widths["num_heads"] < 1 or dim % widths["num_heads"]:
        raise CheckpointError(f"{folder}/config.json: {widths['num_heads']} heads do not divide the width {dim}")
    return WanShape(**widths, text_len=text_length(folder))


def _count_blocks(names: Mapping[str, Any]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _open_safetensors(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _tensors(files: list[Path], device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _open_safetensors(path, device) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


@contextmanager
def _open_safetensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}\ndownload it again") from None


def _read_pth(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors from a .pth file, memory-mapped; never unpickles anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a complete file of plain tensors: {reason}\ndownload it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a flat dictionary of tensors")
    return state


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Turns a tensor that the widths are read from, but that is missing or flat, into an error that names it."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the tensor {error.args[0]}: not the official layout") from None
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} has a tensor of unexpected shape: {error}") from None


def _assign(build: Callable[[], nn.Module], state: dict[str, Tensor], path: Path) -> nn.Module:
    """Builds the module without memory and gives it the tensors; strict in names and shapes; frozen, in eval mode."""
    with torch.device("meta"):
        module = build()
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    misshapen = [name for name in expected if name in state and expected[name].shape != state[name].shape]
    for names, fault in ((missing, "lacks"), (foreign, "has the foreign"), (misshapen, "has a wrong shape of")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{path} {fault} tensor {', '.join(names[:3])}{more}")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

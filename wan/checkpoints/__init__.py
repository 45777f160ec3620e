"""From a model's folder or files to loaded modules.

files = open_model("Wan-AI/Wan2.1-T2V-1.3B")                    what it is and where its parts are: read once
model = load_transformer(files.transformer, torch.bfloat16)     one transformer
vae = load_vae(files)
"""

from wan.checkpoints.errors import CheckpointError, MissingPartsError, ModelNotFoundError
from wan.checkpoints.families import TRANSFORMERS
from wan.checkpoints.files import LOCAL_MODELS
from wan.checkpoints.find import (
    PARTS,
    ModelFiles,
    find_family,
    find_model,
    find_tokenizer,
    open_model,
)
from wan.checkpoints.fingerprints import (
    text_encoder_fingerprint,
    transformer_fingerprint,
    vae_fingerprint,
    vision_fingerprint,
)
from wan.checkpoints.load import (
    Place,
    Progress,
    all_to,
    cast_to,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vision_encoder,
    load_weights,
    read_some,
)
from wan.checkpoints.parts import build_text_encoder, build_transformer
from wan.checkpoints.stored import FP8, GROUPS, Quantised, Stored, decode, rotate_columns, rotation, values_of
from wan.checkpoints.tensors import surplus_bytes
from wan.checkpoints.tokenizer import TOKENIZER
from wan.checkpoints.transformer import INDEX, TRANSFORMER, TransformerFiles
from wan.checkpoints.weights import Weights, read_weights

__all__ = [
    "FP8",
    "GROUPS",
    "INDEX",
    "LOCAL_MODELS",
    "PARTS",
    "TOKENIZER",
    "TRANSFORMER",
    "TRANSFORMERS",
    "CheckpointError",
    "MissingPartsError",
    "ModelFiles",
    "ModelNotFoundError",
    "Place",
    "Progress",
    "Quantised",
    "Stored",
    "TransformerFiles",
    "Weights",
    "all_to",
    "build_text_encoder",
    "build_transformer",
    "cast_to",
    "decode",
    "find_family",
    "find_model",
    "find_tokenizer",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "load_vision_encoder",
    "load_weights",
    "open_model",
    "read_some",
    "read_weights",
    "rotate_columns",
    "rotation",
    "surplus_bytes",
    "text_encoder_fingerprint",
    "transformer_fingerprint",
    "vae_fingerprint",
    "values_of",
    "vision_fingerprint",
]

"""From a model's folder or files to loaded modules.

files = open_model("Wan-AI/Wan2.1-T2V-1.3B")                    what it is and where its parts are: read once
model = load_transformer(files.transformer, torch.bfloat16)     one transformer
vae = load_vae(files)
"""

from wan.checkpoints.errors import CheckpointError, ModelNotFoundError
from wan.checkpoints.find import LOCAL_MODELS, ModelFiles, find_family, find_model, open_model
from wan.checkpoints.fingerprints import text_encoder_fingerprint, vae_fingerprint, vision_fingerprint
from wan.checkpoints.headers import INDEX, TRANSFORMER, TransformerFiles
from wan.checkpoints.load import (
    Place,
    Progress,
    build_transformer,
    cast_to,
    check_vae,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vision_encoder,
    load_weights,
)

__all__ = [
    "INDEX",
    "LOCAL_MODELS",
    "TRANSFORMER",
    "CheckpointError",
    "ModelFiles",
    "ModelNotFoundError",
    "Place",
    "Progress",
    "TransformerFiles",
    "build_transformer",
    "cast_to",
    "check_vae",
    "find_family",
    "find_model",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "load_vision_encoder",
    "load_weights",
    "open_model",
    "text_encoder_fingerprint",
    "vae_fingerprint",
    "vision_fingerprint",
]

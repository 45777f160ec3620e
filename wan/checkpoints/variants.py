"""Models made from Wan that are not trained here yet, recognised so that they can be refused by name.

A variant is known by tensors that no other model has, or by its channels. A Fun model with exactly the layout of a
released one is that model (Fun-14B-InP: Wan 2.1 I2V, Fun-A14B-InP: Wan 2.2 I2V): it is no variant.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from wan.checkpoints.errors import CheckpointError
from wan.checkpoints.tensors import Shape
from wan.configs import Traits

_VACE, _CAMERA, _CONTROL, _INPAINT = "Wan 2.1 VACE", "Control-Camera", "Control", "InP"
_S2V, _HUMO, _ANIMATE = "Wan 2.2 S2V", "HuMo", "Wan 2.2 Animate"
_FUN = (_CAMERA, _CONTROL, _INPAINT)
_SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}

# A model that has several of these tensors or settings is the first.
_BY_TENSOR = {
    "vace_patch_embedding.weight": _VACE,
    "control_adapter.conv.weight": _CAMERA,
    "casual_audio_encoder.encoder.final_linear.weight": _S2V,  # the official spelling
    "audio_proj.audio_proj_glob_1.layer.bias": _HUMO,
    "face_adapter.fuser_blocks.0.k_norm.weight": _ANIMATE,
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
    "ref_conv.weight": _CONTROL,
}
_BY_TASK = {"vace": _VACE, "s2v": _S2V, "humo": _HUMO, "animate": _ANIMATE}
_BY_CLASS = {"WanVACETransformer3DModel": _VACE, "WanAnimateTransformer3DModel": _ANIMATE}  # in diffusers
_BY_SETTING = {"vace_layers": _VACE, "add_control_adapter": _CAMERA, "add_ref_conv": _CONTROL}
# Input channels, output channels, whether it reads image tokens
_BY_CHANNELS = {
    (48, 16, True): _CONTROL,
    (32, 16, True): _CAMERA,
    (52, 16, False): _CONTROL,
    (148, 48, False): _CONTROL,
    (100, 48, False): _INPAINT,
}


def refuse_variant_by_tensors(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Raises CheckpointError, with the name of the model, where the tensors at `path` are a variant's."""
    dim, in_dim, *_ = (*shapes.get("patch_embedding.weight", ()), 0, 0)
    rows = (*shapes.get("head.head.weight", ()), 0)[0]
    traits = Traits(dim, in_dim, rows // 4, "img_emb.proj.1.weight" in shapes)
    for tensor, variant in _BY_TENSOR.items():
        if tensor in shapes:
            _refuse(path, traits, variant, f"it has {tensor}")
    if variant := _by_channels(traits):
        tokens = "and reads image tokens" if traits.image else "and reads no image tokens"
        _refuse(path, traits, variant, f"it has {in_dim} input channels {tokens}")


def refuse_variant_by_config(path: Path, values: Mapping[str, Any], traits: Traits) -> None:
    """Raises CheckpointError, with the name of the model, where the config.json at `path` is a variant's.

    `traits` is what the same `values` say of the family.
    """
    for name, variant in _BY_TASK.items():
        if traits.task == name:
            _refuse(path, traits, variant, f"model_type {name}")
    for class_name, variant in _BY_CLASS.items():
        if values.get("_class_name") == class_name:
            _refuse(path, traits, variant, class_name)
    for setting, variant in _BY_SETTING.items():
        if values.get(setting):
            _refuse(path, traits, variant, setting)
    if variant := _by_channels(traits):
        _refuse(path, traits, variant, f"model_type {traits.task} with {traits.in_dim} input channels")


def _by_channels(traits: Traits) -> str:
    """The variant that has these channels, or an empty string."""
    channels = traits.in_dim, traits.out_dim, bool(traits.image)
    if channels == (36, 16, True) and traits.dim == 1536:  # the only I2V of this width is Fun's
        return _INPAINT
    return next((variant for key, variant in _BY_CHANNELS.items() if key == channels), "")


def _full_name(variant: str, traits: Traits) -> str:
    """The name of a variant with its size where that was released."""
    size = _SIZES.get(traits.dim, "") if isinstance(traits.dim, int) else ""
    if variant not in _FUN:
        return f"{variant}-{size}" if size and variant.startswith("Wan ") else variant
    release = "Wan 2.1 Fun" if traits.image else "Wan 2.2 Fun"
    if size == "14B" and not traits.image:
        size = "A14B"
    return "-".join(part for part in (release, size, variant) if part)


def _refuse(path: Path, traits: Traits, variant: str, sign: str) -> NoReturn:
    raise CheckpointError(f"{path} is of {_full_name(variant, traits)} ({sign}): not trained here yet")

"""VideoX-Fun's option names that are no options here (https://github.com/aigc-apps/VideoX-Fun).

Each stands for what is always so here, or is translated; a value with which it would mean something else is refused.
Names of the same meaning are aliases of the options. docs/videox_fun.md lists both.
"""

from utils.common.console import say
from utils.common.errors import UserError
from utils.common.options import Replaced

DTYPES = {"bf16": "bf16", "no": "fp32"}
WHOLE = ("blocks.", "img_emb.")  # how whole names of layers begin


def _target_name(values: list[object]) -> dict[str, object]:
    """Names such as "q,ffn.0", by PEFT's rule: a layer is adapted if its name is one of them, or ends with . and it."""
    names = ",".join(map(str, values)).replace(" ", "").split(",")
    return {"lora_target": [name if name.startswith(WHOLE) else f"*.{name}" for name in names if name]}


def _mixed_precision(values: list[object]) -> dict[str, object]:
    given = _one("mixed_precision", values)
    if given not in DTYPES:
        reason = "; nothing here computes in fp16, whose range is small: give bf16" if given == "fp16" else ""
        raise UserError(f"--mixed_precision must be {' or '.join(DTYPES)}, not {given!r}{reason}")
    return {"weight_dtype": DTYPES[given]}


def _config_path(values: list[object]) -> dict[str, object]:
    say(f"--config_path {_one('config_path', values)} is not needed: what it says is known of each model")
    return {}


def _vae_mini_batch(values: list[object]) -> dict[str, object]:
    if (given := _one("vae_mini_batch", values)) != "1":
        raise UserError(f"--vae_mini_batch must be 1, not {given!r}: clips are encoded one at a time here")
    return {}


def _enable_bucket(values: list[object]) -> dict[str, object]:
    _need_on(
        "enable_bucket", values, "clips always have the nearest of several shapes; for squares alone see --buckets"
    )
    return {}


def _uniform_sampling(values: list[object]) -> dict[str, object]:
    _need_on("uniform_sampling", values, "noise levels are always uniform before --shift")
    return {}


def _use_peft_lora(values: list[object]) -> dict[str, object]:
    _need_on("use_peft_lora", values, "LoRAs are always PEFT's")
    return {}


def _low_vram(values: list[object]) -> dict[str, object]:
    """There encoders and transformers take turns on the GPU."""
    _need_on("low_vram", values, "the text encoder is never on the GPU beside the transformer")
    return {"overlap_encoding": False}


def _one(name: str, values: list[object]) -> str:
    if len(values) != 1:
        raise UserError(f"--{name} needs one value, not {len(values)}")
    return str(values[0])


def _need_on(name: str, values: list[object], always: str) -> None:
    """Raises UserError where something is switched off that is always on, or a flag is given a value."""
    if values == [False]:
        raise UserError(f"--{name} cannot be off: {always}")
    if values not in ([], [True]):
        raise UserError(f"--{name} takes no value, not {' '.join(map(str, values))!r}")


VIDEOX_FUN: Replaced = {
    "target_name": _target_name,
    "mixed_precision": _mixed_precision,
    "config_path": _config_path,
    "vae_mini_batch": _vae_mini_batch,
    "enable_bucket": _enable_bucket,
    "uniform_sampling": _uniform_sampling,
    "use_peft_lora": _use_peft_lora,
    "low_vram": _low_vram,
}

"""WanTraining's option names that are no options here (https://github.com/spacepxl/WanTraining, commit b1c37d9).

Each is translated where it has a meaning here, and otherwise answered with what to use instead.
"""

from utils.adapters.lora import TARGETS
from utils.common.errors import UserError
from utils.common.options import Replaced
from utils.media.controls import CONTROL_TYPES, FROM_FILE


def _lora_targets(values: list[object]) -> dict[str, object]:
    """Words such as "self_attn, ffn": a layer is adapted if its name contains one of them."""
    words = ",".join(map(str, values)).replace(" ", "").split(",")
    return {"lora_target": [word if word in TARGETS else f"*{word}*" for word in words if word]}


def _training_control(values: list[object]) -> dict[str, object]:
    """There "none" works with control files only, and "tile" is ignored where control files are used."""
    kind = _control_preprocess(values)
    return {"load_control": True} if kind == FROM_FILE else {"control_type": kind}


def _sampling_control(values: list[object]) -> dict[str, object]:
    return {"control_type": _control_preprocess(values)}


def _control_preprocess(values: list[object]) -> str:
    kinds = {"none": FROM_FILE} | {kind: kind for kind in CONTROL_TYPES}
    given = " ".join(map(str, values))
    if given not in kinds:
        remedy = "make any other control video beforehand, and use none"
        raise UserError(f"--control_preprocess must be one of {', '.join(kinds)}, not {given!r}; {remedy}")
    return kinds[given]


TRAINER: Replaced = {
    "lora_targets": _lora_targets,
    "control_preprocess": _training_control,
    "use_dwt_loss": (
        "leave it out. Its Haar transform is orthonormal, so that loss equals the squared error of the clean latents: "
        "sigma^2 times the squared error of the velocity, which is the loss here. A higher --shift favours high noise "
        "as sigma^2 did"
    ),
    "val_timestep": (
        "leave it out. Validation always measures at the sigmas 0.1, 0.3, 0.5, 0.7 and 0.9, whatever --shift is. "
        "TensorBoard shows each of them: val/loss_sigma_0.5 is the loss at timestep 500"
    ),
}

TEST_SCRIPT: Replaced = {"control_preprocess": _sampling_control}

"""What a tensor in a LoRA file is: the module that its key names, and the role that it has there.

A key is a prefix, the name of a module, and a role: "diffusion_model." "blocks.0.self_attn.q" ".lora_A.weight".
"""

import re
from dataclasses import dataclass

from utils.adapters.lycoris import kind_of
from utils.common.checkpoint_names import EXPERTS
from wan.names import is_parameter, official_name

HIGH, LOW = EXPERTS

# Words that programs put before a module's name, each with a dot: wrappers of PEFT, of compilers and of parallel
# training, and what a pipeline calls its transformer. Some stay in the middle, where single blocks were wrapped.
_BEFORE = ("model", "base_model", "diffusion_model", "transformer", "transformer_2", "unet", "pipe", "dit", "dit2")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PREFIX = re.compile(
    rf"(?:(?:{'|'.join(map(re.escape, sorted((*_BEFORE, *_WRAPPERS), key=len, reverse=True)))})\.)*"
    r"(?:lora_unet__?|lora_transformer_(?:2_)?|lycoris_)?"
)
_INSIDE = re.compile(rf"(?<=\.)(?:{'|'.join(_WRAPPERS)})\.")
_SECOND = re.compile(r"transformer_2|dit2")  # what diffusers and DiffSynth-Studio call the expert of low noise

_MATRIX = r"(?P<matrix>lora_[AB]|lora[._](?:down|up))(?P<tail>(?:\.(?!weight|bias)\w+)?(?:\.weight)?)"
_BIAS = r"lora_B(?:\.(?!bias)\w+)?\.(?P<bias>bias)"
_MAGNITUDE = r"(?P<magnitude>lora_magnitude_vector)(?:\.(?!weight)\w+)?(?:\.weight)?"
_OTHER = r"(?P<other>alpha|diff|diff_b|diff_m|w_norm|b_norm|reshape_weight|dora_scale|(?:hada|lokr)_\w+)"
_ROLE = re.compile(rf"\.(?:{_MATRIX}|{_BIAS}|{_MAGNITUDE}|{_OTHER})$")

_MATRICES = {
    matrix: (role, f"{down}/{up}")
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
    for matrix, role in ((down, "down"), (up, "up"))
}
_SAME = {"w_norm": "diff", "b_norm": "diff_b", "diff_m": "diff"}  # LyCORIS's and LightX2V's words for a full change

_REFUSED = {
    r"\.set_weight$": "replaces a whole weight instead of adapting it",
    r"\.lora_mid\.": "belongs to a Tucker decomposition, which ComfyUI cannot apply to a layer of Wan either",
    r"\.[qkv]_loras\.(?:down|up)\.": (
        "belongs to Stand-In: it acts on the tokens of a reference picture alone, so it is no change of a weight"
    ),
    r"\.(?:oft_blocks|oft_diag|boft_\w+)$": "belongs to an OFT, which multiplies a weight instead of adding to it",
    r"\.[ab][12]\.weight$": "belongs to a GLoRA, which depends on the base model's weights",
    r"\.lora_embedding_[AB]": "adapts an embedding table, and Wan has none",
}


@dataclass(frozen=True)
class Key:
    """One tensor's module, by its official name and as spelled in the file; its role; the name of the format."""

    prefix: str
    spelled: str
    name: str
    role: str
    matrices: str = ""

    @property
    def stem(self) -> tuple[str, str]:
        """What all keys of a module share."""
        return self.prefix, self.spelled

    @property
    def expert(self) -> str | None:
        """Which of two experts the prefix names; diffusers and DiffSynth-Studio number the second one only."""
        return LOW if _SECOND.search(self.prefix) else None


def refusal(key: str) -> str:
    """Why a tensor of this key cannot be part of a change of weights, after the key; nothing for any other key."""
    return next((reason for pattern, reason in _REFUSED.items() if re.search(pattern, key)), "")


def names_wan(key: str) -> bool:
    """Whether a key names a module of Wan, whatever else it says."""
    role = _ROLE.search(key)
    return official_name(_split(key[: role.start() if role else len(key)])[1]) is not None


def parse_key(key: str) -> Key | None:
    """What a key says; None for one that is not of a Wan LoRA."""
    role = _ROLE.search(key)
    if role is None:
        return None
    prefix, spelled = _split(key[: role.start()])
    matrix, matrices = _MATRICES.get(role["matrix"], ("", ""))
    found = matrix or role["bias"] or ("magnitude" if role["magnitude"] else role["other"])
    name = official_name(f"{spelled}.modulation" if found == "diff_m" else spelled)
    if name is None or (is_parameter(name) and found not in ("diff", "diff_m")):
        return None
    if found.startswith(("hada", "lokr")) and not kind_of(found):
        return None
    return Key(prefix, spelled, name, _SAME.get(found, found), matrices + (role["tail"] or ""))


def _split(text: str) -> tuple[str, str]:
    """What programs put before a module's name, and the name without any wrappers inside of it."""
    prefix = _PREFIX.match(text)
    assert prefix is not None  # it may be empty
    return prefix[0], _INSIDE.sub("", text[prefix.end() :])

"""The released models as rows of data: how each is sampled, which no checkpoint says, and the widths it was made with.

Columns: `widths` of the transformer, for building it without a checkpoint; `task` as config.json calls it; `in_dim`
and `out_dim`, its channels; `shift`, `steps` and `guidance` of official sampling; `fps`, `frames` and `size` (width,
height) of its videos; `negative_prompt`, a file in embeddings/.
"""

from pathlib import PurePath

from easydict import EasyDict

from wan.modules.model import WanShape


def _row(dim: int, ffn_dim: int, num_heads: int, num_layers: int, **facts: object) -> EasyDict:
    widths = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "num_layers": num_layers}
    return EasyDict({"widths": widths} | _WAN21_T2V | facts)


_WAN21_T2V = {
    "task": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "shift": 5.0,
    "steps": 50,
    "guidance": 5.0,
    "fps": 16,
    "frames": 81,
    "size": (832, 480),
    "negative_prompt": "negative_video.txt",
}

CONFIGS = EasyDict(
    {
        "wan2.1-t2v-1.3B": _row(1536, 8960, 12, 30),
        "wan2.1-t2v-14B": _row(5120, 13824, 40, 40),
    }
)


def shape_of(config: EasyDict) -> WanShape:
    """The transformer's shape of a row."""
    return WanShape(**config.widths, in_dim=config.in_dim, out_dim=config.out_dim)


def named_config(name: str) -> EasyDict | None:
    """The row of a released model by its folder's or hub's name, such as Wan-AI/Wan2.1-T2V-1.3B; None for another."""
    last = PurePath(name).name.lower()
    return next((row for released, row in CONFIGS.items() if released.lower() == last), None)


def find_config(task: str, in_dim: int) -> EasyDict | None:
    """The row that says how a checkpoint of this task and number of input channels is used; None if it is unknown.

    Widths do not matter: a Wan of any size is trained and sampled as its family is.
    """
    return next((row for row in CONFIGS.values() if (row.task, row.in_dim) == (task, in_dim)), None)

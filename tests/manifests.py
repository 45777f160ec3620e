"""Names and shapes of the released checkpoints, for tests of the full-size layouts."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "manifests"


def load_manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape for every tensor of the checkpoint described by data/manifests/<name>.json.

    An entry whose name contains `{i}` stands for one tensor per block: `repeat` of them, or those in `indices`.
    """
    tensors = json.loads((FOLDER / f"{name}.json").read_text())["tensors"]
    return {
        pattern.replace("{i}", str(index)): tuple(entry["shape"])
        for pattern, entry in tensors.items()
        for index in entry.get("indices", range(entry.get("repeat", 1)))
    }


def write_empty(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a file of zeros in bf16 of any size, which takes no room on a disk that keeps sparse files."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return path

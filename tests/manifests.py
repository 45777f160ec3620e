"""Names and shapes of the released checkpoints, for tests of the full-size layouts."""

import json
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

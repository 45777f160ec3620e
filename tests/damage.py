"""Model folders made wrong, for tests of what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.checkpoints import TRANSFORMER, CheckpointError

Edit = Callable[[dict[str, Tensor]], object]


def edit_config(folder: Path, **changes: object) -> None:
    """Changes config.json; None removes an entry."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, edit: Edit) -> None:
    state = load_file(folder / TRANSFORMER)
    edit(state)
    save_file(state, folder / TRANSFORMER)


def edit_pth(path: Path, edit: Edit) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def refused(message: str | None, load: Callable, *args: object, **settings: object) -> str:
    """The message with which a call is refused; it must be short."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load(*args, **settings)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)

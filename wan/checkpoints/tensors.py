"""Weights read from files, never unpickled. The only module of wan/ that opens them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan.checkpoints.errors import CheckpointError

Shape = tuple[int, ...]


def read_shapes(path: Path) -> dict[str, Shape]:
    """The names and shapes of all tensors in a safetensors file, from its header alone. Raises CheckpointError."""
    with ExitStack() as stack:
        file = _open(stack, path, "cpu")
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_tensors(places: Mapping[str, Path], device: torch.device | str) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads one tensor by name straight to `device`; `places` says which file holds it.

    Raises CheckpointError for a file that cannot be read.
    """
    with ExitStack() as stack:
        files = {path: _open(stack, path, device) for path in dict.fromkeys(places.values())}

        def read(name: str) -> Tensor:
            try:
                return files[places[name]].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _incomplete(places[name], error) from None

        yield read


def read_pth(path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a .pth file, memory-mapped. Raises CheckpointError for any other content."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a complete file of plain tensors: {reason}\ndownload it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a flat dictionary of tensors")
    return state


def _open(stack: ExitStack, path: Path, device: torch.device | str) -> safe_open:
    try:
        return stack.enter_context(safe_open(path, framework="pt", device=str(device)))
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from None


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is not a complete safetensors file: {error}\ndownload it again")

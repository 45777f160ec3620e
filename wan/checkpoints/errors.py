"""What the loading of a model raises, and how what a file says is shown in a message."""

import reprlib
from collections.abc import Sequence

_LONGEST = 100  # characters


class CheckpointError(Exception):
    """A model folder or file cannot be used; the message names it and says what is wrong."""


class ModelNotFoundError(CheckpointError):
    """There is no model of this name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class MissingPartsError(CheckpointError):
    """Parts of a model are neither given nor in its folder."""

    def __init__(self, parts: Sequence[str], message: str) -> None:
        super().__init__(message)
        self.parts = parts


def shown(value: object) -> str:
    """What a file says, for a message: short, and on one line."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return short if short.isprintable() else repr(short)

"""What the loading of a model raises."""


class CheckpointError(Exception):
    """A model folder or file cannot be used; the message names it and says what is wrong."""


class ModelNotFoundError(CheckpointError):
    """There is no model of this name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
